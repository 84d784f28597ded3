"""The database for ``AsyncSession`` code, and for ``Session`` code under the bridge."""

from __future__ import annotations

import asyncio
import time
from asyncio import Future, Task
from collections.abc import Callable, Mapping
from contextvars import copy_context
from inspect import isawaitable
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

from tornado_sa import in_doubt
from tornado_sa.after_commit import LaterCall
from tornado_sa.binds import Engines, distinct
from tornado_sa.blocks import AsyncBlock
from tornado_sa.bridge import bridged_task, complete, cross, step_aside
from tornado_sa.changes import connections_of
from tornado_sa.core import DatabaseCore, ScopeRegistry, no_answer
from tornado_sa.ending import log_failed_call, log_failed_closing, logger, roll_back_and_close
from tornado_sa.engine import async_engine
from tornado_sa.in_doubt import InDoubt
from tornado_sa.reader import Reader
from tornado_sa.scope import Scope, current, current_scope
from tornado_sa.sessions import BridgedSession, bridged_class, crossing_class
from tornado_sa.two_phase import two_phase_class

P = ParamSpec("P")
T = TypeVar("T")

# How often a session that cannot be closed at the moment is tried again, in seconds.
_RETRY_CLOSING = 0.01


class AsyncDatabase(DatabaseCore[AsyncSession]):
    """An SQLAlchemy database for ``AsyncSession`` code, which never blocks the loop.

    ``url``
        A ``str``, a ``sqlalchemy.URL`` or a ready ``AsyncEngine``.
    ``binds``
        Further databases of the same sessions. As for `.Database`.
    ``engine_options``
        Passed to ``sqlalchemy.ext.asyncio.create_async_engine``, for each engine
        that is made from a URL.
    ``session_options``
        Passed to ``async_sessionmaker``, with the same two defaults as
        `.Database` has.
    ``reader_url``, ``ping_after``, ``hold_warning``
        As for `.Database`.
    ``debug``
        As for `.Database`, and raise `.ConcurrentAccess`, with the names of both
        tasks, when two tasks use one session at the same time.

    Raises `.ConfigurationError` for a driver that is not async, unknown or not
    installed.
    """

    needs_bridge: ClassVar[bool] = True

    def __init__(
        self,
        url: str | URL | AsyncEngine,
        *,
        reader_url: str | URL | None = None,
        binds: Mapping[Any, str | URL | AsyncEngine] | None = None,
        engine_options: Mapping[str, Any] | None = None,
        session_options: Mapping[str, Any] | None = None,
        ping_after: float | None = 30.0,
        hold_warning: float | None = None,
        debug: bool = False,
    ) -> None:
        engines = Engines(
            async_engine, url, reader_url, binds, engine_options, session_options, ping_after
        )
        #: The SQLAlchemy engine.
        self.engine: AsyncEngine = engines.first
        #: The engine of each key of ``binds``.
        self.binds: dict[Any, AsyncEngine] = engines.binds
        options = engines.session_options
        base = options.get("class_", AsyncSession)
        plain = options.pop("sync_session_class", None) or base.sync_session_class
        if options.get("twophase"):
            plain = two_phase_class(plain, engines.plain, engines.decisions)
        plain = options["sync_session_class"] = bridged_class(plain, debug)
        options["class_"] = crossing_class(base)
        #: Makes sessions that belong to no scope; you close those yourself.
        self.sessionmaker: async_sessionmaker[AsyncSession] = async_sessionmaker(**options)
        self._reader: Reader[AsyncEngine]
        super().__init__(self.sessionmaker, engines, plain, hold_warning, debug)
        #: The current scope's session, usable from anywhere below the scope.
        self.session: async_scoped_session[AsyncSession] = async_scoped_session(
            self.sessionmaker, current_scope
        )
        self.session.registry = ScopeRegistry(self, self.session_in)
        #: The plain session of the current scope, for helpers and model methods that run under
        #: the bridge.
        self.sync_session: scoped_session[Session] = scoped_session(sessionmaker(), current_scope)
        self.sync_session.registry = ScopeRegistry(self, self.plain_session_in)

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
        return await cross(function, session, *args, **kwargs)

    def _end(self, scope: Scope, session: AsyncSession) -> Task[None] | None:
        plain = cast(BridgedSession, session.sync_session)
        if not plain.in_transaction():  # then closing takes no I/O, so no task
            plain.close()
            return None
        # Not within a verb: there, finish() must not let go of the loop, or Tornado reads on where
        # the verb is about to detach() the stream.
        bridged = None if scope.entered or plain.users or plain.committing else bridged_task()
        if bridged is not None:
            self._tasks.add(bridged)  # for dispose(), until the connection is back
            try:
                self._way_to_end(scope)(plain)
            finally:
                self._tasks.discard(bridged)
            return None
        # In the middle of a query whose loop was closed under it, it never gets to its end. Its
        # connection, and all else, is for the garbage collector.
        if any(task.get_loop().is_closed() for task in plain.users.values()):
            return None
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # the loop is gone, or this is not its thread: drop the connection
            plain.invalidate()
            return None
        if scope.closings is None:
            return self._close_later(scope, session)
        # The owner of the scope does it at once, unless it waits for something else meanwhile.
        if not scope.closings:
            loop.call_soon(_close_rest, scope)
        scope.closings.append((self, session))
        return None

    def _close_later(self, scope: Scope, session: AsyncSession) -> Task[None]:
        return self._track(self._close(scope, session), f"close {scope.label}")

    async def close_now(self, scope: Scope, session: AsyncSession) -> None:
        """Close ``session`` in this task. Never raises, but for a cancellation."""
        task: Any = asyncio.current_task()
        self._tasks.add(task)
        try:
            await self._close(scope, session)
        finally:
            self._tasks.discard(task)

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

    def _call_back(self, scope: Scope, calls: list[LaterCall]) -> None:
        context = copy_context()
        context.run(current.set, None)
        work = self._make_calls(scope.full_label, calls)
        self._track(work, f"after_commit of {scope.label}", context)

    async def _make_calls(self, label: str, calls: list[LaterCall]) -> None:
        for call in calls:
            try:
                await cross(_make_call, call)
            except Exception:
                log_failed_call(label, call)

    async def ping(self, timeout: float = 5.0) -> Literal[True]:
        """Return True when the database answers within ``timeout`` seconds.

        With ``binds``, when all do.

        Raises what SQLAlchemy or the driver raised, or ``TimeoutError``. A
        handler that lets the error pass answers 503.
        """
        try:
            async with asyncio.timeout(timeout):
                for engine in distinct([self.engine, *self.binds.values()]):
                    if engine.sync_engine in self._engines_to_ping():
                        async with engine.connect() as connection:
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
        await asyncio.sleep(0)  # for `_close_rest`
        # Again and again: a hook that ends leaves a session to close.
        while others := {one for one in (*self._tasks, *self._in_progress) if _may_end(one)}:
            if not (await asyncio.wait(others, timeout=deadline - time.monotonic()))[0]:
                break
        self._abandon()
        await cross(self._decisions.dispose)
        for engine in distinct([self.engine, *self.binds.values()]):
            await engine.dispose()
        if (reader := self._reader.engine_or_none) is not None:
            await reader.dispose()

    async def in_doubt(self) -> list[InDoubt]:
        """The transactions that are prepared and not ended. See `.Database.in_doubt`."""
        return await cross(in_doubt.in_doubt, self._engines, [self._decisions])

    async def resolve(self, xid: str, *, commit: bool) -> list[InDoubt]:
        """End one transaction that is in doubt, by hand. See `.Database.resolve`."""
        return await cross(in_doubt.resolve, self._engines, [self._decisions], xid, commit)

    async def recover(self) -> list[InDoubt]:
        """Bring every transaction of ours that is in doubt to its end. See `.Database.recover`."""
        return await cross(in_doubt.recover, self._engines, self._decisions)


