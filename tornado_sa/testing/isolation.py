"""Isolation: everything that is committed through a database is rolled back at the end.

The database object is switched over, so a server that already listens takes part. Its sessions are
made of a class that has one connection for all of them, in an outer transaction, and a savepoint
for each of theirs.
"""

from __future__ import annotations

import asyncio
import weakref
from asyncio import AbstractEventLoop, Task
from collections.abc import Awaitable
from typing import Any, cast

from sqlalchemy import Connection, Dialect, Engine, ExceptionContext, event
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import Session

from tornado_sa.after_commit import LaterCall
from tornado_sa.changes import session_of, writing_word
from tornado_sa.core import DatabaseCore
from tornado_sa.errors import ConfigurationError, TornadoSAError
from tornado_sa.memory import SharedPool
from tornado_sa.reader import READS_FOR, is_refusal, violation
from tornado_sa.scope import ReadOnly, Scope
from tornado_sa.testing.outer import CONTROL, OURS, Outer, make_outer
from tornado_sa.testing.session import IsolatedSession
from tornado_sa.testing.unit_lock import UnitLock
from tornado_sa.turns import running_loop

# SQLAlchemy discards the connection of a statement that was cancelled. With these drivers it can go
# on: they cancel the statement on the server, or wait for its end, before the next one.
_SURVIVE_CANCELLATION = frozenset({"asyncpg", "psycopg", "psycopg_async", "aiosqlite"})

# In the info of a session that only reads.
_READS = "tornado_sa.isolated_reads"


