"""The database: from a URL to a `.Database` or `.AsyncDatabase` that suits the ledger."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy import Connection, event, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.orm import Session

from tornado_sa import AsyncDatabase, Database

P = ParamSpec("P")
T = TypeVar("T")

AnyDatabase = Database | AsyncDatabase


def open_database(url: str, debug: bool = False) -> AnyDatabase:
    """The database at ``url``, not connected yet. Raises `.ConfigurationError`.

    An `.AsyncDatabase` if the URL names an async driver. The handlers are the
    same for both; on an `.AsyncDatabase` their queries do not block the event loop.
    """
    db = AsyncDatabase(url, debug=debug) if _is_async(url) else Database(url, debug=debug)
    engine = db.engine.sync_engine if isinstance(db, AsyncDatabase) else db.engine
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _set_up_sqlite)
        if not in_memory(url):
            event.listen(engine, "connect", _leave_begin_to_us)
            event.listen(engine, "begin", _begin_with_the_write_lock)
    return db


def in_memory(url: str) -> bool:
    """True for an SQLite database that lives in this process only."""
    parsed = make_url(url)
    return parsed.get_backend_name() == "sqlite" and (
        parsed.database in (None, "", ":memory:")
        or "mode=memory" in parsed.render_as_string()
        or ":memory:" in str(parsed.database)
    )


async def dispose(db: AnyDatabase) -> None:
    """Close the connections, after what is still being closed."""
    if isinstance(db, AsyncDatabase):
        await db.dispose()
    else:
        db.dispose()


async def read(
    db: AnyDatabase,
    label: str,
    function: Callable[Concatenate[Session, P], T],
    *args: P.args,
    **kwargs: P.kwargs,
) -> T:
    """Call ``function(session, *args)`` in a unit of work that only reads."""
    if isinstance(db, AsyncDatabase):
        async with db.scope(label, read_only=True):
            return await db.run_sync(function, *args, **kwargs)
    with db.scope(label, read_only=True) as session:
        return function(session, *args, **kwargs)


async def write(
    db: AnyDatabase,
    label: str,
    function: Callable[Concatenate[Session, P], T],
    *args: P.args,
    **kwargs: P.kwargs,
) -> T:
    """Call ``function(session, *args)`` in a unit of work that is committed."""
    if isinstance(db, AsyncDatabase):
        async with db.begin(label):
            return await db.run_sync(function, *args, **kwargs)
    with db.begin(label) as session:
        return function(session, *args, **kwargs)


def _is_async(url: str) -> bool:
    try:
        return make_url(url).get_dialect().is_async
    except (ArgumentError, ValueError):
        return False  # `Database` says what is wrong with the URL


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    try:
        cursor.execute("PRAGMA foreign_keys = ON")
        _let_readers_go_on(cursor)
    except Exception:
        connection.close()  # SQLAlchemy would not, and a thread of aiosqlite's would run for ever
        raise
    cursor.close()


def _let_readers_go_on(cursor: Any) -> None:
    """Readers and the writer need not wait for each other: the file is told once, for ever."""
    try:
        cursor.execute("PRAGMA journal_mode = WAL")
    except sqlite3.OperationalError as error:
        # Another process uses the file at this moment. A later connection will tell it.
        if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
            raise


def _leave_begin_to_us(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # Python's driver would begin by itself, and too late


def _begin_with_the_write_lock(connection: Connection) -> None:
    """What only reads uses the reader. All else writes, and so asks for SQLite's one lock first.

    Asked for at the first write, it can be too late: what the unit of work has
    read until then may have changed, and SQLite refuses instead of waiting.
    """
    connection.exec_driver_sql("BEGIN IMMEDIATE")