def _close_rest(scope: Scope) -> None:
    """Close, in tasks, what the owner of the scope has not come to."""
    while scope.closings:
        database, session = scope.closings.pop(0)
        database._close_later(scope, session)


def _may_end(one: Future[Any]) -> bool:
    """False for the task that asks, and for one that a loop has left behind when it was closed."""
    return one is not asyncio.current_task() and one.get_loop() is asyncio.get_running_loop()


def _make_call(call: LaterCall) -> None:
    result = call()
    if isawaitable(result):
        complete(result)


def _break_off(session: Session) -> None:
    """End a session whose query another task still waits for.

    asyncpg and aiosqlite let go of a connection that is closed under a query.
    psycopg does not: its waiting task goes on watching the number of the closed
    socket, which the next connection is given, and both fail. There the query
    is cancelled on the server, and the rollback waits for it to end.
    """
    connections = [one for one in connections_of(session) if not one.closed]
    bind = {"bind": connections[0].engine} if connections else {}  # with binds, there is no default
    try:
        connections = connections or [session.connection()]
        session.connection(bind_arguments=bind)
    except InvalidRequestError as error:  # it is connecting: try again later
        raise IllegalStateChangeError(str(error)) from error
    pooled: list[Any] = [one.connection for one in connections]
    if all(hasattr(one.driver_connection, "cancel_safe") for one in pooled):
        for one in pooled:
            one.dbapi_connection.run_async(lambda driver: driver.cancel_safe())
        roll_back_and_close(session)
    else:
        session.invalidate()
