"""The pool of an in-memory SQLite database: one connection, shared by everybody."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from sqlalchemy import Dialect
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry, Pool

from tornado_sa.home import Home


class SharedPool(Pool):
    """One connection for everybody: what an in-memory SQLite database is.

    SQLAlchemy's ``StaticPool`` hands out one *record* to several users at once,
    warns of a "double checkin" when they give it back, and cannot tell how many
    hold it. Here each user gets a record of its own around the same connection,
    and the connection stays open until `dispose`: with it goes the database.
    """

    def __init__(self, creator: Callable[..., DBAPIConnection], **options: Any) -> None:
        self._shared: dict[str, DBAPIConnection] = {}
        self._idle: list[ConnectionPoolEntry] = []
        self._out = 0
        self._home = Home()
        super().__init__(cast("Any", creator), **options)

    def _do_get(self) -> ConnectionPoolEntry:
        if cast("Dialect", self._dialect).is_async and not self._home.is_here():
            self._move()
        # A new record connects, and is set up, by itself: on the shared connection somebody may be
        # at work, and SQLite refuses to define functions meanwhile. Then it gets the shared one;
        # the first to come here has made it.
        record = self._idle.pop() if self._idle else self._create_connection()
        mine = record.dbapi_connection
        if mine is None:  # invalidated
            shared = self._shared["connection"]
        else:
            shared = self._shared.setdefault("connection", mine)
            if shared is not mine:
                super()._close_connection(mine)
        cast("Any", record).dbapi_connection = shared
        self._out += 1
        return record

    def _move(self) -> None:
        self._home.move(is_empty=not self._shared)
        for connection in self._shared.values():
            # Private, and new in SQLAlchemy 2.1: where the tasks of a closed loop stood in line.
            if hasattr(connection, "_execute_mutex"):
                connection._execute_mutex = asyncio.Lock()

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
            self._creator,
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
