"""Fixtures. After every test: no connection out, no open scope, no lost task, no stray log line."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import create_engine, event, make_url, text
from sqlalchemy.exc import OperationalError
from tornado.ioloop import IOLoop
from tornado.web import Application

from tests.cluster import Cluster
from tests.pgbouncer import PgBouncer
from tests.support import (
    ASYNC,
    BRIDGED,
    DRIVERS,
    MARIADB,
    SYNC,
    Base,
    Flavour,
    check_foreign_keys,
    make_database,
    missing,
    until,
)
from tornado_sa import scope

POSTGRESQL_URL = os.environ.get(
    "TORNADO_SA_POSTGRESQL", "postgresql://postgres@127.0.0.1:5432/postgres"
)


MARIADB_URL = os.environ.get("TORNADO_SA_MARIADB", "mariadb://root@127.0.0.1:3306/test")


@pytest.fixture(scope="module", autouse=True)
def cheap_collections() -> None:
    """Spare the collections after each test what lives on: they took three quarters of all time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def io_loop() -> Iterator[IOLoop]:
    """Tornado's loop for one test. Replaces pytest-tornado's, whose make_current() warns."""
    asyncio_loop = asyncio.new_event_loop()
    asyncio.set_event_loop(asyncio_loop)

    async def wrap() -> IOLoop:
        return IOLoop.current()

    io_loop = asyncio_loop.run_until_complete(wrap())
    yield io_loop
    asyncio.set_event_loop(None)
    io_loop.close(all_fds=True)


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """A database of this test run's own, on the server."""
    name = f"tornado_sa_{uuid.uuid4().hex[:12]}"
    try:
        server = psycopg.connect(POSTGRESQL_URL, autocommit=True)
    except psycopg.OperationalError as error:
        missing("postgresql", error)
    server.execute(f"CREATE DATABASE {name}")
    yield make_url(POSTGRESQL_URL).set(database=name).render_as_string(hide_password=False)
    server.execute(f"DROP DATABASE {name} WITH (FORCE)")
    server.close()


@pytest.fixture(scope="session")
def postgresql_tables(postgresql_url: str) -> Iterator[Any]:
    engine = create_engine(make_url(postgresql_url).set(drivername="postgresql+psycopg"))
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture(scope="session")
def mariadb_notes() -> Iterator[Any]:
    """A database of this test run's own, with the table of notes."""
    name = f"tornado_sa_{uuid.uuid4().hex[:12]}"
    server = create_engine(make_url(MARIADB_URL).set(drivername="mariadb+pymysql"))
    try:
        with server.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
    except OperationalError as error:
        missing("mariadb", error)
    engine = create_engine(server.url.set(database=name))
    Base.metadata.create_all(engine, tables=[Base.metadata.tables["note"]])
    yield engine
    engine.dispose()
    with server.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name}"))
    server.dispose()


@pytest.fixture(params=SYNC + ASYNC + BRIDGED)
def flavour(request: pytest.FixtureRequest, tmp_path: Path, io_loop: IOLoop) -> Iterator[Flavour]:
    """Every database, with empty tables; narrowed down with ``@only(...)``."""
    name = request.param
    if "sqlite" in name:
        url = f"{DRIVERS[name]}:///{tmp_path / 'test.db'}"
        admin = create_engine(f"sqlite:///{tmp_path / 'test.db'}")
        check_foreign_keys(admin)
        Base.metadata.create_all(admin)
    elif name in MARIADB:
        admin = request.getfixturevalue("mariadb_notes")
        url = admin.url.set(drivername=DRIVERS[name]).render_as_string(hide_password=False)
        with admin.begin() as connection:
            connection.execute(Base.metadata.tables["note"].delete())
    else:
        admin = request.getfixturevalue("postgresql_tables")
        given = make_url(request.getfixturevalue("postgresql_url"))
        url = given.set(drivername=DRIVERS[name]).render_as_string(hide_password=False)
        with admin.begin() as connection:
            for table in reversed(Base.metadata.sorted_tables):
                connection.execute(table.delete())
    options = getattr(request.function, "database_options", {})
    db = make_database(name, url, **options)
    flavour = Flavour(name, db, admin)
    yield flavour
    io_loop.run_sync(lambda: nothing_left(flavour))
    io_loop.run_sync(flavour.dispose)
    io_loop.run_sync(lambda: until(no_connection_thread))
    if "sqlite" in name:
        admin.dispose()