class Isolation:
    """What `.isolated` yields. One time of isolation of one database.

    A scope holds it like the session of a database: so it learns when the unit
    of work is over, however it ended.
    """

    debug: bool = False

    def __init__(self, database: DatabaseCore[Any], timeout: float, capture: bool) -> None:
        #: With ``capture_after_commit``, the calls that `.Database.after_commit` was asked for and
        #: whose work was committed, in their order. Each has a ``name``, and ``call()`` makes it.
        self.calls: list[LaterCall] = []
        self.lock: UnitLock = UnitLock(f"isolated({database!r})", timeout)
        #: The event loop of the test, once it has been seen, and the tasks it had by then.
        self.loop: AbstractEventLoop | None = None
        self.tasks_before: weakref.WeakSet[Task[Any]] = weakref.WeakSet()
        self.database = database
        #: True if calls are kept, and not made.
        self.captures = capture
        self._outers: dict[Dialect, Outer] = {}
        self._begun: set[Session] = set()
        self._loose: dict[Session, Scope] = {}
        self._base: Any = None
        self._out_before = 0

    # -- on and off ----------------------------------------------------------

    def switch_on(self) -> None:
        """Make the sessions of the database isolated ones, from now on.

        Raises `.TornadoSAError` where that cannot be.
        """
        database = self.database
        maker: Any = database._make_session
        if database._isolation is not None:
            raise TornadoSAError(
                f"isolated({database!r}) is on already, and one cannot lie inside another. Leave it"
                " first; a fixture may have entered it for you."
            )
        if maker.kw.get("twophase"):
            raise ConfigurationError(
                f"{database!r} commits in two phases, which cannot happen inside a transaction, so"
                " isolated() is not for it. Test it on databases that are made for each test."
            )
        scopes = database.status().open_scopes
        if scopes:
            raise TornadoSAError(
                f"isolated({database!r}) begins while units of work are open, whose sessions would"
                f" be left out: {_listed(scopes)}. Enter it first, and they are isolated."
            )
        if isinstance(maker, async_sessionmaker):
            self._base = maker.kw["sync_session_class"]
            maker.configure(sync_session_class=self._session_class(self._base))
        else:
            self._base = maker.class_
            maker.class_ = self._session_class(self._base)
        for engine in database._engines:
            event.listen(engine, "handle_error", self._translate)
        self._out_before = self._checked_out()
        database._isolation = self

    def switch_off(self) -> None:
        """Make plain sessions again. Who still waits for the connection is sent away."""
        self.lock.end()
        maker: Any = self.database._make_session
        if isinstance(maker, async_sessionmaker):
            maker.configure(sync_session_class=self._base)
        else:
            maker.class_ = self._base
        for engine in self.database._engines:
            event.remove(engine, "handle_error", self._translate)
        self.database._isolation = None

    def roll_back(self) -> None:
        """Roll everything back, and give the connections back. For an `.AsyncDatabase`, I/O."""
        failures: list[Exception] = []
        while self._outers:
            _, outer = self._outers.popitem()
            try:
                outer.end()
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def abandon(self) -> None:
        """Give the connections up, whose event loop is no more."""
        while self._outers:
            self._outers.popitem()[1].abandon()

    def others_connected(self) -> int:
        """How many connections are out now that were not before, without those of its own."""
        return self._checked_out() - self._out_before - len(self._outers)

    def _checked_out(self) -> int:
        pools: list[Any] = [engine.pool for engine in self.database._sync_engines()]
        return sum(pool.checkedout() for pool in pools if hasattr(pool, "checkedout"))

    def _meet_loop(self) -> None:
        loop = running_loop() if self.loop is None else None
        if loop is not None:
            self.loop = loop
            self.tasks_before.update(asyncio.all_tasks(loop))

    @property
    def is_connected(self) -> bool:
        """True if there is a connection to be given back."""
        return bool(self._outers)

    @property
    def in_use(self) -> list[Scope]:
        """The units of work that are not over, those that wait among them."""
        holder = self.lock.holder
        return [*([] if holder is None else [holder]), *self.lock.waiting]

    # -- units of work -------------------------------------------------------

    def begin(self, scope: Scope) -> Awaitable[None] | None:
        """Let ``scope`` have the connection; None if it has it now, else wait for that."""
        self._meet_loop()
        scope.put(self, self)  # before it waits: a scope that ends leaves the line
        turn = self._join(scope)
        return None if turn is None else self._wait(scope, turn)

    async def _wait(self, scope: Scope, turn: Any) -> None:
        try:
            await self.lock.wait(scope, turn)
        except BaseException:
            scope.drop(self)
            raise

    def _join(self, scope: Scope) -> Any:
        self.look_at_holder()
        try:
            return self.lock.join(scope)
        except BaseException:
            scope.drop(self)
            raise

    def take(self, scope: Scope) -> None:
        """The same for plain code, which waits where it can."""
        self._meet_loop()
        scope.put(self, self)
        self.look_at_holder()
        try:
            self.lock.take(scope)
        except BaseException:
            scope.drop(self)
            raise

    def end_session(self, scope: Scope, _session: object) -> Task[None] | None:
        """The unit of work is over; its last session may still be rolling back."""
        if self.lock.holder is scope:
            self.look_at_holder()
        else:
            self.lock.leave(scope)
        return None

    def uncommitted(self, _scope: Scope, _session: object) -> str | None:
        return None

    def look_at_holder(self) -> None:
        """Pass the connection on if its holder is over, and its savepoint with it."""
        holder = self.lock.holder
        if holder is not None and holder.closed and not self._begun:
            self.lock.leave(holder)

    def capture(self, calls: list[LaterCall]) -> list[LaterCall]:
        """Keep the calls for the test; return those that are to be made at once."""
        if not self.captures:
            return calls
        self.calls += calls
        return []

    # -- sessions ------------------------------------------------------------

    def _session_class(self, base: type[Session]) -> type[Session]:
        bases = (IsolatedSession,) if base is Session else (IsolatedSession, base)
        return type(base.__name__, bases, {"_isolation": self})

    def take_over(self, session: Any, scope: Scope, _how: ReadOnly) -> None:
        """Make ``session`` one that only reads, as `.Reader.take_over` does."""
        if not self._in_memory:
            self.database._reader.engine  # noqa: B018  (raises if the database has none)
        plain: Session = getattr(session, "sync_session", session)
        plain.info[READS_FOR] = scope
        plain.info[_READS] = True

    @property
    def _in_memory(self) -> bool:
        return isinstance(self.database._sync_engine.pool, SharedPool)

    def connection_for(self, session: Session, engine: Engine) -> Connection:
        """The connection that ``session`` uses in place of ``engine``."""
        self._admit(session)
        try:
            return self._outer_for(session, engine).connection
        except BaseException:
            self._end_loose(session)  # it will not begin
            raise

    def _outer_for(self, session: Session, engine: Engine) -> Outer:
        reader = self.database._reader.plain_engine()
        if reader is not None and engine.dialect is reader.dialect:
            engine = self.database._sync_engine
        outer = self._outers.get(engine.dialect)
        if outer is None:
            in_memory = isinstance(engine.pool, SharedPool)
            outer = self._outers[engine.dialect] = make_outer(engine, in_memory)
            event.listen(outer.connection, "before_cursor_execute", self._refuse)
            self._meet_loop()
        elif session not in self._begun:
            outer.check()
        return outer

    def _admit(self, session: Session) -> None:
        """Let ``session`` begin. One that belongs to no unit of work is one by itself."""
        if self.database._isolation is not self:
            raise TornadoSAError(
                "A session was used that was made inside isolated(), which is over by now. Make"
                " a new one."
            )
        if session in self._begun or session in self._loose:
            return
        holder = self.lock.holder
        theirs = None if holder is None else holder.get(cast(Any, self.database))
        if theirs is not None and getattr(theirs, "sync_session", theirs) is session:
            return
        scope = Scope("a session of db.sessionmaker()")
        self.take(scope)
        self._loose[session] = scope

    def began(self, session: Session, connection: Connection) -> None:
        """The transaction of ``session`` on ``connection`` is a savepoint by now."""
        outer = self._outers.get(connection.dialect)
        if outer is None or outer.connection is not connection:  # one that the user gave it
            return
        self._begun.add(session)
        outer.unit_begins()
        if _READS in session.info and outer.read_only():
            session.info[_READS] = outer

    def ended(self, session: Session) -> None:
        """The transaction of ``session`` is over, and its savepoint with it."""
        try:
            if session in self._begun:
                for outer in self._outers.values():
                    outer.unit_ended()
                    if session.info.get(_READS) is outer and not outer.connection.invalidated:
                        outer.read_again()
        finally:
            self._begun.discard(session)
            self._end_loose(session)
            self.look_at_holder()

    def _end_loose(self, session: Session) -> None:
        loose = self._loose.pop(session, None)
        if loose is not None:
            loose.end()

    def _refuse(self, connection: Connection, _cursor: Any, statement: str, *rest: Any) -> None:
        """Refuse to write for a session that only reads, on a server that cannot."""
        session = session_of(connection)
        if session is None or session.info.get(_READS) is not True:
            return
        word = writing_word(statement)
        if word is not None and not rest[1].execution_options.get(OURS):
            raise violation(session.info[READS_FOR], f"its session refused to {word}")

    def _translate(self, context: ExceptionContext) -> BaseException | None:
        cancelled = isinstance(context.original_exception, asyncio.CancelledError)
        if cancelled and context.dialect.driver in _SURVIVE_CANCELLATION:
            # But who knows which savepoints there are, if it was about one?
            context.is_disconnect = bool(CONTROL.match(context.statement or ""))
        session = None if context.connection is None else session_of(context.connection)
        if session is None or _READS not in session.info:
            return None
        if not is_refusal(context.original_exception):
            return None
        return violation(session.info[READS_FOR], "the server refused to write")

    def check_left(self) -> None:
        """Raise `.TornadoSAError` if units of work are not over."""
        self.look_at_holder()
        left = self.in_use
        if left:
            raise TornadoSAError(
                f"isolated({self.database!r}) ends while units of work are open, which are rolled"
                f" back with it: {_listed(left)}. Await them, or leave their `with` block, before."
            )


def _listed(scopes: list[Scope]) -> str:
    return ", ".join(f"{scope.label!r} ({scope.age:.1f} s)" for scope in scopes)
