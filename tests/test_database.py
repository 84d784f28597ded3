"""Database and AsyncDatabase: what they accept, refuse, show and count."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, create_engine, event, select, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from tornado.httputil import HTTPHeaders, HTTPServerRequest, RequestStartLine
from tornado.testing import bind_unused_port
from tornado.web import Application, RequestHandler

from tests.support import Base, Flavour, Note, only, settle, until
from tests.test_memory import FakeConnection
from tornado_sa import (
    AsyncDatabase,
    AsyncSessionHandler,
    BaseHandler,
    ConfigurationError,
    Database,
    SessionHandler,
    TornadoSAError,
    current_scope,
)
from tornado_sa.responses import status_for


@pytest.mark.parametrize(
    ("kind", "url", "says"),
    [
        (Database, "postgresql+asyncpg://u:hunter2@h/d", r"Database\('postgresql\+psycopg://"),
        (Database, "sqlite+aiosqlite:///x.db", r"AsyncDatabase\('sqlite\+aiosqlite://"),
        (AsyncDatabase, "sqlite:///x.db", r"AsyncDatabase\('sqlite\+aiosqlite://"),
        (AsyncDatabase, "postgresql+psycopg2://u:hunter2@h/d", r"not installed|asyncpg"),
        (Database, "nosuch://u:hunter2@h/d", "knows no driver 'nosuch'"),
        (Database, "postgresql+pg8000://u:hunter2@h/d", "pip install 'pg8000'"),
        (AsyncDatabase, "mysql+asyncmy://u:hunter2@h/d", "pip install 'asyncmy'"),
        (Database, "hunter2, not a url", "cannot be parsed"),
        (Database, "postgresql+psycopg://u:hunter2@h:port/d", "cannot be parsed"),
        (Database, "postgresql+psycopg://u:pass@hunter2@h/d", "cannot be parsed"),
        (Database, "sqlite:///x.db?timeout=soon", "not accepted"),
        (Database, 7, "not int"),
        (Database, None, "not NoneType"),
    ],
)
def test_wrong_urls(kind: Any, url: Any, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says) as caught:
        kind(url)
    assert "hunter2" not in str(caught.value)


def test_wrong_engines() -> None:
    engine = create_engine("sqlite://")
    async_engine = create_async_engine("sqlite+aiosqlite://")
    with pytest.raises(ConfigurationError, match=r"Write AsyncDatabase\(engine\)"):
        Database(async_engine)  # type: ignore[arg-type]  # the mistake that is tested
    with pytest.raises(ConfigurationError, match=r"Write Database\(engine\)"):
        AsyncDatabase(engine)  # type: ignore[arg-type]  # the mistake that is tested
    with pytest.raises(ConfigurationError, match="no effect on a ready engine"):
        Database(engine, engine_options={"echo": True})
    with pytest.raises(ConfigurationError, match="engine_options"):
        Database("sqlite://", engine_options={"nonsense": True})
    with pytest.raises(ConfigurationError, match="session_options"):
        Database("sqlite://", session_options={"nonsense": True})


def test_ready_engine_and_url_object(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'a.db'}", pool_size=3)
    db = Database(engine)
    assert db.engine is engine
    assert db.status().pool_size == 3
    url = URL.create("sqlite", database=str(tmp_path / "a.db"))
    other = Database(url)
    with other.begin() as session:
        session.execute(text("CREATE TABLE t (x)"))
    other.dispose()
    with db.scope() as session:
        assert session.execute(text("SELECT * FROM t")).all() == []
    db.dispose()


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://app:hunter2@localhost/app",
        "postgresql+psycopg://localhost/app?user=app&password=hunter2",
        "postgresql+psycopg://localhost/app?sslpassword=hunter2",
    ],
)
def test_repr_shows_no_password(url: str) -> None:
    assert repr(Database(url)).startswith("Database(postgresql+psycopg://")
    assert "***" in repr(Database(url))
    assert "hunter2" not in repr(Database(url))
    assert "hunter2" not in repr(AsyncDatabase(url))


def test_defaults_that_differ_from_sqlalchemy() -> None:
    db = Database("sqlite://")
    with db.scope() as session:
        assert session.expire_on_commit is False
    with pytest.raises(Exception, match="permanently closed"):
        session.execute(select(1))
    with Database("sqlite://", session_options={"expire_on_commit": True}).scope() as session:
        assert session.expire_on_commit is True


def test_session_class_of_ones_own() -> None:
    class MySession(Session):
        pass

    class MyAsyncSession(AsyncSession):
        async def execute(self, *args: Any, **kwargs: Any) -> Any:
            executed.append(args)
            return await super().execute(*args, **kwargs)

    executed: list[Any] = []
    assert isinstance(
        Database("sqlite://", session_options={"class_": MySession}).sessionmaker(), MySession
    )

    async def main() -> None:
        db = AsyncDatabase("sqlite+aiosqlite://", session_options={"class_": MyAsyncSession})
        async with db.scope() as session:
            assert isinstance(session, MyAsyncSession)
            await session.execute(select(1))
        await db.dispose()

    asyncio.run(main())
    assert len(executed) == 1


@pytest.mark.parametrize(
    "url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file::memory:?uri=true"]
)
def test_memory_database_is_shared_by_scopes_and_threads(url: str) -> None:
    async def main() -> None:
        db = Database(url)
        Base.metadata.create_all(db.engine)
        with db.begin() as outer:
            outer.add(Note(text="one"))
            outer.flush()
            with db.scope() as inner:
                assert inner.scalars(select(Note.text)).all() == ["one"]
                assert db.status().checked_out == 2
        with db.scope() as session:
            texts = await asyncio.to_thread(lambda: session.scalars(select(Note.text)).all())
        assert texts in (["one"], [])  # the inner scope's end rolls the shared connection back
        assert db.status().checked_out == 0
        assert db.status().pool_size == 1
        db.dispose()

    asyncio.run(main())


def test_async_memory_database() -> None:
    async def main() -> None:
        db = AsyncDatabase("sqlite+aiosqlite://")
        async with db.begin() as session:
            await session.run_sync(lambda session: Base.metadata.create_all(session.connection()))
            session.add(Note(text="one"))
        async with db.scope() as outer, db.scope() as inner:
            assert (await outer.scalars(select(Note.text))).all() == ["one"]
            assert (await inner.scalars(select(Note.text))).all() == ["one"]
            assert db.status().checked_out == 2
        assert db.status().checked_out == 0
        await db.dispose()

    asyncio.run(main())


@pytest.mark.gen_test
async def test_status(flavour: Flavour) -> None:
    status = flavour.db.status()
    assert (status.pool_size, status.checked_out, status.overflow) == (5, 0, 0)
    assert status.open_scopes == []

    async def look(session: Any) -> None:
        await settle(session.execute(select(1)))
        status = flavour.db.status()
        assert status.checked_out == 1
        assert status.open_scopes == [current_scope()]
        assert status.open_scopes[0].label == "test"
        assert 0 <= status.open_scopes[0].age < 60

    await flavour.in_scope(look)
    await until(lambda: flavour.db.status().checked_out == 0)
    assert flavour.db.status().open_scopes == []


@pytest.mark.gen_test
async def test_ping(flavour: Flavour) -> None:
    assert await settle(flavour.db.ping()) is True
    assert flavour.checked_out() == 0


@pytest.mark.gen_test
async def test_ping_of_a_server_that_says_nothing() -> None:
    """It lets clients connect and stays silent, as a hanging server does."""
    silent, port = bind_unused_port()
    for driver in ("asyncpg", "psycopg"):
        db = AsyncDatabase(f"postgresql+{driver}://u@127.0.0.1:{port}/d")
        with pytest.raises(TimeoutError, match=r"did not answer within 0\.1 s"):
            await db.ping(timeout=0.1)
        await db.dispose()
    db_sync = Database(
        f"postgresql+psycopg://u@127.0.0.1:{port}/d",
        engine_options={"connect_args": {"connect_timeout": 2}},
    )
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="did not answer"):
        await asyncio.to_thread(db_sync.ping, timeout=0.1)
    assert time.monotonic() - start < 1.5
    silent.close()


@pytest.mark.gen_test
async def test_dispose_names_leftovers(flavour: Flavour, expected_log: list[str]) -> None:
    block = flavour.db.scope("left open")
    session = await settle(block.__aenter__() if flavour.is_async else block.__enter__())
    await settle(session.execute(select(1)))
    expected_log.append("is disposed of while still in use by: left open (")
    await settle(flavour.db.dispose())
    leave = block.__aexit__ if flavour.is_async else block.__exit__
    await settle(leave(None, None, None))


@only("aiosqlite", "asyncpg", "psycopg_async")
@pytest.mark.gen_test
async def test_dispose_waits_for_closings(flavour: Flavour) -> None:
    rolled_back: list[bool] = []

    @event.listens_for(flavour.sync_engine, "rollback")
    def note(_connection: Any) -> None:
        rolled_back.append(True)

    block = flavour.db.scope()
    session = await block.__aenter__()
    await session.execute(select(1))
    block._leave().end()  # as on_finish does it: nobody waits
    assert rolled_back == []
    await flavour.db.dispose()
    assert rolled_back == [True]


@pytest.mark.skipif(sys.platform == "win32", reason="no fork there")
@only("psycopg", "asyncpg")
@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.gen_test
async def test_fork_leaves_the_parents_connections_alone(flavour: Flavour, read_only: bool) -> None:
    """The child starts with a fresh pool; the parent goes on with its connection."""

    def backend(db: Any) -> Any:
        async def ask() -> Any:
            async with db.scope(read_only=read_only) as session:
                return await session.scalar(text("SELECT pg_backend_pid()"))

        if flavour.is_async:
            return ask()
        with db.scope(read_only=read_only) as session:
            return session.scalar(text("SELECT pg_backend_pid()"))

    mine = await settle(backend(flavour.db))
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            asyncio.events._set_running_loop(None)
            found = asyncio.run(backend(flavour.db)) if flavour.is_async else backend(flavour.db)
            os.write(write, str(found).encode())
        finally:
            os._exit(0)
    await asyncio.to_thread(os.waitpid, child, 0)
    os.close(write)
    theirs = int(os.read(read, 100))
    os.close(read)
    assert theirs != mine
    assert await settle(backend(flavour.db)) == mine


def test_wrong_base_order() -> None:
    class Mine(RequestHandler):
        pass

    with pytest.raises(TypeError, match=r"Write: class Wrong\(BaseHandler, Mine\)"):

        class Wrong(Mine, BaseHandler):
            pass


@pytest.mark.parametrize(
    ("handler", "settings", "says"),
    [
        (SessionHandler, {}, r"Application\(handlers, db=Database\(url\)\).*database = Database"),
        (AsyncSessionHandler, {}, r"db=AsyncDatabase\(url\)"),
        (SessionHandler, {"db": "sqlite://"}, "was given a str .* needs a Database"),
        (AsyncSessionHandler, {"db": Database("sqlite://")}, "needs an AsyncDatabase"),
    ],
)
def test_handler_without_the_right_database(handler: Any, settings: Any, says: str) -> None:
    request = HTTPServerRequest(
        connection=FakeConnection(),  # type: ignore[arg-type]  # has what a request needs
        headers=HTTPHeaders({"Host": "x"}),
        start_line=RequestStartLine("GET", "/", "HTTP/1.1"),
    )
    made = handler(Application(**settings), request)
    with pytest.raises(ConfigurationError, match=says):
        _ = made.session


def test_every_error_is_ours() -> None:
    import tornado_sa

    errors = [
        value
        for name in tornado_sa.__all__
        if isinstance(value := getattr(tornado_sa, name), type) and issubclass(value, Exception)
    ]
    assert len(errors) == 7
    assert all(issubclass(error, TornadoSAError) for error in errors)


def test_memory_database_is_one_however_it_is_opened() -> None:
    async def main() -> None:
        db = AsyncDatabase("sqlite+aiosqlite://")

        async def address() -> int:
            async with db.scope() as session:
                raw = await (await session.connection()).get_raw_connection()
                return id(raw.driver_connection)

        assert len(set(await asyncio.gather(*(address() for _ in range(5))))) == 1
        await db.dispose()

    asyncio.run(main())


def test_one_engine_for_many_databases(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'a.db'}")
    for _ in range(1100):  # more than the recursion limit
        db = Database(engine)
    assert db.ping()
    db.dispose()


def test_outage_behind_a_creator_is_known_as_one() -> None:
    async def connect() -> Any:
        raise ConnectionRefusedError

    async def main() -> None:
        db = AsyncDatabase("postgresql+asyncpg://", engine_options={"async_creator": connect})
        with pytest.raises(ConnectionRefusedError) as caught:
            await db.ping()
        assert status_for(caught.value) == 503

    asyncio.run(main())


@only("psycopg")
def test_child_that_unwinds_leaves_the_parents_transaction_alone(flavour: Flavour) -> None:
    with flavour.db.scope() as session:
        session.execute(text("CREATE TEMPORARY TABLE mine (x int) ON COMMIT DROP"))
        child = os.fork()
        if child == 0:
            current_scope().end()  # as a SystemExit that leaves the block would
            os._exit(0)
        os.waitpid(child, 0)
        assert session.scalar(text("SELECT count(*) FROM mine")) == 0
