"""What the two databases share: the sessions of their scopes, and the end of these."""

from __future__ import annotations

import asyncio
import os
import time
import weakref
from asyncio import Future, Task
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import Context
from typing import TYPE_CHECKING, Any, ClassVar, Generic, ParamSpec, TypeVar

from sqlalchemy import Engine, event
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.util import ScopedRegistry

from tornado_sa.after_commit import LaterCall, remember, take_due, watch_commits
from tornado_sa.binds import Engines
from tornado_sa.changes import uncommitted, watch_sessions, watch_writes
from tornado_sa.ending import discard_connection, log_failed_closing, logger, roll_back_and_close
from tornado_sa.engine import shown
from tornado_sa.errors import ConfigurationError, NoActiveScope, ScopeClosed, TornadoSAError
from tornado_sa.holds import warn_of_long_holds
from tornado_sa.memory import SharedPool
from tornado_sa.responses import mark_unreachable, summary
from tornado_sa.scope import Scope, current_scope
from tornado_sa.status import Status, status_of

if TYPE_CHECKING:
    from tornado_sa.testing.isolation import Isolation

P = ParamSpec("P")
SessionT = TypeVar("SessionT", bound=Session | AsyncSession)


class DatabaseCore(Generic[SessionT]):
    """What `.Database` and `.AsyncDatabase` share: all that needs no I/O."""

    #: True if its plain sessions do I/O under the bridge only.
    needs_bridge: ClassVar[bool] = False

    def __init__(
        self,
        make_session: Callable[[], SessionT],
        engines: Engines[Any],
        plain_class: type[Session] | sessionmaker[Any],
        hold_warning: float | None,
        debug: bool,
    ) -> None:
        #: True if a response that leaves work uncommitted is an error.
        self.debug: bool = debug
        self._make_session = make_session
        self._engines = engines.plain
        self._sync_engine = self._engines[0]
        self._decisions = engines.decisions
        self._reader = engines.reader
        self._open_scopes: set[Scope] = set()
        self._disposed_at = float("-inf")  # seconds of time.monotonic
        self._of_the_parent: list[Any] = []
        self._tasks: set[Task[Any]] = set()
        self._in_progress: set[Future[None]] = set()
        #: Set by `tornado_sa.testing.isolated`, and by nobody else.
        self._isolation: Isolation | None = None
        for each in self._sync_engines():
            event.listen(each, "handle_error", discard_connection)
            watch_writes(each)
            if hold_warning is not None:
                warn_of_long_holds(each, hold_warning)
        watch_sessions(plain_class)
        watch_commits(plain_class)
        try:
            make_session()  # so that a wrong option is found now and not at the first request
        except (TypeError, ArgumentError) as error:
            what = "session_options" if isinstance(error, TypeError) else "binds"
            raise ConfigurationError(f"{what} are not accepted: {error}") from error
        _databases.add(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({shown(self._sync_engine.url)})"

    def _engines_to_ping(self) -> list[Engine]:
        # In memory, the ROLLBACK that ends the ping would end an isolation as well.
        memory = SharedPool if self._isolation else ()
        return [engine for engine in self._engines if not isinstance(engine.pool, memory)]

    def _sync_engines(self) -> list[Engine]:
        reader = self._reader.plain_engine()
        return self._engines if reader is None else [*self._engines, reader]

    def session_in(self, scope: Scope) -> SessionT:
        """The session of this database in ``scope``, made when it is first asked for.

        Raises `.ScopeClosed`, and `.ConfigurationError` if the scope only reads
        and the database has no reader.
        """
        session: SessionT | None = scope.get(self)
        if session is None:
            scope.check()
            self._open_scopes.add(scope)
            try:
                session = self._make_session()
                self._let_in(scope, session)
                session = scope.put(self, session)
            except BaseException:
                self._open_scopes.discard(scope)
                raise
        return session

    def _let_in(self, scope: Scope, session: SessionT) -> None:
        """Make ``session``, which is new, one of ``scope``."""
        if self._isolation is not None:
            self._isolation.take(scope)
        if scope.read_only is not None:
            (self._isolation or self._reader).take_over(session, scope, scope.read_only)

    def plain_session_in(self, scope: Scope) -> Session:
        """The plain session of this database in ``scope``. See `session_in`."""
        raise NotImplementedError

    def end_session(self, scope: Scope, session: SessionT) -> Task[None] | None:
        """Roll back what was not committed and close; called by the scope as it ends.

        Never raises: a failure is one line in the log.
        """
        self._open_scopes.discard(scope)
        if scope.calls_back and self._isolation is None:
            self._make_due_calls(scope, session)
        try:
            return self._end(scope, session)
        except Exception as error:
            log_failed_closing(scope, error)
            return None
        finally:
            if scope.calls_back and self._isolation is not None:  # which has only one connection
                self._make_due_calls(scope, session)

    def _make_due_calls(self, scope: Scope, session: SessionT) -> None:
        try:
            due = take_due(_plain(session))
            self._call_back(scope, self._isolation.capture(due) if self._isolation else due)
        except Exception as error:
            logger.error("%s: after_commit() failed: %s", scope.full_label, summary(error))

    def uncommitted(self, scope: Scope, session: SessionT) -> str | None:
        """What would be lost if ``session`` were rolled back now, in words."""
        return uncommitted(_plain(session))

    def after_commit(
        self, function: Callable[P, object], /, *args: P.args, **kwargs: P.kwargs
    ) -> None:
        """Call ``function(*args, **kwargs)`` once the work of the current scope is committed.

        ``function`` is a plain function or a coroutine function. It is called
        when the unit of work has ended: for a request, after the response was
        handed to the socket. It is not called if the transaction, or the
        savepoint it was asked for in, is rolled back. Several are called in
        their order, and one that fails is logged and does not stop the others.

        They run outside the scope, so for work with the database they open one
        of their own, with ``db.begin()``. On an `.AsyncDatabase` they run in a
        task, under the bridge, and ``await db.dispose()`` waits for them. On a
        `.Database`, a plain function is called at once and a coroutine is a task.

        Raises `.NoActiveScope` and `.ScopeClosed`.
        """
        self._call_after_commit(current_scope(), function, args, kwargs)

    def _call_after_commit(
        self, scope: Scope, function: Callable[..., object], args: Any, kwargs: Any
    ) -> None:
        session = self.plain_session_in(scope)
        remember(session, LaterCall(session, function, args, kwargs))
        scope.calls_back = True

    def _call_back(self, scope: Scope, calls: list[LaterCall]) -> None:
        """Make the calls that waited for a COMMIT. Never raises."""
        raise NotImplementedError

    def _track(
        self, work: Coroutine[Any, Any, None], name: str, context: Context | None = None
    ) -> Task[None]:
        """Run ``work`` in a task that is kept until it is done, and that `dispose` knows of.

        Raises ``RuntimeError`` where no loop runs.
        """
        try:
            task = asyncio.get_running_loop().create_task(work, name=name, context=context)
        except RuntimeError:
            work.close()
            raise
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Let `dispose` wait for what is done in here, by a task that may go on for long after."""
        done = asyncio.get_running_loop().create_future()
        self._in_progress.add(done)
        try:
            yield
        finally:
            self._in_progress.discard(done)
            done.cancel()  # the quietest way to be done

    def _way_to_end(self, scope: Scope) -> Callable[[Session], None]:
        """How to end a session of ``scope``: by closing it, or with its connection.

        No pool waits for a connection whose engine was disposed of in the meantime; it would stay
        open until it is collected as garbage, and an aiosqlite thread for ever.
        """
        if scope.opened_at <= self._disposed_at and self._isolation is None:
            return Session.invalidate
        return roll_back_and_close

    def _end(self, scope: Scope, session: SessionT) -> Task[None] | None:
        raise NotImplementedError

    def status(self) -> Status:
        """How busy the database is: its pools, and the scopes that are open.

        The figures are sums over ``engine`` and ``binds``. The reader has a pool
        of its own, ``reader.pool``; its scopes are among the open ones.
        """
        return status_of(self._engines, self._open_scopes)

    def _abandon(self) -> None:
        """Name the units of work that are still open as the engine goes away, in one log line."""
        self._disposed_at = time.monotonic()
        leftovers = self.status().open_scopes
        if leftovers:
            listed = ", ".join(f"{scope.label} ({scope.age:.1f} s)" for scope in leftovers)
            logger.warning("%r is disposed of while still in use by: %s", self, listed)

    def _after_fork(self) -> None:
        """Start afresh in a forked child; the parent's connections stay the parent's."""
        for engine in [*self._sync_engines(), *self._decisions.engines()]:
            # Kept, for asyncpg closes what is collected, and by the epoll that the two processes
            # share, the parent's loop would no longer hear of its connection.
            self._of_the_parent.append(engine.pool)
            engine.dispose(close=False)
        self._decisions.after_fork()
        for scope in self._open_scopes:
            # Taken out, or the end of the scope would roll back on the parent's socket; and kept,
            # or the garbage collector would.
            session: SessionT | None = scope.get(self)
            if session is not None:
                self._of_the_parent.append(session)
                scope.drop(self)
        self._open_scopes = set()
        self._tasks = set()
        self._in_progress = set()


def _plain(session: Session | AsyncSession) -> Session:
    return session.sync_session if isinstance(session, AsyncSession) else session


class ScopeRegistry(ScopedRegistry[SessionT]):
    """Lets ``scoped_session`` keep its sessions in the scopes themselves.

    So nothing outlives a scope, and ``self.session`` and ``db.session`` cannot
    differ. The legacy idiom ``db.session.remove()`` stays harmless anywhere.
    """

    def __init__(
        self, database: DatabaseCore[Any], session_in: Callable[[Scope], SessionT]
    ) -> None:
        super().__init__(database._make_session, current_scope)
        self._database = database
        self._session_in = session_in

    def __call__(self) -> SessionT:
        return self._session_in(current_scope())

    def has(self) -> bool:
        try:
            return current_scope().get(self._database) is not None
        except (NoActiveScope, ScopeClosed):
            return False

    def set(self, obj: SessionT) -> None:
        if self._session_in != self._database.session_in:
            raise TornadoSAError(
                "db.sync_session makes no sessions, it leads to the plain session inside"
                " db.session. Give the options to `db.session(...)` instead."
            )
        scope = current_scope()
        self._database._let_in(scope, obj)
        scope.drop(self._database)
        scope.put(self._database, obj)
        self._database._open_scopes.add(scope)

    def clear(self) -> None:
        if self.has():
            scope = current_scope()
            scope.drop(self._database)
            self._database._open_scopes.discard(scope)


def no_answer(database: DatabaseCore[Any], timeout: float) -> TimeoutError:
    """The error for a database that said nothing for ``timeout`` seconds."""
    error = TimeoutError(f"{database!r} did not answer within {timeout:g} s.")
    mark_unreachable(error)
    return error


_databases: weakref.WeakSet[DatabaseCore[Any]] = weakref.WeakSet()


def _after_fork() -> None:
    for database in list(_databases):
        database._after_fork()


os.register_at_fork(after_in_child=_after_fork)
