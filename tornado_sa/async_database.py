"""The async twin of the database, and the session that knows who is using it."""

from __future__ import annotations

import asyncio
from asyncio import Task
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from sqlalchemy import URL, select
from sqlalchemy.exc import IllegalStateChangeError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
)

from tornado_sa.blocks import AsyncBlock
from tornado_sa.database import (
    _SESSION_DEFAULTS,
    DatabaseCore,
    ScopeRegistry,
    log_failed_closing,
    logger,
    no_answer,
)
from tornado_sa.engine import async_engine
from tornado_sa.errors import ConcurrentAccess
from tornado_sa.scope import Scope, current_scope

# How often a session that is busy connecting is tried again, in seconds.
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
    ``debug``
        Raise `.ConcurrentAccess`, with the names of both tasks, when two tasks
        use one session at the same time.

    Raises `.ConfigurationError` for a driver that is not async, unknown or not
    installed.
    """

    def __init__(
        self,
        url: str | URL | AsyncEngine,
        *,
        engine_options: Mapping[str, Any] | None = None,
        session_options: Mapping[str, Any] | None = None,
        debug: bool = False,
    ) -> None:
        #: The SQLAlchemy engine.
        self.engine: AsyncEngine = async_engine(url, engine_options)
        options = {"bind": self.engine, **_SESSION_DEFAULTS, **(session_options or {})}
        options["class_"] = _tracked_class(options.pop("class_", AsyncSession), debug)
        #: Makes sessions that belong to no scope; you close those yourself.
        self.sessionmaker: async_sessionmaker[AsyncSession] = async_sessionmaker(**options)
        super().__init__(self.sessionmaker, self.engine.sync_engine)
        #: The current scope's session, usable from anywhere below the scope.
        self.session: async_scoped_session[AsyncSession] = async_scoped_session(
            self.sessionmaker, current_scope
        )
        self.session.registry = ScopeRegistry(self)
        self._closings: set[Task[None]] = set()

    def scope(self, label: str | None = None) -> AsyncBlock:
        """Open a new scope: a unit of work with its own session, rolled back at its end.

        An async context manager that yields the session, and a decorator for
        coroutine functions. See `.Database.scope`.
        """
        return AsyncBlock(self, label, commit=False)

    def begin(self, label: str | None = None) -> AsyncBlock:
        """Like `scope`, with COMMIT on leaving and ROLLBACK on an exception."""
        return AsyncBlock(self, label, commit=True)

    def _end(self, scope: Scope, session: AsyncSession) -> Task[None] | None:
        if not session.in_transaction():  # then closing takes no I/O, so no task
            session.sync_session.close()
            return None
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # the loop is gone, or this is not its thread: drop the connection
            session.sync_session.invalidate()
            return None
        closing = loop.create_task(self._close(scope, session), name=f"close {scope.label}")
        self._closings.add(closing)
        closing.add_done_callback(self._closings.discard)
        return closing

    async def _close(self, scope: Scope, session: AsyncSession) -> None:
        users = session.users if isinstance(session, TrackedSession) else []
        try:
            if users:
                await _take_away(scope, session, users)
            else:
                await AsyncSession.run_sync(session, self._way_to_end(scope))
        except Exception as error:
            log_failed_closing(scope, error)

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
        if self._closings:
            await asyncio.wait(self._closings, timeout=timeout)
        self._abandon()
        await self.engine.dispose()

    def _after_fork(self) -> None:
        super()._after_fork()
        self._closings = set()


class TrackedSession(AsyncSession):
    """An ``AsyncSession`` that knows which tasks are inside it at this moment.

    A session that is closed while another task waits for its query loses its
    connection: asyncpg refuses the ROLLBACK, and SQLAlchemy leaves the
    connection checked out. So whoever closes must know.
    """

    _debug: ClassVar[bool] = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: The tasks inside, innermost call last.
        self.users: list[Task[Any]] = []

    def _enter(self) -> Task[Any]:
        task = asyncio.current_task()
        assert task is not None
        if self._debug and self.users and self.users[-1] is not task:
            raise ConcurrentAccess(
                f"Task {task.get_name()!r} used an AsyncSession while task"
                f" {self.users[-1].get_name()!r} was using it. Give each branch of a gather its"
                " own session: `async with db.scope() as session:`."
            )
        self.users.append(task)
        return task


def _track(name: str) -> Callable[..., Any]:
    method = getattr(AsyncSession, name)

    async def tracked(self: TrackedSession, *args: Any, **kwargs: Any) -> Any:
        task = self._enter()
        try:
            return await getattr(super(TrackedSession, self), name)(*args, **kwargs)
        finally:
            self.users.remove(task)

    tracked.__name__, tracked.__qualname__ = name, method.__qualname__
    tracked.__doc__ = method.__doc__
    return tracked


for _name in (
    "commit connection delete execute flush get get_one merge refresh rollback run_sync scalar"
    " scalars stream stream_scalars"
).split():
    setattr(TrackedSession, _name, _track(_name))


def _tracked_class(base: type[AsyncSession], debug: bool) -> type[AsyncSession]:
    """A class like ``base`` whose sessions know their users."""
    bases = (TrackedSession,) if base is AsyncSession else (TrackedSession, base)
    return type(base.__name__, bases, {"_debug": debug})


async def _take_away(scope: Scope, session: AsyncSession, users: list[Task[Any]]) -> None:
    """Take the connection away from tasks that outlived their unit of work."""
    names = ", ".join(repr(task.get_name()) for task in users)
    logger.warning(
        "%s ended while its session was in use by task %s; its connection is discarded. Await the"
        " task before the unit of work ends, or give it a scope of its own.",
        scope.label,
        names,
    )
    while True:
        try:
            await session.invalidate()
            return
        except IllegalStateChangeError:  # busy connecting: the driver's timeout bounds this
            await asyncio.sleep(_RETRY_CLOSING)
