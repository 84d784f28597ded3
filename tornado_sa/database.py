"""The database for plain ``Session`` code."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Mapping
from contextvars import Context, copy_context
from functools import partial
from inspect import isawaitable, iscoroutine
from typing import Any, Literal, ParamSpec, TypeVar

from sqlalchemy import URL, Engine, create_engine, select
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from tornado_sa import in_doubt, workers
from tornado_sa.after_commit import LaterCall
from tornado_sa.binds import bound_engines
from tornado_sa.blocks import Block
from tornado_sa.core import SESSION_DEFAULTS, ScopeRegistry, no_answer
from tornado_sa.decisions import Decisions
from tornado_sa.ending import log_failed_call, logger
from tornado_sa.engine import sync_engine
from tornado_sa.in_doubt import InDoubt
from tornado_sa.reader import Reader, make_reader
from tornado_sa.scope import Scope, current, current_scope
from tornado_sa.threads import ThreadedDatabase
from tornado_sa.two_phase import two_phase_class

P = ParamSpec("P")
R = TypeVar("R")


class Database(ThreadedDatabase):
    """An SQLAlchemy database for plain ``Session`` code.

    ``url``
        A ``str``, a ``sqlalchemy.URL`` or a ready ``Engine``. A ready engine
        keeps its own pool. In-memory SQLite is one connection, shared by every
        scope and thread: good for trying things out.
    ``reader_url``
        What units of work that only read connect to, such as a replica; by
        default ``url``. See `reader`.
    ``binds``
        Further databases of the same sessions, by declarative base, mapped
        class or table: ``binds={Archive: "postgresql+psycopg://..."}``. Values
        are as for ``url``, which is for all the rest; such a database has no
        reader. With ``session_options={"twophase": True}`` their commit is
        two-phase, and survives a crash: see `recover`.
    ``engine_options``
        Passed to ``sqlalchemy.create_engine``, for each engine that is made
        from a URL.
    ``session_options``
        Passed to ``sqlalchemy.orm.sessionmaker``. Two defaults differ from
        SQLAlchemy's: ``close_resets_only=False``, so that a closed session
        raises instead of silently beginning again, and
        ``expire_on_commit=False``, so that objects stay readable.
    ``ping_after``
        A connection that sat idle for longer than this, in seconds, is checked
        before it is handed out. None: never.
    ``hold_warning``
        Log a warning when a unit of work held a connection for longer than
        this, in seconds. None: never.
    ``debug``
        Raise `.UncommittedChanges` where a success would leave work uncommitted.
        Without it, that is a line in the log.

    Queries block the thread they run in. In a Tornado handler that is the event
    loop, which is right for SQLite and for scripts; for a database server use
    `.AsyncDatabase`.

    Raises `.ConfigurationError` for an async or unknown driver, or one that is
    not installed.
    """

    def __init__(
        self,
        url: str | URL | Engine,
        *,
        reader_url: str | URL | None = None,
        binds: Mapping[Any, str | URL | Engine] | None = None,
        engine_options: Mapping[str, Any] | None = None,
        session_options: Mapping[str, Any] | None = None,
        ping_after: float | None = 30.0,
        hold_warning: float | None = None,
        debug: bool = False,
    ) -> None:
        #: The SQLAlchemy engine.
        self.engine: Engine = sync_engine(url, engine_options, ping_after)
        #: The engine of each key of ``binds``.
        self.binds: dict[Any, Engine] = bound_engines(
            (url, self.engine),
            binds,
            session_options,
            lambda other: sync_engine(
                other, None if isinstance(other, Engine) else engine_options, ping_after
            ),
        )
        options = {"bind": self.engine, **SESSION_DEFAULTS, **(session_options or {})}
        others = list(self.binds.values())
        decisions = Decisions(
            self.engine, lambda: create_engine(self.engine.url, pool=self.engine.pool.recreate())
        )
        if others:
            options["binds"] = self.binds
        if options.get("twophase"):
            base = options.get("class_", Session)
            options["class_"] = two_phase_class(base, [self.engine, *others], decisions)
        #: Makes sessions that belong to no scope; you close those yourself.
        self.sessionmaker: sessionmaker[Session] = sessionmaker(**options)
        reader = make_reader(
            sync_engine,
            url,
            reader_url,
            engine_options,
            {**(session_options or {}), **({"binds": binds} if binds else {})},
            ping_after,
        )
        self._reader: Reader[Engine]
        super().__init__(
            self.sessionmaker,
            self.engine,
            reader,
            self.sessionmaker,
            hold_warning,
            debug,
            others,
            decisions,
        )
        #: The current scope's session, usable from anywhere below the scope.
        self.session: scoped_session[Session] = scoped_session(self.sessionmaker, current_scope)
        self.session.registry = ScopeRegistry(self, self.session_in)
        #: The same. Helpers that use it work on an `.AsyncDatabase` too, under the bridge.
        self.sync_session: scoped_session[Session] = self.session

    @property
    def reader(self) -> Engine:
        """The engine of units of work that only read: of a `.read_only` verb, for one.

        It connects to ``reader_url``, or else to ``url``, with the same
        ``engine_options`` and a pool of its own. Its connections are in
        autocommit mode, and the server refuses to write over them. They cost
        nothing until they are used. Listeners on `engine` are not on the reader
        too: what each connection needs to be told, tell both.

        Raises `.ConfigurationError` if there is none. That is so for a ready
        engine without a ``reader_url``, and for SQLite in memory, where it is
        the session that refuses to write.
        """
        return self._reader.engine

    def scope(self, label: str | None = None, *, read_only: bool = False) -> Block:
        """Open a new scope: a unit of work with its own session, rolled back at its end.

        A context manager that yields the session, and a decorator::

            with db.scope() as session:
                session.get(Note, 7)

            @db.scope()
            def job():
                db.session.get(Note, 7)

        It is always a new scope, also inside a request. What was not committed
        is rolled back. With ``read_only``, the session uses the `reader`, and a
        write raises `.ReadOnlyViolation`. ``label`` is what errors and logs call it; by default
        the place of the ``with`` statement, or the function's name.
        """
        return Block(self, label, read_only=read_only)

    def begin(self, label: str | None = None) -> Block:
        """Like `scope`, with COMMIT on leaving and ROLLBACK on an exception."""
        return Block(self, label, commit=True)

    def plain_session_in(self, scope: Scope) -> Session:
        """The same as `session_in`: what code for either database calls."""
        return self.session_in(scope)

    def session_in(self, scope: Scope) -> Session:
        """The session of this database in ``scope``, made when it is first asked for.

        Raises `.ScopeClosed`, and `.ConcurrentAccess` while a worker of
        `to_thread` has it.
        """
        if workers.lines:
            workers.check(scope)
        return super().session_in(scope)

    def uncommitted(self, scope: Scope, session: Session) -> str | None:
        # While a worker has the session, nobody else looks into it.
        return None if scope in workers.lines else super().uncommitted(scope, session)

    def _call_back(self, scope: Scope, calls: list[LaterCall]) -> None:
        context = copy_context()
        context.run(current.set, None)
        for call in calls:
            try:
                result = context.run(call)
                if isawaitable(result):
                    self._await(scope, call, result, context)
            except Exception:
                log_failed_call(scope.full_label, call)

    def _await(
        self, scope: Scope, call: LaterCall, result: Awaitable[object], context: Context
    ) -> None:
        label = scope.full_label

        async def wait() -> None:
            try:
                await result
            except Exception:
                log_failed_call(label, call)

        try:
            self._track(wait(), f"after_commit of {scope.label}", context)
        except RuntimeError:  # no loop runs here
            if iscoroutine(result):
                result.close()
            raise

    def _end(self, scope: Scope, session: Session) -> None:
        close = partial(self._close, scope, session)
        if not (workers.lines and workers.leave_ending(scope, close)):
            close()

    def _close(self, scope: Scope, session: Session) -> None:
        self._way_to_end(scope)(session)

    def ping(self, timeout: float = 5.0) -> Literal[True]:
        """Return True when the database answers; block for at most ``timeout`` seconds.

        With ``binds``, when all do.

        Raises what SQLAlchemy raised, or ``TimeoutError``. A handler that lets
        the error pass answers 503.
        """
        outcome: list[BaseException] = []

        def ask() -> None:
            try:
                for engine in self._engines_to_ping():
                    with engine.connect() as connection:
                        connection.execute(select(1))
            except BaseException as error:
                outcome.append(error)

        # A thread, because no driver-independent call gives up after a given time.
        thread = threading.Thread(target=ask, name="tornado_sa ping", daemon=True)
        thread.start()
        thread.join(timeout)
        if thread.is_alive():
            raise no_answer(self, timeout)
        if outcome:
            raise outcome[0]
        return True

    def dispose(self, timeout: float = 10.0) -> None:
        """Close the pool's connections, at shutdown. Units still open are named in the log.

        Waits at most ``timeout`` seconds for the workers of `to_thread`. Those
        that still run then are named in the log, and run to their end; the
        process does not exit before. All other sessions are closed the moment
        their scope ends, so there is nothing else to wait for. The database
        remains usable, with a fresh pool and fresh threads.
        """
        running = self._workers.dispose(timeout)
        waiting = [task.get_name() for task in self._tasks if not task.done()]
        running = ", ".join(filter(None, [running, *waiting]))
        if running:
            logger.warning("%r is disposed of while still at work: %s", self, running)
        self._abandon()
        self._decisions.dispose()
        for engine in self._sync_engines():
            engine.dispose()

    def in_doubt(self) -> list[InDoubt]:
        """The transactions that are prepared, and neither committed nor rolled back.

        Of all engines, and of other applications too, marked by ``ours``. MySQL
        and MariaDB list those of the whole server.

        Raises `.ConfigurationError` for a database without two-phase commit.
        """
        return in_doubt.in_doubt(self._engines, [self._decisions])

    def resolve(self, xid: str, *, commit: bool) -> list[InDoubt]:
        """End one transaction that is in doubt, by hand; return its branches.

        ``xid`` is an id as `in_doubt` lists it. If it is one of ours, the
        decision is stored first, and all branches are ended that this database
        sees. One of another application is ended as it is.

        Raises `.TornadoSAError` if no such transaction is in doubt, if the
        opposite was decided, and if a living process still has it.
        """
        return in_doubt.resolve(self._engines, [self._decisions], xid, commit)

    def recover(self) -> list[InDoubt]:
        """Bring every transaction of ours that is in doubt to its end; return them.

        Call it at start-up. Where the decision to commit was stored, all
        branches are committed, else all are rolled back. It is safe while other
        processes are at work: one that is just between its two phases is told
        that its transaction was rolled back, before it has committed anything.
        Those of other applications are left alone.

        Raises what the databases raise; all of them must be reachable. A branch
        that its process still holds, on MySQL and MariaDB, is left to it, with
        a line in the log.
        """
        return in_doubt.recover(self._engines, self._decisions)
