"""The handlers: one session per request, however the request ends."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, ParamSpec, TypeVar, overload

from sqlalchemy.exc import NoResultFound
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.sql.selectable import TypedReturnsRows
from tornado.web import HTTPError, RequestHandler

from tornado_sa.async_database import AsyncDatabase
from tornado_sa.bridge import cross, is_bridged
from tornado_sa.changes import uncommitted
from tornado_sa.database import Database
from tornado_sa.ending import commit_reads
from tornado_sa.entry import wrap_entry_points
from tornado_sa.errors import UncommittedChanges
from tornado_sa.request import DONE, RequestScope
from tornado_sa.verbs import note_verbs

T = TypeVar("T")
P = ParamSpec("P")


class BaseHandler(RequestScope):
    """A mixin that gives a ``RequestHandler`` one session per request.

    Write it before the handler class: ``class Notes(BaseHandler, MyHandler)``,
    or subclass the ready-made `SessionHandler`.

    `prepare` opens the request's scope, `on_finish` ends it. In between,
    ``self.session`` and ``db.session`` are the same session, in this handler
    and in every function it calls. What was not committed when the scope ends
    is rolled back. Neither method has to be called by a subclass that overrides
    it, and a request that ends without `on_finish` ends its scope all the same.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        mro = cls.__mro__
        if RequestHandler in mro and mro.index(RequestHandler) < mro.index(BaseHandler):
            handler = next(base for base in cls.__bases__ if issubclass(base, RequestHandler))
            raise TypeError(
                f"{cls.__name__}: BaseHandler must come before the handler class, or Tornado's own"
                f" methods hide it. Write: class {cls.__name__}(BaseHandler, {handler.__name__})"
            )
        note_verbs(cls)
        wrap_entry_points(cls)

    # -- the session ---------------------------------------------------------

    @property
    def db(self) -> Database | AsyncDatabase:
        """The handler's database. Raises `.ConfigurationError` if there is none, or a wrong one."""
        return self._find_database()

    @property
    def session(self) -> Session:
        """The request's session, made when it is first asked for.

        On an `.AsyncDatabase` it works in the ``def`` and ``async def`` code of
        the handler, which runs under the bridge: queries and lazy loads let the
        loop go on. In other tasks and callbacks of the request, and in a
        ``@gen.coroutine``, it raises `.TornadoSAError` when asked for I/O.

        Raises `.ScopeClosed` after the end of the request, and
        `.ConfigurationError` if the handler has no database.
        """
        scope = self._sa_scope or self._open_scope()
        return (self._sa_bridge or self.db).plain_session_in(scope)

    def release(self) -> Awaitable[None]:
        """Give the connection back before a slow await: ``await self.release()``.

        The session stays usable and takes a connection again when it needs one.
        The transaction, which has only read, ends with COMMIT, so nothing that
        was loaded expires. With an ``AsyncSession`` this is a coroutine; a plain
        session lets go at once, and what is returned may be dropped.

        Raises `.UncommittedChanges`, and does nothing, if work would be lost
        were it not committed: `commit` it, or roll it back. Raises
        `.ScopeClosed` after the end of the request.
        """
        scope, database = self._open_scope(), self._find_database()
        scope.check()
        if scope.get(database) is None:
            return DONE
        session = database.plain_session_in(scope)
        if database.needs_bridge and not (self._sa_bridge and is_bridged()):
            return cross(_release, session, scope.label)
        _release(session, scope.label)
        return DONE

    def after_commit(
        self, function: Callable[P, object], /, *args: P.args, **kwargs: P.kwargs
    ) -> None:
        """Call ``function(*args, **kwargs)`` once the request's work is committed and answered.

        See `.Database.after_commit`. Raises `.ScopeClosed` after the end of the request.
        """
        scope = self._open_scope()
        scope.check()
        self._find_database()._call_after_commit(scope, function, args, kwargs)

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


class SessionHandler(BaseHandler, RequestHandler):
    """A ``RequestHandler`` with a plain ``Session``.

    On a `.Database` its queries block the event loop. On an `.AsyncDatabase` the
    same code does not: verbs, `prepare` and ``data_received``, ``def`` or
    ``async def``, run under the bridge, where lazy loading works as well.
    """


class AsyncSessionHandler(BaseHandler, RequestHandler):
    """A ``RequestHandler`` with an ``AsyncSession``, on an `.AsyncDatabase`."""

    # The same names as in BaseHandler, with `await` before them: what the two flavours share is
    # the life of a request, not the type of the session. Hence the ignored overrides.

    _sa_plain = False

    @property
    def db(self) -> AsyncDatabase:
        """The handler's database. Raises `.ConfigurationError` if there is none, or a wrong one."""
        return self._check_database(AsyncDatabase)

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


def _release(session: Session, label: str) -> None:
    if not session.in_transaction():
        return
    lost = uncommitted(session)
    if lost is not None:
        raise UncommittedChanges(
            f"{label}: release() would leave work uncommitted: {lost}. Call commit() or rollback()"
            " first."
        )
    commit_reads(session)


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
