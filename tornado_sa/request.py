"""The life of a request: its scope, and what its errors are answered with."""

from __future__ import annotations

import asyncio
import sys
from asyncio import Future
from collections.abc import Awaitable, Callable, Coroutine, Generator
from inspect import isawaitable
from types import TracebackType, coroutine
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from tornado.log import app_log
from tornado.web import RequestHandler

from tornado_sa.async_database import AsyncDatabase
from tornado_sa.core import DatabaseCore
from tornado_sa.database import Database
from tornado_sa.ending import logger
from tornado_sa.errors import ConfigurationError, UncommittedChanges
from tornado_sa.responses import RETRY_AFTER, status_for, summary
from tornado_sa.scope import ReadOnly, Scope, current
from tornado_sa.transactions import Unit
from tornado_sa.verbs import Transaction

AnyDatabase = TypeVar("AnyDatabase", bound=DatabaseCore[Any])

# A mixin: it has Tornado's methods by way of the class it is mixed into.
if TYPE_CHECKING:
    _Handler = RequestHandler
else:
    _Handler = object


@coroutine
def _nothing() -> Generator[Any, Any, None]:
    yield from ()


#: What may be awaited, yielded or dropped, and has nothing to wait for: a generator at its end.
DONE: Awaitable[None] = _nothing()
next(cast(Any, DONE), None)


