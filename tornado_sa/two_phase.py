"""Two-phase commit: all databases of a session commit, or none, whatever crashes.

The first phase, PREPARE, is SQLAlchemy's. Before the first COMMIT of the second, the decision is
stored; from then on nothing rolls a branch back.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, ClassVar, cast

from sqlalchemy import Connection, Engine, ExceptionContext, TwoPhaseTransaction, event
from sqlalchemy.orm import Session, SessionTransaction

from tornado_sa.decisions import ABORT, COMMIT, Decisions, gid_of
from tornado_sa.ending import logger
from tornado_sa.engine import shown
from tornado_sa.errors import ConfigurationError, TornadoSAError
from tornado_sa.in_doubt import end_elsewhere
from tornado_sa.responses import summary

# By name of the driver. Tested are psycopg, pymysql and aiomysql; the others share their code.
_DRIVERS = frozenset("psycopg psycopg_async psycopg2 pymysql mysqldb aiomysql asyncmy".split())

# What to write instead of a driver that cannot.
_INSTEAD = {"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql or mysql+aiomysql"}
_INSTEAD["mariadb"] = _INSTEAD["mysql"].replace("mysql+", "mariadb+")

# Where a session keeps its `_Unit`.
_UNIT = "tornado_sa.two_phase"

# The session that has asked for its engine last, in this context.
_asking: ContextVar[weakref.ref[Session] | None] = ContextVar("tornado_sa.asking", default=None)

_UNKNOWN = "unknown"


class _Unit:
    """The branches of one transaction of a session."""

    __slots__ = (
        "__weakref__",
        "begun",
        "connections",
        "decision",
        "decisions",
        "gid",
        "told",
        "transaction",
    )

    def __init__(self, decisions: Decisions, transaction: SessionTransaction) -> None:
        self.decisions = decisions
        self.gid = decisions.new_gid()
        self.transaction = weakref.ref(transaction)
        self.connections: list[Connection] = []
        self.begun = 0
        self.decision: str | None = None
        self.told: set[str] = set()

    def decide(self) -> None:
        """Store the decision to commit; called when all branches are prepared.

        Raises `.TornadoSAError` if `.Database.recover` has decided otherwise, and what was
        raised if nobody can tell what is stored. Then nothing is undone either.
        """
        if len(self.connections) == 1:
            self.decision = COMMIT  # one COMMIT is as good as a decision
            return
        try:
            self.decision = self.decisions.decide(self.gid, COMMIT)
        except BaseException as error:
            self._decide_again(error)
        if self.decision == ABORT:
            self._end(commit=False)
            raise TornadoSAError(
                f"The two-phase commit {self.gid} was rolled back in all databases: recover(), or"
                " somebody by hand, decided so while it was in doubt. Run the unit of work again."
            )

    def _decide_again(self, error: BaseException) -> None:
        """Find out what was decided, for the COMMIT of the decision failed.

        By another attempt, not by looking: the server may be about to store the first one.
        """
        passing = isinstance(error, Exception)  # not a cancellation
        try:
            self.decision = self.decisions.decide(self.gid, COMMIT if passing else ABORT)
        except BaseException:
            self.decision = _UNKNOWN
            for connection in self.connections:
                self._tell_in_doubt(_xid(connection), connection, error)
                _let_go(connection)
            raise error from None
        if not passing:
            self._end(commit=self.decision == COMMIT)
            raise error

    def _end(self, *, commit: bool) -> None:
        for connection in self.connections:
            self.end_branch(connection, commit=commit)

    def end_branch(self, connection: Connection, *, commit: bool) -> None:
        """Commit or roll back a branch outside of SQLAlchemy's own order of events."""
        xid = _xid(connection)
        if connection.closed or connection.invalidated:
            self._ended_elsewhere(connection, xid, commit=commit)
            return
        try:
            (connection.commit_prepared if commit else connection.rollback_prepared)(xid)
        except Exception as error:
            _let_go(connection)
            # A COMMIT has been tried elsewhere already. A ROLLBACK may have been done by recover().
            if not commit and not self._ended_elsewhere(connection, xid, commit=False):
                self._tell_in_doubt(xid, connection, error)
        finally:
            _let_go(connection)

    def commit_fails(self, connection: Connection, xid: str, error: BaseException) -> bool:
        """Try once more to commit a branch; True if it is committed now.

        A branch that is not must not be rolled back either, so its connection is given up.
        """
        _let_go(connection)
        # A single branch that is gone may have been rolled back, by recover().
        if len(self.connections) > 1 and self._ended_elsewhere(connection, xid, commit=True):
            return isinstance(error, Exception)  # else it is a cancellation, to be passed on
        self._tell_in_doubt(xid, connection, error)
        return False

    def _ended_elsewhere(self, connection: Connection, xid: str, *, commit: bool) -> bool:
        try:
            return end_elsewhere(connection.engine, xid, commit)
        except BaseException:  # what matters is the error that led here
            return False

    def _tell_in_doubt(self, xid: str, connection: Connection, error: BaseException) -> None:
        if xid in self.told:
            return
        self.told.add(xid)
        decision = self.decision if len(self.connections) > 1 else None
        text = (
            f"{xid} may be in doubt in {shown(connection.engine.url)}; decision: {decision}."
            " db.recover() ends it."
        )
        logger.error("%s %s", text, summary(error))
        error.add_note(text)


