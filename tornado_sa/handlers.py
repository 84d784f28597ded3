"""The handlers: one session per request, however the request ends."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, overload

from sqlalchemy.exc import NoResultFound
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.sql.selectable import TypedReturnsRows
from tornado.log import app_log
from tornado.web import HTTPError, RequestHandler

from tornado_sa.async_database import AsyncDatabase
from tornado_sa.database import Database
from tornado_sa.ending import logger
from tornado_sa.entry import wrap_entry_points
from tornado_sa.errors import ConfigurationError
from tornado_sa.responses import RETRY_AFTER, status_for, summary
from tornado_sa.scope import Scope, current

T = TypeVar("T")
AnyDatabase = TypeVar("AnyDatabase", Database, AsyncDatabase)

# BaseHandler is a mixin: it has Tornado's methods by way of the class it is mixed into.
if TYPE_CHECKING:
    _Handler = RequestHandler
else:
    _Handler = object


class _Done:
    """Something that may be awaited, yielded or dropped, and has nothing to wait for."""

    def __await__(self) -> Iterator[None]:
        return _NOTHING


_NOTHING = iter(())  # once exhausted, it is exhausted for everybody
_DONE = _Done()


class BaseHandler(_Handler):
    """A mixin that gives a ``RequestHandler`` one session per request.

    Write it before the handler class: ``class Notes(BaseHandler, MyHandler)``,
    or subclass the ready-made `SessionHandler`.

    `prepare` opens the request's scope, `on_finish` ends it. In between,
    ``self.session`` and ``db.session`` are the same session, in this handler
    and in every function it calls. What was not committed when the scope ends
    is rolled back. Neither method has to be called by a subclass that overrides
    it, and a request that ends without `on_finish` ends its scope all the same.
    """

    #: The database of this handler. The default is ``application.settings["db"]``.
    database: Database | AsyncDatabase | None = None

    #: Cancel the request when its client goes away. By default the verb runs to
    #: its end, as Tornado does it.
    cancel_on_disconnect: ClassVar[bool] = False

    _sa_scope: Scope | None = None
    _sa_task: asyncio.Task[Any] | None = None
    _sa_retry_after: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        mro = cls.__mro__
        if RequestHandler in mro and mro.index(RequestHandler) < mro.index(BaseHandler):
            handler = next(base for base in cls.__bases__ if issubclass(base, RequestHandler))
            raise TypeError(
                f"{cls.__name__}: BaseHandler must come before the handler class, or Tornado's own"
                f" methods hide it. Write: class {cls.__name__}(BaseHandler, {handler.__name__})"
            )
        wrap_entry_points(cls)

    # -- the session ---------------------------------------------------------

    @property
    def db(self) -> Database:
        """The handler's database. Raises `.ConfigurationError` if there is none, or a wrong one."""
        return self._find_database(Database)

    @property
    def session(self) -> Session:
        """The request's session, made when it is first asked for.

        Raises `.ScopeClosed` after the end of the request, and
        `.ConfigurationError` if the handler has no database.
        """
        return self.db.session_in(self._open_scope())

    def get_or_404(self, entity: type[T], ident: Any, **options: Any) -> T:
        """Return the object with primary key ``ident``, or answer 404.

        ``options`` go to ``Session.get``. Raises ``tornado.web.HTTPError``.
        """
        return _or_404(self.session.get(entity, ident, **options))

    @overload
    def one_or_404(self, statement: TypedReturnsRows[tuple[T]]) -> T: ...
    @overload
    def one_or_404(self, statement: TypedReturnsRows[T]) -> T: ...
    def one_or_404(self, statement: Any) -> Any:
        """Return the one object that ``statement`` selects, or answer 404 if there is none.

        Raises ``tornado.web.HTTPError``, and SQLAlchemy's
        ``MultipleResultsFound`` if there are several: that is a mistake in the
        statement or in the data, and no 404.
        """
        return _one(statement, self.session.scalars(statement))

    @overload
    def first_or_404(self, statement: TypedReturnsRows[tuple[T]]) -> T: ...
    @overload
    def first_or_404(self, statement: TypedReturnsRows[T]) -> T: ...
    def first_or_404(self, statement: Any) -> Any:
        """Return the first object that ``statement`` selects, or answer 404 if there is none.

        Raises ``tornado.web.HTTPError``.
        """
        return _or_404(self.session.scalars(statement).first())

    # -- the life of a request -----------------------------------------------

    def prepare(self) -> Any:
        """Open the request's scope and make it current.

        Returns what the next ``prepare`` in line returned, or else something
        that may be awaited, yielded or dropped, so that ``super().prepare()``
        and ``await super().prepare()`` are both right in a subclass.
        """
        self._begin_request()
        result = super().prepare()
        return _DONE if result is None else result

    def on_finish(self) -> None:
        """End the request's scope: roll back what was not committed, and close.

        Does nothing if the scope is over or was never opened, as after a 405.
        """
        try:
            super().on_finish()
        finally:
            self._end_request()

    def on_connection_close(self) -> None:
        """Cancel the request if ``cancel_on_disconnect`` is set."""
        try:
            super().on_connection_close()
        finally:
            self._client_gone()

    def _open_scope(self) -> Scope:
        """Return the request's scope, which may be over; make it if there is none yet."""
        if self._sa_scope is None:
            request = self.request
            self._sa_scope = Scope(request.method or "", request.path)
        return self._sa_scope

    def _begin_request(self) -> None:
        scope = self._sa_scope or self._open_scope()
        current.set(scope)
        if self._sa_task is None and not scope.closed:
            task = self._sa_task = asyncio.current_task()
            if task is not None:
                task.add_done_callback(self._task_ended)

    def _end_request(self) -> None:
        task = self._sa_task
        if task is not None:
            self._sa_task = None  # the task holds its handler: no reference cycle
            task.remove_done_callback(self._task_ended)
        (self._sa_scope or self._open_scope()).end()  # opened, so that none is opened later

    def _task_ended(self, task: asyncio.Task[Any]) -> None:
        """End the request with its task, for requests that never get to ``on_finish``.

        Those are abandoned uploads, ``detach()``, ``_auto_finish = False``, and
        on Tornado 6.5 cancelled handlers, which are left without an answer too.
        """
        scope = self._sa_scope
        # _finished: private, but Tornado has no public way to ask. Set by finish() and detach().
        if task.cancelled() and not self._finished and scope is not None and not scope.closed:
            try:
                self.send_error(500)
            except Exception:
                app_log.error("Exception in exception handler", exc_info=True)
        self._end_request()

    def _client_gone(self) -> None:
        # Tornado's own part, which an override may have left out: without it, the task of an
        # abandoned upload waits for the rest of the body for ever.
        RequestHandler.on_connection_close(self)
        task = self._sa_task
        if self.cancel_on_disconnect and task is not None and not task.cancelling():
            task.cancel()

    def _find_database(self, kind: type[AnyDatabase]) -> AnyDatabase:
        database = self.database
        if database is None:
            database = self.application.settings.get("db")
        if isinstance(database, kind):
            return database
        name = type(self).__name__
        if database is None:
            raise ConfigurationError(
                f"{name} has no database. Set it for the application,"
                f" `Application(handlers, db={kind.__name__}(url))`, or for the handler class,"
                f" `database = {kind.__name__}(url)`."
            )
        if isinstance(database, Database | AsyncDatabase):
            raise ConfigurationError(
                f"{name} needs {_a(kind)}, and was given {_a(type(database))}. SessionHandler goes"
                " with Database, AsyncSessionHandler with AsyncDatabase."
            )
        raise ConfigurationError(
            f"{name} was given {_a(type(database))} as its database, and needs {_a(kind)}. Set the"
            " class attribute `database`, or `db` in the application's settings."
        )

    # -- errors --------------------------------------------------------------

    def send_error(self, status_code: int = 500, **kwargs: Any) -> None:
        """Answer an error of the database with the status it deserves.

        503 with ``Retry-After`` where trying again may help, 409 for stale
        data. Everything else is as Tornado does it, and ``write_error`` still
        gets the original exception.
        """
        status = status_for(_exception(kwargs)) if status_code == 500 else None
        self._sa_retry_after = status == 503
        try:
            super().send_error(int(status or status_code), **kwargs)
        finally:
            self._sa_retry_after = False

    def set_status(self, status_code: int, reason: str | None = None) -> None:
        """Set the status; to a 503 of `send_error`, which has cleared the headers, add one."""
        super().set_status(status_code, reason)
        if self._sa_retry_after:
            if status_code == 503:
                self.set_header("Retry-After", RETRY_AFTER)
            else:  # write_error() thinks otherwise
                self.clear_header("Retry-After")

    def log_exception(
        self,
        typ: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        """Log errors that are answered with 503 or 409 in one line, all others as Tornado does."""
        status = status_for(value)
        if status is None or value is None:
            super().log_exception(typ, value, tb)
        else:
            label = self._open_scope().label
            logger.error("%s: %d %s: %s", label, status, status.phrase, summary(value))


class SessionHandler(BaseHandler, RequestHandler):
    """A ``RequestHandler`` with a plain ``Session``, on a `.Database`."""


class AsyncSessionHandler(BaseHandler, RequestHandler):
    """A ``RequestHandler`` with an ``AsyncSession``, on an `.AsyncDatabase`."""

    # The same names as in BaseHandler, with `await` before them: what the two flavours share is
    # the life of a request, not the type of the session. Hence the ignored overrides.

    @property
    def db(self) -> AsyncDatabase:  # type: ignore[override]
        """The handler's database. Raises `.ConfigurationError` if there is none, or a wrong one."""
        return self._find_database(AsyncDatabase)

    @property
    def session(self) -> AsyncSession:  # type: ignore[override]
        """The request's session, made when it is first asked for. See `BaseHandler.session`."""
        return self.db.session_in(self._open_scope())

    async def get_or_404(self, entity: type[T], ident: Any, **options: Any) -> T:  # type: ignore[override]
        """Return the object with primary key ``ident``, or answer 404."""
        return _or_404(await self.session.get(entity, ident, **options))

    @overload  # type: ignore[override]
    async def one_or_404(self, statement: TypedReturnsRows[tuple[T]]) -> T: ...
    @overload
    async def one_or_404(self, statement: TypedReturnsRows[T]) -> T: ...
    async def one_or_404(self, statement: Any) -> Any:
        """Return the one object that ``statement`` selects. See `BaseHandler.one_or_404`."""
        return _one(statement, await self.session.scalars(statement))

    @overload  # type: ignore[override]
    async def first_or_404(self, statement: TypedReturnsRows[tuple[T]]) -> T: ...
    @overload
    async def first_or_404(self, statement: TypedReturnsRows[T]) -> T: ...
    async def first_or_404(self, statement: Any) -> Any:
        """Return the first object that ``statement`` selects, or answer 404."""
        return _or_404((await self.session.scalars(statement)).first())


def _or_404(found: T | None) -> T:
    if found is None:
        raise HTTPError(404)
    return found


def _one(statement: Any, result: Any) -> Any:
    column = next(iter(getattr(statement, "column_descriptions", ())), {"expr": None, "entity": 0})
    if column["expr"] is column["entity"]:
        result = result.unique()  # joined eager loads repeat the object
    try:
        return result.one()
    except NoResultFound:
        raise HTTPError(404) from None


def _exception(kwargs: dict[str, Any]) -> BaseException | None:
    error: BaseException | None = kwargs.get("exc_info", (None, None))[1]
    return error


def _a(kind: type) -> str:
    return f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}"
