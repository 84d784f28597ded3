"""The outer transaction of an isolated database: what is said to each kind of server.

A session that "commits" in it releases a savepoint. What a server does at COMMIT has to be asked
for, and what ends the outer transaction behind our back has to be noticed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from sqlalchemy import Connection, Engine, NestedTransaction, event
from sqlalchemy.exc import IntegrityError

from tornado_sa.errors import TornadoSAError
from tornado_sa.holds import forget_hold

#: The execution option that marks statements of ours; `count_queries` leaves them out.
OURS = "tornado_sa_isolation"

#: What begins and ends transactions.
CONTROL = re.compile(
    r"\s*(BEGIN|START\s+TRANSACTION|COMMIT|ROLLBACK|SAVEPOINT|RELEASE|SET\s+TRANSACTION)\b", re.I
)

# SET CONSTRAINTS has no "as declared", so those that were deferred are named.
_DEFER_AGAIN = """\
DO $$ DECLARE names text; BEGIN
  SELECT string_agg(DISTINCT quote_ident(nspname) || '.' || quote_ident(conname), ', ') INTO names
  FROM pg_constraint JOIN pg_namespace ON pg_namespace.oid = connamespace WHERE condeferred;
  IF names IS NOT NULL THEN EXECUTE 'SET CONSTRAINTS ' || names || ' DEFERRED'; END IF;
