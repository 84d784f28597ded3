"""The pool of an in-memory SQLite database: one connection, shared by everybody."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry, Pool


class SharedPool(Pool):
    """One connection for everybody: what an in-memory SQLite database is.

    SQLAlchemy's ``StaticPool`` hands out one *record* to several users at once,
    warns of a "double checkin" when they give it back, and cannot tell how many
    hold it. Here each user gets a record of its own around the same connection,
    and the connection stays open until `dispose`: with it goes the database.
    """

    def __init__(self, creator: Callable[..., DBAPIConnection], **options: Any) -> None:
        self._connect = creator
        self._shared: dict[str, DBAPIConnection] = {}
        self._idle: list[ConnectionPoolEntry] = []
        self._out = 0
        # The cast: mypy compares a creator that takes a record with one that takes nothing.
        super().__init__(cast("Any", self._share), **options)

    def _share(self, record: ConnectionPoolEntry) -> DBAPIConnection:
        if not self._shared:
            connection = self._connect(record)  # several may, at the same time; the first one wins
            if self._shared.setdefault("connection", connection) is not connection:
                super()._close_connection(connection)
        return self._shared["connection"]

    def _do_get(self) -> ConnectionPoolEntry:
        record = self._idle.pop() if self._idle else self._create_connection()
        self._out += 1
        return record

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        self._out -= 1
        self._idle.append(record)

    def _close_connection(self, connection: DBAPIConnection, *, terminate: bool = False) -> None:
        """Keep it: an invalidated session must not take everybody's database away."""

    def size(self) -> int:
        """Number of connections: always one."""
        return 1

    def checkedout(self) -> int:
        """Number of users that hold the connection now."""
        return self._out

    def overflow(self) -> int:
        """Number of connections beyond `size`: always none."""
        return 0

    def status(self) -> str:
        """One line that describes the pool, for logs."""
        return f"One shared connection, held by {self._out}"

    def recreate(self) -> SharedPool:
        """Make an empty pool with the same settings."""
        return type(self)(
            self._connect,
            recycle=self._recycle,
            echo=self.echo,
            logging_name=self._orig_logging_name,
            reset_on_return=self._reset_on_return,
            pre_ping=self._pre_ping,
            _dispatch=self.dispatch,
            dialect=self._dialect,
        )

    def dispose(self) -> None:
        """Close the connection, and so lose the database."""
        self._idle.clear()
        if self._shared:
            super()._close_connection(self._shared.pop("connection"))
