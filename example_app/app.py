"""The application: from a database to something that answers requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import event, false, update
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
from tornado_sa import Database


def make_app(db: Database, debug: bool = False) -> Application:
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


def open_database(url: str) -> Database:
    """The database at ``url``, not connected yet. Raises `.ConfigurationError`."""
    db = Database(url)
    if db.engine.dialect.name == "sqlite":
        event.listen(db.engine, "connect", _set_up_sqlite)
    return db


def create_schema(db: Database) -> None:
    """Create the tables that are missing. Raises if ``db`` cannot be reached, or written to."""
    db.ping()  # first, because it gives up after some seconds; a driver may try for minutes
    Base.metadata.create_all(db.engine)
    with db.begin("start") as session:
        # Changes no row, and takes the right to change one: a file or a server that can only be
        # read is found out now and not by the first client.
        session.execute(update(Account).where(false()).values(balance=0))


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA journal_mode = WAL")  # readers and the writer need not wait
    cursor.close()
