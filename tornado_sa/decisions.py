"""The decisions of two-phase commits: a small table in the first database."""

from __future__ import annotations

import re
import threading
import uuid
from contextlib import suppress
from datetime import timedelta

from sqlalchemy import Column, DateTime, Engine, MetaData, String, Table, func, inspect, select
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.schema import CreateTable

from tornado_sa.engine import copy_of, shown
from tornado_sa.errors import ConfigurationError
from tornado_sa.responses import summary

COMMIT = "commit"
ABORT = "abort"

TABLE = Table(
    "tornado_sa_decision",
    MetaData(),
    Column("xid", String(64), primary_key=True),
    Column("decision", String(64), nullable=False),
    Column("decided_at", DateTime(timezone=True), server_default=func.now(), nullable=False),
    mysql_engine="InnoDB",
    mariadb_engine="InnoDB",
)

# The row that names the table itself. Its name is part of every id, because a server is shared: a
# transaction that another table decides must not be undone for want of a row in this one.
_REALM = "realm"

# `tornado_sa-<realm>-<transaction>`, and for its branches `-<number>`. At most 64 bytes, or
# MariaDB refuses it; and not of the form 1_x_y, which psycopg takes apart.
_ID = re.compile(r"(tornado_sa-([0-9a-f]{12})-[0-9a-f]{32})(?:-\d+)?")

# Committed units whose rows are deleted together.
_MANY = 100
# An `abort` must outlive the process that it stops, and a `commit` the server that is down.
_KEPT = timedelta(days=30)


def gid_of(xid: object) -> str | None:
    """The global id that the branch ``xid`` belongs to, or None if it is none of ours."""
    found = _ID.fullmatch(xid) if isinstance(xid, str) else None
    return found[1] if found else None


def realm_of(gid: str) -> str:
    """The name of the table that decides ``gid``."""
    found = _ID.fullmatch(gid)
    assert found is not None
    return found[2]


class Decisions:
    """The table, by way of connections of its own.

    Of its own, because a unit of work that asks for a decision holds a
    connection of the pool already: when all of them do, none can go on.
    """

    def __init__(self, engine: Engine) -> None:
        #: The first database.
        self.first = engine
        self._engine: Engine | None = None
        self._lock = threading.Lock()
        self._realm: str | None = None
        self._finished: list[str] = []

    @property
    def engine(self) -> Engine:
        with self._lock:  # two threads must not make one each
            if self._engine is None:
                self._engine = copy_of(self.first)
            return self._engine

    def new_gid(self) -> str:
        """A new global id. Makes the table when it is needed for the first time.

        Raises `.ConfigurationError` if the table cannot be made.
        """
        if self._realm is None:
            self._realm = self.realm() or self._make()
        return f"tornado_sa-{self._realm}-{uuid.uuid4().hex}"

    def realm(self) -> str | None:
        """The name of the table, or None if there is no table."""
        if self._realm is not None:
            return self._realm
        with self.engine.connect() as connection:
            if not inspect(connection).has_table(TABLE.name):
                return None
            query = select(TABLE.c.decision).where(TABLE.c.xid == _REALM)
            realm: str | None = connection.scalar(query)
            return realm

    def _make(self) -> str:
        failure: DBAPIError | None = None
        # Another process may be doing the same, and be half-way through.
        for _ in range(3):
            try:
                with self.engine.begin() as connection:
                    TABLE.create(connection, checkfirst=True)
                with self.engine.begin() as connection:
                    values = {"xid": _REALM, "decision": uuid.uuid4().hex[:12]}
                    connection.execute(TABLE.insert().values(values))
            except DBAPIError as error:
                if error.connection_invalidated:
                    raise
                failure = error
            realm = self.realm()
            if realm is not None:
                return realm
        assert failure is not None
        ddl = " ".join(str(CreateTable(TABLE).compile(self.engine)).split())
        raise ConfigurationError(
            f"Two-phase commit keeps its decisions in a table of {shown(self.first.url)} that this"
            f" user cannot make or write to ({summary(failure)}). Execute, as a user who may:"
            f" {ddl}; and grant SELECT, INSERT and DELETE on it."
        ) from failure

    def decide(self, gid: str, decision: str) -> str:
        """Decide on ``gid``, unless somebody has; return the decision that holds."""
        while True:
            try:
                with self.engine.begin() as connection:
                    connection.execute(TABLE.insert().values(xid=gid, decision=decision))
                return decision
            except IntegrityError:
                found = self.find(gid)
                if found is not None:
                    return found

    def find(self, gid: str) -> str | None:
        """The decision on ``gid``, if there is one."""
        query = select(TABLE.c.decision).where(TABLE.c.xid == gid)
        with self.engine.connect() as connection:
            found: str | None = connection.scalar(query)
            return found

    def finished(self, gid: str) -> None:
        """Note that every branch of ``gid`` has been committed: its row is not needed any more.

        Should somebody decide on it again, there is nothing left that could be undone. Never
        raises.
        """
        self._finished.append(gid)
        if len(self._finished) >= _MANY:
            self._forget_finished()

    def _forget_finished(self) -> None:
        finished, self._finished = self._finished, []
        if finished:
            with suppress(Exception), self.engine.begin() as connection:  # they grow old, then
                connection.execute(TABLE.delete().where(TABLE.c.xid.in_(finished)))

    def forget_old(self) -> None:
        """Delete the rows of processes that crashed, once nobody can need them."""
        with self.engine.begin() as connection:
            limit = connection.execute(select(func.now())).scalar_one() - _KEPT
            old = (TABLE.c.decided_at < limit) & (TABLE.c.xid != _REALM)
            connection.execute(TABLE.delete().where(old))

    def dispose(self) -> None:
        """Delete what is not needed any more, and close the connections."""
        self._forget_finished()
        if self._engine is not None:
            self._engine.dispose()

    def engines(self) -> list[Engine]:
        """The engine, if it is made already."""
        return [] if self._engine is None else [self._engine]

    def after_fork(self) -> None:
        """Leave to the parent what it has finished."""
        self._finished = []
        self._lock = threading.Lock()
