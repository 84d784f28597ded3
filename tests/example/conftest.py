"""Fixtures of the tests of the example application: its database, over four drivers, and itself."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import create_engine, make_url
from tornado.httpclient import AsyncHTTPClient
from tornado.ioloop import IOLoop
from tornado.web import Application

from example_app.app import make_app, open_database
from example_app.database import AnyDatabase
from example_app.schema import upgrade
from tests.conftest import POSTGRESQL_URL, no_connection_thread
from tests.example.support import Books, checked_out
from tests.support import DRIVERS, missing, settle, until
from tornado_sa import AsyncDatabase, Database

DATABASES = ["sqlite", "psycopg", "aiosqlite", "asyncpg"]


@pytest.fixture(scope="session")
def sqlite_ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the ledger's tables, to be copied."""
    path = tmp_path_factory.mktemp("ledger") / "ledger.db"
    make_tables(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def postgresql_ledger() -> Iterator[str]:
    """A database with the ledger's tables, of this run's own. No test leaves anything in it."""
    with own_postgresql() as url:
        make_tables(url)
        yield url


@pytest.fixture
def fresh_postgresql() -> Iterator[str]:
    """A database with the ledger's tables, of this test's own."""
    with own_postgresql() as url:
        make_tables(url)
        yield url


def make_tables(url: str) -> None:
    engine = create_engine(url)
    with engine.connect() as connection:
        upgrade(connection)
    engine.dispose()


class own_postgresql:
    """A fresh database on the server, for as long as the ``with`` statement."""

    def __enter__(self) -> str:
        self.name = f"ledger_{uuid.uuid4().hex[:12]}"
        try:
            self.server = psycopg.connect(POSTGRESQL_URL, autocommit=True)
        except psycopg.OperationalError as error:
            missing("postgresql", error)
        self.server.execute(f"CREATE DATABASE {self.name}")
        url = make_url(POSTGRESQL_URL).set(drivername="postgresql+psycopg", database=self.name)
        return url.render_as_string(hide_password=False)

    def __exit__(self, *error: object) -> None:
        self.server.execute(f"DROP DATABASE {self.name} WITH (FORCE)")
        self.server.close()


@pytest.fixture(params=DATABASES)
def driver(request: pytest.FixtureRequest) -> str:
    """The driver of the application; narrowed down with ``@pytest.mark.parametrize``."""
    name: str = request.param
    return name


@pytest.fixture
def db(
    request: pytest.FixtureRequest, driver: str, tmp_path: Path, io_loop: IOLoop
) -> Iterator[AnyDatabase]:
    """The application's database, with empty tables. After the test nothing is out or open."""
    if "sqlite" in driver:
        shutil.copy(request.getfixturevalue("sqlite_ledger"), tmp_path / "ledger.db")
        url = make_url(f"{DRIVERS[driver]}:///{tmp_path / 'ledger.db'}")
    else:
        alone = "concurrent" in request.fixturenames
        given = request.getfixturevalue("fresh_postgresql" if alone else "postgresql_ledger")
        url = make_url(given).set(drivername=DRIVERS[driver])
    db = open_database(url.render_as_string(hide_password=False))
    yield db

    async def end() -> None:
        if isinstance(db, AsyncDatabase):  # its closings may take a moment
            await until(lambda: checked_out(db) == 0 and not db.status().open_scopes)
        assert (checked_out(db), db.status().open_scopes) == (0, [])
        await settle(db.dispose())
        await until(no_connection_thread)

    io_loop.run_sync(end)


@pytest.fixture
def concurrent() -> None:
    """Asked for where things happen at the same time: that takes many transactions, not one."""


@pytest.fixture
def ledger_db(request: pytest.FixtureRequest, db: AnyDatabase) -> Any:
    """The database, isolated: whatever a test commits is rolled back after it."""
    return db if "concurrent" in request.fixturenames else request.getfixturevalue("isolated_db")


@pytest.fixture
def books(ledger_db: AnyDatabase) -> Books:
    return Books(ledger_db)


@pytest.fixture
def app(ledger_db: AnyDatabase, io_loop: IOLoop) -> Iterator[Application]:
    app = make_app(ledger_db)
    yield app
    io_loop.run_sync(app.settings["feed"].close)


@pytest.fixture
def fetch(app: Application, http_client: AsyncHTTPClient, base_url: str) -> Any:
    """``response = await fetch("POST", "/accounts", {...}, {"Idempotency-Key": "x"})``"""

    async def fetch(
        method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Any:
        if body is not None and not isinstance(body, str | bytes):
            body = json.dumps(body)
        response = await http_client.fetch(
            base_url + path,
            method=method,
            body=body,
            headers={"Content-Type": "application/json", **(headers or {})},
            raise_error=False,
            follow_redirects=False,
            allow_nonstandard_methods=True,
        )
        assert b"SELECT" not in response.body and b"INSERT" not in response.body
        return response

    return fetch


@pytest.fixture
def ask(fetch: Any) -> Any:
    """``code, body = await ask("POST", "/accounts", {...})``; text is sent as it is."""

    async def ask(method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        response = await fetch(method, path, body, named)
        return response.code, json.loads(response.body)

    return ask


@pytest.fixture(params=DATABASES)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where a database without tables is: for a server in a process of its own."""
    driver = DRIVERS[request.param]
    if "sqlite" in driver:
        yield f"{driver}:///{tmp_path / 'ledger.db'}"
        return
    with own_postgresql() as url:
        yield make_url(url).set(drivername=driver).render_as_string(hide_password=False)


@pytest.fixture
def ledger(database_url: str) -> Iterator[Database]:
    """A `Database` of the test's own on that, with empty tables."""
    driver = "sqlite" if "sqlite" in database_url else "postgresql+psycopg"
    url = make_url(database_url).set(drivername=driver).render_as_string(hide_password=False)
    ledger = open_database(url)
    assert isinstance(ledger, Database)
    with ledger.engine.connect() as connection:
        upgrade(connection)
    yield ledger
    ledger.dispose()