END $$"""

# https://sqlite.org/rescode.html#constraint_foreignkey
_SQLITE_FOREIGN_KEY = 787, "SQLITE_CONSTRAINT_FOREIGNKEY"


class Outer:
    """A connection in a transaction that is rolled back at the end.

    Made for one engine, by `make_outer`. The methods are for a server that needs nothing special.
    """

    def __init__(self, engine: Engine) -> None:
        self.connection: Connection = engine.connect()
        self._root: NestedTransaction | None = None
        self._options: dict[str, Any] = {}
        self._is_resetting = False
        forget_hold(self.connection)
        try:
            self._leave_autocommit()
            event.listen(self.connection, "release_savepoint", self._releases)
            event.listen(self.connection, "set_connection_execution_options", self._keeps)
            self._transaction = self.connection.begin()
            self._begin()
        except BaseException:
            self.connection.invalidate()
            self.connection.close()
            raise

    # -- what a server needs -------------------------------------------------

    def _leave_autocommit(self) -> None:
        """Called before the outer transaction, for an engine in autocommit mode."""

    def _begin(self) -> None:
        """Called in the outer transaction, which some drivers have not begun yet."""

    def _check_commit(self) -> None:
        """Raise what a COMMIT would raise now."""

    def read_only(self) -> bool:
        """Keep the savepoint that was just made from writing; False if the server cannot."""
        return False

    def read_again(self) -> None:
        """Called at the end of a unit of work that only read."""

    def _is_open(self) -> bool:
        """False if the driver knows that the server has ended the outer transaction."""
        return True

    # -- what all have in common ---------------------------------------------

    def check(self) -> None:
        """Raise `.TornadoSAError` if the outer transaction is lost."""
        connection = self.connection
        if connection.closed or connection.invalidated or not self._transaction.is_active:
            why = "its connection was lost"
        elif not self._is_open():
            why = (
                "something else has ended it: a statement that commits by itself, such as DDL on"
                " MariaDB; a deadlock there; or, in memory, somebody who used db.engine"
            )
        else:
            return
        raise TornadoSAError(
            f"The outer transaction of isolated() is gone, because {why}. With it went what was"
            " committed in it. Test this without isolated()."
        )

    def unit_begins(self) -> None:
        """Called when a session has begun: the last savepoint is its transaction."""
        self._root = self.connection.get_nested_transaction()

    def unit_ended(self) -> None:
        """Called when its transaction is over: forget what it has left on the connection."""
        while (nested := self.connection.get_nested_transaction()) is not None:
            nested.close()
        if self._options and not self.connection.closed:
            options, self._options = self._options, {}
            self._is_resetting = True
            try:
                self.connection.execution_options(**options)
            finally:
                self._is_resetting = False

    def end(self) -> None:
        """Roll back, and give the connection back."""
        try:
            if self._transaction.is_active and not self.connection.invalidated:
                self._transaction.rollback()
        except BaseException:
            self.connection.invalidate()
            raise
        finally:
            self.connection.close()

    def abandon(self) -> None:
        """Forget the connection of an async driver, whose event loop is no more."""
        self.connection.detach()  # from the pool, which would try to talk to the server

    def _say(self, statement: str) -> Any:
        return self.connection.exec_driver_sql(statement, execution_options={OURS: True})

    @property
    def _driver(self) -> Any:
        return self.connection.connection.driver_connection

    def _releases(self, connection: Connection, name: str, _context: object) -> None:
        if connection.get_nested_transaction() is self._root:
            try:
                self._check_commit()
            except BaseException:
                # As after a COMMIT that failed, nothing is left of the work; SQLAlchemy takes a
                # savepoint whose RELEASE failed for gone.
                connection.dialect.do_rollback_to_savepoint(connection, name)
                raise

    def _keeps(self, connection: Connection, options: dict[str, Any]) -> None:
        """A level cannot be set in a transaction; all else is the unit's, not the next one's."""
        if self._is_resetting:
            return
        options.pop("isolation_level", None)
        before = connection.get_execution_options()
        for name in options:
            self._options.setdefault(name, before.get(name))


class _PostgreSQL(Outer):
    def _leave_autocommit(self) -> None:
        if getattr(self.connection.connection.dbapi_connection, "autocommit", None) is True:
            self.connection.execution_options(isolation_level="READ COMMITTED")

    def _check_commit(self) -> None:
        self._say("SET CONSTRAINTS ALL IMMEDIATE")
        self._say(_DEFER_AGAIN)

    def read_only(self) -> bool:
        # Its end is that of the savepoint: PostgreSQL puts back what was before.
        self._say("SET TRANSACTION READ ONLY")
        return True


class _SQLite(Outer):
    def _begin(self) -> None:
        # Python's driver begins before INSERT and the like, but not before SAVEPOINT, which would
        # then be the transaction itself: its RELEASE a COMMIT.
        if not self._driver.in_transaction:
            self._say("BEGIN")
        self._checks = bool(self._say("PRAGMA foreign_keys").scalar())
        self._before = self._violations()
        self._changes = self._driver.total_changes

    def _violations(self) -> set[tuple[Any, ...]]:
        if not self._checks:
            return set()
        return {tuple(row) for row in self._say("PRAGMA foreign_key_check")}

    def _check_commit(self) -> None:
        changes, self._changes = self._changes, self._driver.total_changes
        if changes == self._changes or self._violations() <= self._before:
            return
        error: Any = self.connection.dialect.loaded_dbapi.IntegrityError(
            "FOREIGN KEY constraint failed"
        )
        error.sqlite_errorcode, error.sqlite_errorname = _SQLITE_FOREIGN_KEY
        raise IntegrityError(None, None, error) from error

    def _is_open(self) -> bool:
        return bool(self._driver.in_transaction)

    def abandon(self) -> None:
        self.end()  # aiosqlite has a thread instead of a loop, which has to be told to end


class _SQLiteFile(_SQLite):
    def read_only(self) -> bool:
        self._say("PRAGMA query_only = ON")
        return True

    def read_again(self) -> None:
        self._say("PRAGMA query_only = OFF")


class _MySQL(Outer):
    def _begin(self) -> None:
        self._say("BEGIN")  # else it begins with the first table that is read

    def _is_open(self) -> bool:
        return bool(getattr(self._driver, "server_status", 1) & 1)  # SERVER_STATUS_IN_TRANS

    def abandon(self) -> None:
        with suppress(RuntimeError):  # its loop is closed; a second time, by __del__, it is silent
            self._driver.close()
        super().abandon()


_KINDS: dict[str, Callable[[Engine], Outer]] = {
    "postgresql": _PostgreSQL,
    "mysql": _MySQL,
    "mariadb": _MySQL,
}


def make_outer(engine: Engine, in_memory: bool) -> Outer:
    """Connect to ``engine`` and begin the outer transaction."""
    if engine.dialect.name == "sqlite":
        return _SQLite(engine) if in_memory else _SQLiteFile(engine)
    return _KINDS.get(engine.dialect.name, Outer)(engine)