async def after(
    wait: Awaitable[None], method: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Call ``method``, and wait for it, after ``wait``."""
    await wait
    result = method(*args, **kwargs)
    return await result if isawaitable(result) else result


class RequestScope(_Handler):
    """What `.BaseHandler` does when, and whatever way, a request begins and ends."""

    #: The database of this handler. The default is ``application.settings["db"]``.
    database: Database | AsyncDatabase | None = None

    #: The verbs that run in a transaction, as if each were decorated with `.transactional`. In
    #: upper case, such as ``frozenset({"POST", "PUT"})``.
    transactional_methods: ClassVar[frozenset[str]] = frozenset()

    #: Cancel the request when its client goes away. By default the verb runs to
    #: its end, as Tornado does it. Of a WebSocket, only the handshake is ever
    #: cancelled: an event always runs to its end.
    cancel_on_disconnect: ClassVar[bool] = False

    #: The verbs that only read, in upper case: ``frozenset({"GET", "HEAD"})``.
    #: As if each were decorated with `.read_only`. Read when the class is made.
    read_only_methods: ClassVar[frozenset[str]] = frozenset()

    _sa_reading: ClassVar[dict[str, ReadOnly]] = {}  # by the name of the verb
    _sa_plain: ClassVar[bool] = True  # self.session is a plain Session
    _sa_bridge: AsyncDatabase | None = None  # and its database an async one: it needs the bridge
    _sa_scope: Scope | None = None  # in a WebSocket handler a property: see events.py
    _sa_handshake: Scope | None = None
    _sa_task: asyncio.Task[Any] | None = None
    _sa_hooks: int = 0  # hooks that run as tasks at this moment
    _sa_over: bool = False  # the request has ended but for them
    _sa_transactions: ClassVar[dict[str, Transaction]] = {}
    _sa_unit: Unit | None = None  # a transactional verb that is running

    async def _execute(self, *args: Any, **kwargs: Any) -> None:
        """Run the whole request, as Tornado does it, in the scope that it is.

        Private, and overridden in this one place, because it is all that the task of a request
        does, and so the only thing that every request comes through: a 405, an abandoned upload,
        a ``detach()``, ``_auto_finish = False`` and a cancellation too.
        """
        scope = self._sa_scope or self._open_scope()
        closings = scope.closings = []
        current.set(scope)
        if self.cancel_on_disconnect:
            self._sa_task = asyncio.current_task()
        try:
            await super()._execute(*args, **kwargs)
        except asyncio.CancelledError:
            self._answer_cancelled()
            raise
        finally:
            if not scope.closed:
                self._end_request()
        while closings:  # not as tasks of their own, which cost 3 % of a query
            database, session = closings.pop(0)
            await database.close_now(scope, session)

    def prepare(self) -> Any:
        """Open the request's scope and make it current.

        Returns what the next ``prepare`` in line returned, or else something
        that may be awaited, yielded or dropped, so that ``super().prepare()``
        and ``await super().prepare()`` are both right in a subclass.
        """
        wait = self._begin_request()
        if wait is not None:
            return after(wait, super().prepare)
        result = super().prepare()
        return DONE if result is None else result

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

    def should_commit(self) -> bool:
        """Whether the work of a `.transactional` verb that has returned is committed.

        Override this to decide otherwise than by the status: below 400.
        """
        return self.get_status() < 400

    def finish(self, chunk: str | bytes | dict[str, Any] | None = None) -> Future[None]:
        """Finish the response; in a `.transactional` verb, after its COMMIT.

        A success that leaves work uncommitted is named in the log. With
        ``debug=True`` on the database it raises `.UncommittedChanges` instead,
        which is answered with a 500.
        """
        if self._sa_unit is not None:
            return self._sa_unit.finish(chunk)
        scope = self._sa_scope
        if scope is not None and scope.has_sessions and not self._finished:
            self._look_for_uncommitted(scope)
        return super().finish(chunk)

    def flush(self, include_footers: bool = False) -> Future[None]:
        """Send what was written. Raises `.ConfigurationError` in a `.transactional` verb."""
        if self._sa_unit is not None:
            self._sa_unit.flush()
        return super().flush(include_footers)

    def _finish_held(self) -> None:
        """Finish what a transactional verb has finished before its COMMIT."""
        super().finish()

    def _look_for_uncommitted(self, scope: Scope) -> None:
        status = self.get_status()
        lost, is_error = scope.uncommitted() if status < 400 else (None, False)
        if lost is not None:
            text = (
                f"{scope.full_label} answers {status} and leaves work uncommitted: {lost}. Commit"
                " it before the response, with @transactional or self.session.commit()."
            )
            if is_error:
                raise UncommittedChanges(text)
            logger.warning("%s", text)

    def _open_scope(self) -> Scope:
        """Return the request's scope, which may be over; make it if there is none yet."""
        if self._sa_scope is None:
            request = self.request
            scope = self._sa_scope = Scope(request.method or "", request.path)
            scope.handler_name = type(self).__name__
            if self._sa_reading:  # now, so that prepare() reads as the verb does
                scope.read_only = self._sa_reading.get(request.method or "")
            if self._sa_plain:
                database = self._database()
                if getattr(database, "needs_bridge", False):
                    self._sa_bridge = database
        return self._sa_scope

    def _begin_request(self) -> Awaitable[None] | None:
        """Open the scope and make it current. Return what has to be awaited before it is used."""
        scope = self._sa_scope or self._open_scope()
        if current.get() is not scope:  # prepare() is called by hand
            current.set(scope)
        return self._wait_for(scope)

    def _wait_for(self, scope: Scope) -> Awaitable[None] | None:
        """In a test, one unit of work waits for another: see `tornado_sa.testing.isolated`."""
        isolation = getattr(self._database(), "_isolation", None)
        return None if isolation is None or scope.closed else isolation.begin(scope)

    def _end_request(self) -> None:
        self._sa_task = None  # it holds its handler: no reference cycle
        scope = self._sa_scope or self._open_scope()  # opened, so that none is opened later
        if self._sa_hooks:
            self._sa_over = True
        else:
            scope.end()

    def _run_hook(self, database: AsyncDatabase, hook: Coroutine[Any, Any, Any]) -> None:
        """Run a hook of the request as a task of its own; the scope ends after it."""
        self._sa_hooks += 1
        database._track(self._hook(hook), f"hook of {self._open_scope().label}")

    async def _hook(self, hook: Coroutine[Any, Any, Any]) -> None:
        current.set(self._open_scope())
        try:
            await hook
        except Exception:
            self.log_exception(*sys.exc_info())
        finally:
            self._sa_hooks -= 1
            if self._sa_over:
                self._end_request()

    def _answer_cancelled(self) -> None:
        """Answer a request whose task was cancelled, which Tornado 6.5 does not."""
        # _finished: private, but Tornado has no public way to ask. Set by finish() and detach().
        if not self._finished and not self._open_scope().closed:
            try:
                self.send_error(500)
            except Exception:
                app_log.error("Exception in exception handler", exc_info=True)

    def _client_gone(self) -> None:
        # Tornado's own part, which an override may have left out: without it, the task of an
        # abandoned upload waits for the rest of the body for ever.
        RequestHandler.on_connection_close(self)
        task = self._sa_task
        if not self.cancel_on_disconnect or task is None or task.cancelling():
            return
        if self._sa_unit is None or not self._sa_unit.committing:  # for who could tell its outcome?
            task.cancel()

    def _database(self) -> Any:
        return self.database or self.application.settings.get("db")

    def _find_database(self) -> Database | AsyncDatabase:
        """The database of this handler. Raises `.ConfigurationError` if it has none."""
        return cast("Database | AsyncDatabase", self._check_database(Database, AsyncDatabase))

    def _check_database(self, *kinds: type[AnyDatabase]) -> AnyDatabase:
        database = self._database()
        if isinstance(database, kinds):
            return database
        name, kind = type(self).__name__, kinds[0]
        if database is None:
            raise ConfigurationError(
                f"{name} has no database. Set it for the application,"
                f" `Application(handlers, db={kind.__name__}(url))`, or for the handler class,"
                f" `database = {kind.__name__}(url)`."
            )
        if isinstance(database, Database | AsyncDatabase):
            raise ConfigurationError(
                f"{name} needs {_a(kind)}, and was given {_a(type(database))}. SessionHandler goes"
                " with Database or AsyncDatabase, AsyncSessionHandler with AsyncDatabase."
            )
        raise ConfigurationError(
            f"{name} was given {_a(type(database))} as its database, and needs {_a(kind)}. Set the"
            " class attribute `database`, or `db` in the application's settings."
        )

    def send_error(self, status_code: int = 500, **kwargs: Any) -> None:
        """Answer an error of the database with the status it deserves.

        503 with ``Retry-After`` where trying again may help, 409 for stale
        data. Everything else is as Tornado does it, and ``write_error`` still
        gets the original exception.
        """
        status = status_for(_exception(kwargs)) if status_code == 500 else None
        if status != 503:
            super().send_error(int(status or status_code), **kwargs)
            return
        # Tornado's send_error() clears the headers, sets the status and asks write_error(). So the
        # header is set with the status, and taken back if write_error() thinks otherwise.
        set_status = self.set_status

        def set_status_and_header(status_code: int, reason: str | None = None) -> None:
            set_status(status_code, reason)
            if status_code == 503:
                self.set_header("Retry-After", RETRY_AFTER)
            else:
                self.clear_header("Retry-After")

        vars(self)["set_status"] = set_status_and_header
        try:
            super().send_error(503, **kwargs)
        finally:
            vars(self).pop("set_status", None)  # None: write_error() sent another error

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


def _exception(kwargs: dict[str, Any]) -> BaseException | None:
    error: BaseException | None = kwargs.get("exc_info", (None, None))[1]
    return error


def _a(kind: type) -> str:
    return f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}"
