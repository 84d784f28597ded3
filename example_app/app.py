"""The application: from a database to something that answers requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import event, false, make_url, update
from sqlalchemy.exc import ArgumentError
from sqlalchemy.orm import Session
from tornado.web import Application

from example_app.handlers import (
    AccountHandler,
    AccountsHandler,
    IndexHandler,
    NotFoundHandler,
    TransferHandler,
    TransfersHandler,
)
from example_app.models import Account, Base
from tornado_sa import AsyncDatabase, Database


def make_app(db: Database | AsyncDatabase, debug: bool = False) -> Application:
    """Make the ledger's application on ``db``, which is for the caller to dispose of."""
    return Application(
        [
            (r"/", IndexHandler),
            (r"/accounts", AccountsHandler),
            (r"/accounts/([0-9]+)", AccountHandler),
            (r"/transfers", TransfersHandler),
            (r"/transfers/([0-9]+)", TransferHandler),
        ],
        db=db,
        debug=debug,
        autoreload=False,  # it would start the process anew in the middle of a request
        default_handler_class=NotFoundHandler,
        template_path=str(Path(__file__).parent / "templates"),
    )


def open_database(url: str) -> Database | AsyncDatabase:
    """The database at ``url``, not connected yet. Raises `.ConfigurationError`.

    An `.AsyncDatabase` if the URL names an async driver. The handlers are the
    same for both; on an `.AsyncDatabase` their queries do not block the event loop.
    """
    db = AsyncDatabase(url) if _is_async(url) else Database(url)
    engine = db.engine.sync_engine if isinstance(db, AsyncDatabase) else db.engine
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _set_up_sqlite)
    return db


async def create_schema(db: Database | AsyncDatabase) -> None:
    """Create the tables that are missing. Raises if ``db`` cannot be reached, or written to."""
    # The ping first, because it gives up after some seconds; a driver may try for minutes.
    if isinstance(db, AsyncDatabase):
        await db.ping()
        async with db.begin("start"):
            await db.run_sync(_create_tables)
    else:
        db.ping()
        with db.begin("start") as session:
            _create_tables(session)


def _create_tables(session: Session) -> None:
    Base.metadata.create_all(session.connection())
    # Changes no row, and takes the right to change one: a file or a server that can only be
    # read is found out now and not by the first client.
    session.execute(update(Account).where(false()).values(balance=0))


def _is_async(url: str) -> bool:
    try:
        return make_url(url).get_dialect().is_async
    except (ArgumentError, ValueError):
        return False  # `Database` says what is wrong with the URL


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    try:
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.execute("PRAGMA journal_mode = WAL")  # readers and the writer need not wait
    except Exception:
        connection.close()  # SQLAlchemy would not, and a thread of aiosqlite's would run for ever
        raise
    cursor.close()
