"""The async twin of the database, and the session that knows who is using it."""

from __future__ import annotations

import asyncio
from asyncio import Task
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, cast

from sqlalchemy import URL, select
from sqlalchemy.exc import IllegalStateChangeError, InvalidRequestError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    AsyncSessionTransaction,
    async_scoped_session,
    async_sessionmaker,
)
from sqlalchemy.orm import Session

from tornado_sa.blocks import AsyncBlock
from tornado_sa.database import _SESSION_DEFAULTS, DatabaseCore, ScopeRegistry, no_answer
from tornado_sa.ending import log_failed_closing, logger, roll_back_and_close
from tornado_sa.engine import async_engine
from tornado_sa.errors import ConcurrentAccess
from tornado_sa.scope import Scope, current_scope

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
        closing = loop.create_task(
            self._close(scope, cast("TrackedSession", session)), name=f"close {scope.label}"
        )
        self._closings.add(closing)
        closing.add_done_callback(self._closings.discard)
        return closing

    async def _close(self, scope: Scope, session: TrackedSession) -> None:
        # A COMMIT is never broken off: nobody could tell its outcome.
        while session.committing:  # noqa: ASYNC110  (rare, short, and no event tells its end)
            await asyncio.sleep(_RETRY_CLOSING)
        users = session.users
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
                await AsyncSession.run_sync(session, end)
                return
            except IllegalStateChangeError:
                # It is connecting; the driver's timeouts bound this.
                await asyncio.sleep(_RETRY_CLOSING)
            except Exception as error:
                log_failed_closing(scope, error)
                return

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
        #: True while one of them is in a COMMIT.
        self.committing: bool = False

    async def commit(self) -> None:
        with self.commit_in_progress():
            await super().commit()

    def begin(self) -> AsyncSessionTransaction:
        return _TrackedTransaction(self)

    def begin_nested(self) -> AsyncSessionTransaction:
        return _TrackedTransaction(self, nested=True)

    @contextmanager
    def commit_in_progress(self) -> Iterator[None]:
        task = self._enter()
        self.committing = True
        try:
            yield
        finally:
            self.committing = False
            self.users.remove(task)

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


class _TrackedTransaction(AsyncSessionTransaction):
    """What ``session.begin()`` returns: commits without going through the session's methods."""

    session: TrackedSession

    async def commit(self) -> None:
        with self.session.commit_in_progress():
            await super().commit()

    async def __aexit__(self, *error: Any) -> None:
        with self.session.commit_in_progress():
            await super().__aexit__(*error)


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
    "connection delete execute flush get get_one merge refresh rollback run_sync scalar"
    " scalars stream stream_scalars"
).split():
    setattr(TrackedSession, _name, _track(_name))


def _tracked_class(base: type[AsyncSession], debug: bool) -> type[AsyncSession]:
    """A class like ``base`` whose sessions know their users."""
    bases = (TrackedSession,) if base is AsyncSession else (TrackedSession, base)
    return type(base.__name__, bases, {"_debug": debug})


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
