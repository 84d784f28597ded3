"""Several databases in one session: ``binds={Base: url}``."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from tests.conftest import no_connection_thread
from tests.support import Base as FirstBase
from tests.support import Note, settle, until
from tornado_sa import AsyncDatabase, ConfigurationError, Database


class OtherBase(DeclarativeBase):
    pass


class Entry(OtherBase):
    __tablename__ = "entry"

    id: Mapped[int] = mapped_column(primary_key=True)


class Tag(OtherBase):
    __tablename__ = "tag"

    id: Mapped[int] = mapped_column(primary_key=True)


class Two:
    """Two SQLite files, and a database of the asked kind on both."""

    def __init__(self, kind: type[Any], folder: Path) -> None:
        self.kind = kind
        self.files = [folder / "first.db", folder / "second.db"]
        self.admins = [create_engine(f"sqlite:///{file}") for file in self.files]
        FirstBase.metadata.create_all(self.admins[0])
        OtherBase.metadata.create_all(self.admins[1])
        driver = "sqlite" if kind is Database else "sqlite+aiosqlite"
        self.urls = [f"{driver}:///{file}" for file in self.files]

    def run(self, work: Callable[[Any], Awaitable[Any]], **options: Any) -> None:
        async def with_database() -> None:
            options.setdefault("binds", {OtherBase: self.urls[1]})
            db = self.kind(self.urls[0], **options)
            try:
                await work(db)
                assert db.status().checked_out == 0
            finally:
                await settle(db.dispose())
                await until(no_connection_thread)

        asyncio.run(with_database())

    def ready(self, number: int) -> Engine | AsyncEngine:
        make: Any = create_engine if self.kind is Database else create_async_engine
        engine: Engine | AsyncEngine = make(self.urls[number])
        return engine


@pytest.fixture(params=[Database, AsyncDatabase])
def two(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    two = Two(request.param, tmp_path)
    yield two
    for admin in two.admins:
        admin.dispose()


async def add_both(db: Any) -> None:
    if isinstance(db, Database):
        with db.begin() as session:
            session.add_all([Note(id=1, text="hello"), Entry(id=1)])
    else:
        async with db.begin() as session:
            session.add_all([Note(id=1, text="hello"), Entry(id=1)])


def test_each_row_goes_to_its_own_database(two: Two) -> None:
    two.run(add_both)
    for admin, table in zip(two.admins, ("note", "entry"), strict=True):
        with admin.connect() as connection:
            assert connection.scalar(text(f"SELECT count(*) FROM {table}")) == 1


def test_a_ready_engine_as_value(two: Two) -> None:
    engine = two.ready(1)

    async def work(db: Any) -> None:
        assert db.binds[OtherBase] is engine
        await add_both(db)

    two.run(work, binds={OtherBase: engine})


def test_keys_with_one_url_share_one_engine(two: Two) -> None:
    async def work(db: Any) -> None:
        assert db.binds[Entry] is db.binds[Tag.__table__]
        assert db.binds[Note] is db.engine

    two.run(work, binds={Entry: two.urls[1], Tag.__table__: two.urls[1], Note: two.urls[0]})


def test_status_counts_the_connections_of_all(two: Two) -> None:
    async def work(db: Any) -> None:
        assert db.status().pool_size == 10
        block = db.scope()
        if two.kind is Database:
            with block as session:
                session.scalars(select(Note)), session.scalars(select(Entry))
                assert db.status().checked_out == 2
        else:
            async with block as session:
                await session.scalars(select(Note))
                await session.scalars(select(Entry))
                assert db.status().checked_out == 2

    two.run(work)


def test_ping_asks_all(two: Two) -> None:
    async def work(db: Any) -> None:
        assert await settle(db.ping())

    two.run(work)

    async def fail(db: Any) -> None:
        with pytest.raises(OperationalError):
            await settle(db.ping())

    two.run(fail, binds={OtherBase: two.urls[1].replace("second", "none/second")})


def test_writes_to_the_second_database_are_uncommitted_changes(two: Two) -> None:
    from tornado_sa.changes import uncommitted

    async def work(db: Any) -> None:
        if two.kind is Database:
            with db.scope() as session:
                session.execute(
                    text("INSERT INTO entry VALUES (7)"), bind_arguments={"mapper": Entry}
                )
                assert uncommitted(session) == "INSERT by text()"
        else:
            async with db.scope() as session:
                await session.execute(
                    text("INSERT INTO entry VALUES (7)"), bind_arguments={"mapper": Entry}
                )
                assert uncommitted(session.sync_session) == "INSERT by text()"

    two.run(work)


def test_a_forked_child_has_fresh_pools(tmp_path: Path) -> None:
    two = Two(Database, tmp_path)
    db = Database(two.urls[0], binds={OtherBase: two.urls[1]})
    asyncio.run(add_both(db))
    pool: Any = db.binds[OtherBase].pool
    assert pool.checkedin() == 1
    child = os.fork()
    if child == 0:
        fresh: Any = db.binds[OtherBase].pool
        os._exit(fresh.checkedin())
    assert os.waitpid(child, 0)[1] == 0
    assert pool.checkedin() == 1
    db.dispose()
    for admin in two.admins:
        admin.dispose()


def test_options_that_cannot_be(two: Two) -> None:
    for options, words in (
        ({"binds": {"entry": two.urls[1]}}, "binds are not accepted"),
        ({"binds": {OtherBase: 7}}, "takes a URL"),
        (
            {"binds": {OtherBase: two.urls[1]}, "session_options": {"binds": {}}},
            "`binds` of its own",
        ),
    ):
        with pytest.raises(ConfigurationError, match=words):
            two.kind(two.urls[0], **options)
    with pytest.raises(ConfigurationError, match="parsed") as caught:
        two.kind(two.urls[0], binds={OtherBase: "secret"})
    assert "secret" not in str(caught.value)
