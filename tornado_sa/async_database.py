"""The database for ``AsyncSession`` code, and for ``Session`` code under the bridge."""

from __future__ import annotations

import asyncio
import time
from asyncio import Task
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, ClassVar, Concatenate, Literal, ParamSpec, TypeVar, cast

from sqlalchemy import URL, select
from sqlalchemy.exc import IllegalStateChangeError, InvalidRequestError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from tornado_sa.blocks import AsyncBlock
from tornado_sa.bridge import BridgedSession, bridged_class, cross, is_bridged, step_aside
from tornado_sa.core import SESSION_DEFAULTS, DatabaseCore, ScopeRegistry, no_answer
from tornado_sa.ending import log_failed_closing, logger, roll_back_and_close
from tornado_sa.engine import async_engine
from tornado_sa.reader import Reader, make_reader
from tornado_sa.scope import Scope, current_scope

P = ParamSpec("P")
T = TypeVar("T")

# How often a session that cannot be closed at the moment is tried again, in seconds.
_RETRY_CLOSING = 0.01


class AsyncDatabase(DatabaseCore[AsyncSession]):
    """An SQLAlchemy database for ``AsyncSession`` code, which never blocks the loop.

    ``url``
        A ``str``, a ``sqlalchemy.URL`` or a ready ``AsyncEngine``.
    ``engine_options``
        Passed to ``sqlalchemy.ext.asyncio.create_async_engine``.
    ``session_options``
        Passed to ``async_sessionmaker``, with the same two defaults as
        `.Database` has.
    ``reader_url``, ``ping_after``, ``hold_warning``
        As for `.Database`.
    ``debug``
        Raise `.ConcurrentAccess`, with the names of both tasks, when two tasks
        use one session at the same time.

    Raises `.ConfigurationError` for a driver that is not async, unknown or not
    installed.
    """

    needs_bridge: ClassVar[bool] = True

    def __init__(
        self,
        url: str | URL | AsyncEngine,
        *,
        reader_url: str | URL | None = None,
        engine_options: Mapping[str, Any] | None = None,
        session_options: Mapping[str, Any] | None = None,
        ping_after: float | None = 30.0,
        hold_warning: float | None = None,
        debug: bool = False,
    ) -> None:
        #: The SQLAlchemy engine.
        self.engine: AsyncEngine = async_engine(url, engine_options, ping_after)
        options = {"bind": self.engine, **SESSION_DEFAULTS, **(session_options or {})}
        plain = options.pop("sync_session_class", None)
        plain = plain or options.get("class_", AsyncSession).sync_session_class
        options["sync_session_class"] = bridged_class(plain, debug)
        #: Makes sessions that belong to no scope; you close those yourself.
        self.sessionmaker: async_sessionmaker[AsyncSession] = async_sessionmaker(**options)
        reader = make_reader(
            async_engine, url, reader_url, engine_options, session_options, ping_after
        )
        self._reader: Reader[AsyncEngine]
        super().__init__(
            self.sessionmaker,
            self.engine.sync_engine,
            reader,
            options["sync_session_class"],
            hold_warning,
        )
        #: The current scope's session, usable from anywhere below the scope.
        self.session: async_scoped_session[AsyncSession] = async_scoped_session(
            self.sessionmaker, current_scope
        )
        self.session.registry = ScopeRegistry(self, self.session_in)
        #: The plain session of the current scope, for helpers and model methods that run under
        #: the bridge.
        self.sync_session: scoped_session[Session] = scoped_session(sessionmaker(), current_scope)
        self.sync_session.registry = ScopeRegistry(self, self.plain_session_in)
        self._tasks: set[Task[Any]] = set()

    @property
    def reader(self) -> AsyncEngine:
        """The engine of units of work that only read. See `.Database.reader`."""
        return self._reader.engine

    def scope(self, label: str | None = None, *, read_only: bool = False) -> AsyncBlock:
        """Open a new scope: a unit of work with its own session, rolled back at its end.

        An async context manager that yields the session, and a decorator for
        coroutine functions. See `.Database.scope`.
        """
        return AsyncBlock(self, label, read_only=read_only)

    def begin(self, label: str | None = None) -> AsyncBlock:
        """Like `scope`, with COMMIT on leaving and ROLLBACK on an exception."""
        return AsyncBlock(self, label, commit=True)

    def plain_session_in(self, scope: Scope) -> Session:
        """The plain session inside the ``AsyncSession`` of ``scope``. See `session_in`."""
        return self.session_in(scope).sync_session

    async def run_sync(
        self, function: Callable[Concatenate[Session, P], T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call ``function(session, *args, **kwargs)`` under the bridge; return what it returned.

        ``session`` is the plain session of the current scope, and
        ``db.sync_session`` inside leads to the same. This is how a task, a
        callback or an ``AsyncSessionHandler`` calls code that was written for a
        plain ``Session``.

        Raises `.NoActiveScope`, `.ScopeClosed`, and what ``function`` raises.
        """
        session = self.plain_session_in(current_scope())
        await step_aside()
        return await cross(function, session, *args, **kwargs)

    def _end(self, scope: Scope, session: AsyncSession) -> Task[None] | None:
        if not session.in_transaction():  # then closing takes no I/O, so no task
            session.sync_session.close()
            return None
        plain = cast(BridgedSession, session.sync_session)
        # At the end of a bridged verb a task would cost more. Not within one: finish() must not let
        # go of the loop, or Tornado reads on where the verb is about to detach() the stream.
        if is_bridged() and not (scope.entered or plain.users or plain.committing):
            self._way_to_end(scope)(plain)
            return None
        try:
            asyncio.get_running_loop()
        except RuntimeError:  # the loop is gone, or this is not its thread: drop the connection
            session.sync_session.invalidate()
            return None
        return self._track(self._close(scope, session), f"close {scope.label}")

    async def _close(self, scope: Scope, session: AsyncSession) -> None:
        await step_aside()
        plain = cast(BridgedSession, session.sync_session)
        # A COMMIT is never broken off: nobody could tell its outcome.
        while plain.committing:  # noqa: ASYNC110  (rare, short, and no event tells its end)
            await asyncio.sleep(_RETRY_CLOSING)
        users = list(plain.users.values())
        if users:
            logger.warning(
                "%s ended while its session was in use by task %s; its query is broken off."
                " Await the task before the unit of work ends, or give it a scope of its own.",
                scope.label,
                ", ".join(repr(task.get_name()) for task in users),
            )
        end = _break_off if users else self._way_to_end(scope)
        while True:
            try:
                await cross(end, plain)
                return
            except IllegalStateChangeError:
                # It is connecting; the driver's timeouts bound this.
                await asyncio.sleep(_RETRY_CLOSING)
            except Exception as error:
                log_failed_closing(scope, error)
                return

    def _track(self, work: Coroutine[Any, Any, None], name: str) -> Task[None]:
        """Run ``work`` in a task that is kept until it is done, and that `dispose` waits for."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._keep(task)
        return task

    def _keep(self, task: Task[Any]) -> None:
        """Keep ``task`` until it is done, and have `dispose` wait for it."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def ping(self, timeout: float = 5.0) -> Literal[True]:
        """Return True when the database answers within ``timeout`` seconds.

        Raises what SQLAlchemy or the driver raised, or ``TimeoutError``. A
        handler that lets the error pass answers 503.
        """
        try:
            async with asyncio.timeout(timeout), self.engine.connect() as connection:
                await connection.execute(select(1))
        except TimeoutError as error:
            raise no_answer(self, timeout) from error
        return True

    async def dispose(self, timeout: float = 10.0) -> None:
        """Wait for sessions that are being closed, then close the pool's connections.

        For use at shutdown. Waits at most ``timeout`` seconds; units of work
        that are still open are named in the log.
        """
        deadline = time.monotonic() + timeout
        # Again and again: a hook that ends leaves a session to close.
        while others := self._tasks - {asyncio.current_task()}:
            if not (await asyncio.wait(others, timeout=deadline - time.monotonic()))[0]:
                break
        self._abandon()
        await self.engine.dispose()
        if (reader := self._reader.engine_or_none) is not None:
            await reader.dispose()

    def _after_fork(self) -> None:
        super()._after_fork()
        self._tasks = set()


def _break_off(session: Session) -> None:
    """End a session whose query another task still waits for.

    asyncpg and aiosqlite let go of a connection that is closed under a query.
    psycopg does not: its waiting task goes on watching the number of the closed
    socket, which the next connection is given, and both fail. There the query
    is cancelled on the server, and the rollback waits for it to end.
    """
    try:
        connection: Any = session.connection().connection
    except InvalidRequestError as error:  # it is connecting: try again later
        raise IllegalStateChangeError(str(error)) from error
    if hasattr(connection.driver_connection, "cancel_safe"):
        connection.dbapi_connection.run_async(lambda driver: driver.cancel_safe())
        roll_back_and_close(session)
    else:
        session.invalidate()
