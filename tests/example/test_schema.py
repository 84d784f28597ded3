"""The schema: made, upgraded, refused; by any number of servers at the same time."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine, create_engine, inspect, make_url, text

from example_app.models import Base
from example_app.schema import upgrade
from tests.example.support import Server, off_the_books, refused, serving
from tornado_sa import Database

# What the first version made of its models, by itself.
FIRST_VERSION = [
    "CREATE TABLE account (id {id}, owner VARCHAR(100) NOT NULL, currency VARCHAR(3) NOT NULL,"
    " balance BIGINT NOT NULL,"
    " CONSTRAINT account_balance_not_negative CHECK (balance >= 0))",
    "CREATE TABLE transfer (id {id}, from_id BIGINT NOT NULL REFERENCES account (id),"
    " to_id BIGINT NOT NULL REFERENCES account (id), amount BIGINT NOT NULL,"
    " memo VARCHAR(200) NOT NULL, created_at {time} NOT NULL,"
    " CONSTRAINT transfer_amount_positive CHECK (amount > 0))",
    "CREATE INDEX ix_transfer_from_id ON transfer (from_id)",
    "CREATE INDEX ix_transfer_to_id ON transfer (to_id)",
    "INSERT INTO account (owner, currency, balance) VALUES ('Ada', 'EUR', 70), ('Bob', 'EUR', 35)",
    "INSERT INTO transfer (from_id, to_id, amount, memo, created_at) VALUES"
    " (1, 2, 50, 'lunch', '2026-03-01 12:00:00'), (2, 1, 20, 'change', '2026-03-01 13:00:00')",
]


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """For the database, which is empty."""
    driver = "sqlite" if "sqlite" in database_url else "postgresql+psycopg"
    engine = create_engine(make_url(database_url).set(drivername=driver))
    yield engine
    engine.dispose()


sync_drivers = pytest.mark.parametrize("database_url", ["sqlite", "psycopg"], indirect=True)


def make_first_version(engine: Engine) -> None:
    kinds = {"id": "BIGSERIAL PRIMARY KEY", "time": "TIMESTAMP WITH TIME ZONE"}
    if engine.dialect.name == "sqlite":
        kinds = {"id": "INTEGER NOT NULL PRIMARY KEY", "time": "DATETIME"}
    with engine.begin() as connection:
        for statement in FIRST_VERSION:
            connection.execute(text(statement.format(**kinds)))


@sync_drivers
def test_the_migrations_make_what_the_models_say(ledger: Database) -> None:
    with ledger.engine.connect() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, Base.metadata) == []
        checks = {check["name"] for check in inspect(connection).get_check_constraints("account")}
    assert checks == {"account_within_limit"}


@pytest.mark.parametrize("database_url", ["sqlite", "asyncpg"], indirect=True)
def test_a_database_of_the_first_version_is_upgraded(
    tmp_path: Path, engine: Engine, database_url: str
) -> None:
    """With what is in it. What no transfer accounts for was there when the account was opened."""
    make_first_version(engine)
    with serving(tmp_path, "--database-url", database_url) as server:
        accounts = server.get("/accounts")["accounts"]
        assert [(account["balance"], account["limit"]) for account in accounts] == [
            (70, 0),
            (35, 0),
        ]
        assert [one["memo"] for one in server.get("/transfers")["transfers"]] == ["change", "lunch"]
        assert server.post("/transfers", {"from": 1, "to": 2, "amount": 70}) == 201
        overdraft = {"owner": "Cyd", "currency": "EUR", "limit": -10}
        assert server.post("/accounts", overdraft) == 201
        assert server.post("/transfers", {"from": 3, "to": 2, "amount": 10}) == 201
        assert server.end() == 0
    ledger = Database(engine)
    with ledger.scope() as session:
        assert off_the_books(session) == []


@sync_drivers
def test_an_upgrade_that_is_not_needed_changes_nothing(engine: Engine) -> None:
    found = []
    for _ in range(2):
        with engine.connect() as connection:
            upgrade(connection)
        with engine.connect() as connection:
            found.append(sorted(inspect(connection).get_table_names()))
    assert found[0] == found[1]


@sync_drivers
def test_a_database_of_a_newer_version_is_refused(
    tmp_path: Path, ledger: Database, database_url: str
) -> None:
    with ledger.begin() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '0999'"))
    said = refused(tmp_path, "--database-url", database_url)
    assert "'0999'" in said and "newer" in said
    assert "'0999'" in refused(tmp_path, "--processes", "2", "--database-url", database_url)


@sync_drivers
@pytest.mark.parametrize("tables", [["account (x INTEGER)"], ["transfer (id INTEGER)"]])
def test_the_tables_of_somebody_else_are_left_alone(
    tmp_path: Path, engine: Engine, database_url: str, tables: list[str]
) -> None:
    with engine.begin() as connection:
        for table in tables:
            connection.execute(text(f"CREATE TABLE {table}"))
    assert "not of this ledger's making" in refused(tmp_path, "--database-url", database_url)
    with engine.connect() as connection:
        assert len(inspect(connection).get_table_names()) == 1


@pytest.mark.parametrize("database_url", ["aiosqlite", "psycopg"], indirect=True)
def test_servers_may_start_at_the_same_time(tmp_path: Path, database_url: str) -> None:
    """One of them makes the tables, the others wait for it."""
    with ExitStack() as stack, ThreadPoolExecutor(4) as pool:

        def start(_: int) -> Server:
            return stack.enter_context(serving(tmp_path, "--database-url", database_url))

        servers = list(pool.map(start, range(4)))
        assert [server.end() for server in servers] == [0] * 4
    made = [server.log.read_text().count("Schema 0002") for server in servers]
    assert sorted(made) == [0, 0, 0, 1]