async def nothing_left(flavour: Flavour) -> None:
    """Fail if the test left a connection, a scope or a task behind."""
    assert scope.current.get() is None, "the test left a scope open in its own context"
    for _ in range(200):  # closings that are under way get a second
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if not (flavour.checked_out() or flavour.db.status().open_scopes or others):
            return
        await asyncio.sleep(0.005)
    assert flavour.checked_out() == 0, "connections are still checked out"
    assert flavour.db.status().open_scopes == []
    assert not others, "tasks are still running"


def no_connection_thread() -> bool:
    """True when aiosqlite's threads are gone: one that outlives the loop raises into nowhere."""
    return not any("_connection_worker" in thread.name for thread in threading.enumerate())


@pytest.fixture
def app(flavour: Flavour) -> Application:
    """An application without handlers: each test adds its own, next to the request."""
    return Application(db=flavour.db)


@pytest.fixture
def expected_log() -> list[str]:
    """Pieces of the log lines, from WARNING up, that the test expects, in any order."""
    return []


@pytest.fixture(autouse=True)
def no_stray_log_line(caplog: pytest.LogCaptureFixture, expected_log: list[str]) -> Iterator[None]:
    """Fail on a log line that is not expected, and on an expected one that did not come."""
    logging.getLogger("tornado.access").setLevel(logging.CRITICAL)
    yield
    gc.collect()  # "Task was destroyed", "never retrieved" come from here
    lines = [
        record.getMessage()
        for phase in ("setup", "call", "teardown")
        for record in caplog.get_records(phase)
        if record.levelno >= logging.WARNING
    ]
    for piece in expected_log:
        found = next((line for line in lines if piece in line), None)
        assert found is not None, f"expected in the log, and missing: {piece!r} in {lines}"
        lines.remove(found)
    assert lines == [], "unexpected in the log"


@pytest.fixture
def statements(flavour: Flavour) -> Iterator[list[str]]:
    """The statements that the application's engine and its reader sent, in order."""
    sent: list[str] = []

    def record(_conn: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        sent.append(statement)

    for engine in flavour.sync_engines:
        event.listen(engine, "before_cursor_execute", record)
    yield sent
    for engine in flavour.sync_engines:
        event.remove(engine, "before_cursor_execute", record)


@pytest.fixture
def serve(app: Application, http_client: Any, base_url: str) -> Any:
    """``fetch = serve(Handler)``: serves every path; errors are responses, not exceptions."""

    def start(handler: Any, path: str = r"/.*") -> Any:
        app.add_handlers(r".*", [(path, handler)])

        async def fetch(path: str = "/", **options: Any) -> Any:
            if options.get("method") in ("POST", "PUT", "PATCH"):
                options.setdefault("body", "")
            return await http_client.fetch(base_url + path, raise_error=False, **options)

        return fetch

    return start


@pytest.fixture(scope="session")
def pgbouncer(postgresql_url: str) -> Iterator[PgBouncer]:
    """A PgBouncer before the database of this test run."""
    folder = Path(tempfile.mkdtemp(prefix="tornado_sa_"))
    folder.chmod(0o755)
    pgbouncer = PgBouncer(folder, postgresql_url)
    yield pgbouncer
    pgbouncer.stop()
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A PostgreSQL server that a test may stop, if it starts it again."""
    folder = Path(tempfile.mkdtemp(prefix="tornado_sa_"))  # short: it holds a Unix socket
    folder.chmod(0o755)
    cluster = Cluster(folder / "data")
    yield cluster
    cluster.stop()
    shutil.rmtree(folder)
