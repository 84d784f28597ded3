"""The schema: brought up to date by Alembic when the ledger starts."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, false, inspect, text, update

from example_app.database import AnyDatabase
from example_app.models import Account
from tornado_sa import AsyncDatabase

logger = logging.getLogger("example_app")

# Any number will do that no other application on the same server takes.
_ADVISORY_LOCK = 0x1ED6E5

# How long a server that starts waits for another that starts too, in seconds.
_PATIENCE = 60

# What the first version of the ledger made by itself, without Alembic.
_FIRST_REVISION = "0001"
_FIRST_TABLES = {
    "account": {"id", "owner", "currency", "balance"},
    "transfer": {"id", "from_id", "to_id", "amount", "memo", "created_at"},
}


class SchemaError(Exception):
    """The database is not one that this version of the ledger can work with."""


async def create_schema(db: AnyDatabase) -> None:
    """Create or upgrade the tables of ``db``.

    Any number of servers may call it at the same time. Raises `SchemaError`
    for a database that is newer than this code, and what the driver raises if
    it cannot be reached, or written to.
    """
    # The ping first, because it gives up after some seconds; a driver may try for minutes.
    if isinstance(db, AsyncDatabase):
        await db.ping()
        async with db.engine.connect() as connection:
            await connection.run_sync(upgrade)
    else:
        db.ping()
        with db.engine.connect() as plain:
            upgrade(plain)


def upgrade(connection: Connection) -> None:
    """Bring the schema up to date over ``connection``."""
    with _alone(connection):
        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        config.attributes["connection"] = connection
        scripts = ScriptDirectory.from_config(config)
        known = {script.revision for script in scripts.walk_revisions()}
        current = _revision(connection)
        if current is not None and current not in known:
            raise SchemaError(
                f"its schema is {current!r}, which this version of the ledger does not know;"
                " it was made by a newer one. Start that one."
            )
        head = scripts.get_current_head()
        if current is None and _is_of_the_first_version(connection):
            command.stamp(config, _FIRST_REVISION)
        if current != head:
            command.upgrade(config, "head")
            logger.info("Schema %s, was %s", head, current or "none")
        # Changes no row, and takes the right to change one: a file or a server that can only be
        # read is found out now and not by the first client.
        connection.execute(update(Account).where(false()).values(balance=0))


def _revision(connection: Connection) -> str | None:
    revision = MigrationContext.configure(connection).get_current_revision()
    return None if revision is None else str(revision)


def _is_of_the_first_version(connection: Connection) -> bool:
    inspector = inspect(connection)
    found = [name for name in _FIRST_TABLES if inspector.has_table(name)]
    for name in found:
        columns = {column["name"] for column in inspector.get_columns(name)}
        if columns != _FIRST_TABLES[name]:
            raise SchemaError(f"it has a table {name!r} that is not of this ledger's making.")
    if found and len(found) < len(_FIRST_TABLES):
        raise SchemaError(f"of the ledger's tables it has only {found[0]!r}.")
    return bool(found)


@contextmanager
def _alone(connection: Connection) -> Iterator[None]:
    """One transaction, during which no other server upgrades the same database."""
    backend = connection.dialect.name
    if backend == "sqlite":
        # A table is changed by making it anew, and references to it must not mind. Said before the
        # transaction, in which it would do nothing.
        _tell_sqlite(connection, "PRAGMA foreign_keys = OFF")
        try:
            with connection.begin():  # takes the lock of the whole file
                yield
        finally:
            _tell_sqlite(connection, "PRAGMA foreign_keys = ON")
    elif backend == "postgresql":
        with connection.begin():
            connection.execute(text("SELECT pg_advisory_xact_lock(:id)"), {"id": _ADVISORY_LOCK})
            yield
    else:  # MariaDB: its DDL is in no transaction, so the lock is the session's
        name = f"ledger {connection.engine.url.database}"[:64]
        with connection.begin():
            got = connection.scalar(
                text("SELECT GET_LOCK(:name, :patience)"), {"name": name, "patience": _PATIENCE}
            )
            if not got:
                raise SchemaError(f"another server has been upgrading it for {_PATIENCE} s.")
            try:
                yield
            finally:
                connection.execute(text("SELECT RELEASE_LOCK(:name)"), {"name": name})


def _tell_sqlite(connection: Connection, pragma: str) -> None:
    cursor = connection.connection.cursor()
    cursor.execute(pragma)
    cursor.close()