class TwoPhaseSession(Session):
    """A session whose transactions have ids of ours.

    SQLAlchemy asks the dialect for the id of each branch, which cannot see for whom. These two
    methods are called before it does.
    """

    _decisions: ClassVar[Decisions]

    def get_bind(self, *args: Any, **kwargs: Any) -> Any:
        _asking.set(weakref.ref(self))
        return super().get_bind(*args, **kwargs)

    def connection(self, *args: Any, **kwargs: Any) -> Any:
        _asking.set(weakref.ref(self))
        return super().connection(*args, **kwargs)


def two_phase_class(
    base: type[Session], engines: Sequence[Engine], decisions: Decisions
) -> type[Session]:
    """A class like ``base`` whose two-phase commits on ``engines`` survive a crash.

    Raises `.ConfigurationError` for a driver that has no two-phase commit.
    """
    for engine in engines:
        check_driver(engine)
    for engine in engines:
        _take_over(engine)
        for name, listener in _LISTENERS.items():
            if not event.contains(engine, name, listener):
                event.listen(engine, name, listener)
    bases = (TwoPhaseSession,) if base is Session else (TwoPhaseSession, base)
    made: type[Session] = type(base.__name__, bases, {"_decisions": decisions})
    event.listen(made, "after_begin", _joined)
    event.listen(made, "after_commit", _committed)
    return made


def check_driver(engine: Engine) -> None:
    """Raise `.ConfigurationError` for a driver that has no two-phase commit."""
    if engine.dialect.driver in _DRIVERS:
        return
    name = engine.url.drivername
    instead = _INSTEAD.get(engine.dialect.name)
    raise ConfigurationError(
        f"{name!r} has no two-phase commit. "
        + (f"Write {instead}." if instead else "PostgreSQL, MySQL and MariaDB have one.")
    )


def _take_over(engine: Engine) -> None:
    """Give sessions of ours ids of ours, and see their COMMIT through.

    On the dialect, because an event cannot choose an id, nor put up with an error. Whoever else
    begins a two-phase transaction on this engine has what SQLAlchemy does.
    """
    dialect, mark = engine.dialect, "_tornado_sa_two_phase"
    if hasattr(dialect, mark):
        return
    create_xid, do_commit = dialect.create_xid, dialect.do_commit_twophase

    def create_our_xid() -> Any:
        session = (_asking.get() or _NOBODY)()
        transaction = session.get_transaction() if session is not None else None
        # Not active while it connects. Else it is somebody else who begins, by hand.
        if session is None or transaction is None or transaction.is_active:
            return create_xid()
        unit = session.info.get(_UNIT)
        if unit is None or unit.transaction() is not transaction:
            unit = _Unit(cast(TwoPhaseSession, session)._decisions, transaction)
            session.info[_UNIT] = _units[unit.gid] = unit
        unit.begun += 1
        return f"{unit.gid}-{unit.begun}"

    def do_commit_twophase(connection: Connection, xid: Any, *args: Any, **kwargs: Any) -> None:
        try:
            do_commit(connection, xid, *args, **kwargs)
        except BaseException as error:
            unit = _unit_of(xid)
            if unit is None or unit.decision != COMMIT:
                raise
            if not unit.commit_fails(connection, xid, error):
                raise

    setattr(dialect, "create_xid", create_our_xid)  # noqa: B010  (a method, to mypy)
    setattr(dialect, "do_commit_twophase", do_commit_twophase)  # noqa: B010
    setattr(dialect, mark, True)


def _NOBODY() -> None:
    return None


# By global id: all that the events of a connection tell. The sessions keep their units alive.
_units: weakref.WeakValueDictionary[str, _Unit] = weakref.WeakValueDictionary()


def _unit_of(xid: object) -> _Unit | None:
    gid = gid_of(xid)
    return None if gid is None else _units.get(gid)


def _joined(session: Session, _transaction: SessionTransaction, connection: Connection) -> None:
    transaction = connection.get_transaction()
    if not session.twophase or not isinstance(transaction, TwoPhaseTransaction):
        return
    unit = session.info.get(_UNIT)
    if unit is None or gid_of(transaction.xid) != unit.gid:
        raise ConfigurationError(
            f"A two-phase commit with {shown(connection.engine.url)} would not survive a crash:"
            " it is not one of this database's `binds`."
        )
    if connection not in unit.connections:
        unit.connections.append(connection)


def _committed(session: Session) -> None:
    unit: _Unit | None = session.info.pop(_UNIT, None)
    if unit is not None and len(unit.connections) > 1 and not unit.told:
        unit.decisions.finished(unit.gid)


def _commit_begins(_connection: Connection, xid: Any, _is_prepared: bool) -> None:
    unit = _unit_of(xid)
    if unit is not None and unit.decision is None:
        unit.decide()


def _fails(context: ExceptionContext) -> None:
    """Have SQLAlchemy's error say what the driver's was given to say."""
    for note in getattr(context.original_exception, "__notes__", []):
        if context.sqlalchemy_exception is not None:
            context.sqlalchemy_exception.add_note(note)


def _rollback_begins(connection: Connection, xid: Any, _is_prepared: bool) -> None:
    """Commit where SQLAlchemy would roll back, because another branch failed to commit."""
    unit = _unit_of(xid)
    if unit is not None and unit.decision == COMMIT:
        unit.end_branch(connection, commit=True)


_LISTENERS: dict[str, Callable[..., Any]] = {
    "commit_twophase": _commit_begins,
    "rollback_twophase": _rollback_begins,
    "handle_error": _fails,
}


def _xid(connection: Connection) -> str:
    return str(cast(TwoPhaseTransaction, connection.get_transaction()).xid)


def _let_go(connection: Connection) -> None:
    """Take ``connection`` out of use. It is in a state in which SQLAlchemy would roll back."""
    if not connection.closed and not connection.invalidated:
        connection.invalidate()
