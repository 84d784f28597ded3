"""Behind PgBouncer in transaction mode, with the settings that README.rst tells."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import select, text
from tornado.web import Application

from tests.pgbouncer import PgBouncer
from tests.support import DRIVERS, POSTGRESQL, Flavour, Note, make_database, only, settle, until
from tornado_sa import ConfigurationError, ReadOnlyViolation, read_only, transactional

SETTINGS: dict[str, dict[str, Any]] = {
    "postgresql+psycopg": {"prepare_threshold": None},
    "postgresql+asyncpg": {
        "statement_cache_size": 0,
        "prepared_statement_cache_size": 0,
        "prepared_statement_name_func": lambda: "",
    },
}


def pooled(flavour: Flavour, pgbouncer: PgBouncer, reader: str) -> Any:
    """The database of ``flavour``, by way of PgBouncer, with more connections than that has."""
    driver = DRIVERS[flavour.name]
    return make_database(
        flavour.name,
        pgbouncer.url(driver),
        reader_url=pgbouncer.url(driver, reader),
        engine_options={"connect_args": SETTINGS[driver], "pool_size": 10},
    )


@pytest.fixture
def db(flavour: Flavour, pgbouncer: PgBouncer, io_loop: Any) -> Iterator[Any]:
    db = pooled(flavour, pgbouncer, "reader")
    yield db
    pools = db.engine.pool, db.reader.pool
    io_loop.run_sync(lambda: until(lambda: not any(pool.checkedout() for pool in pools)))
    io_loop.run_sync(lambda: settle(db.dispose()))


@pytest.fixture
def app(db: Any) -> Application:
    return Application(db=db)


@only(*POSTGRESQL)
@pytest.mark.gen_test(timeout=60)
async def test_many_clients_share_three_connections(flavour: Flavour, db: Any, serve: Any) -> None:
    """Each answer is to its own query, whichever server connection ran it."""

    class Handler(flavour.Handler):
        @read_only
        async def get(self) -> None:
            # Inside the statement, so that each is another one, and prepared anew.
            number = self.get_argument("number")
            for _ in range(2):
                query = text(f"SELECT {number}, 'number {number}'")
                found = (await settle(self.session.execute(query))).one()
                assert tuple(found) == (int(number), f"number {number}")
            self.write(number)

        @transactional(isolation_level="REPEATABLE READ")
        async def post(self) -> None:
            self.session.add(Note(text=self.get_argument("number")))
            await settle(self.session.flush())
            level = await settle(self.session.scalar(text("SHOW transaction_isolation")))
            assert level == "repeatable read"

        @read_only(stream=True)
        async def put(self) -> None:
            query = text("SELECT n FROM generate_series(1, 3000) n")
            options = {"stream_results": True, "yield_per": 100}
            if flavour.is_async and not flavour.is_bridged:
                result = await self.session.stream(query, execution_options=options)
                numbers = [row[0] async for row in result]
            else:
                result = self.session.execute(query, execution_options=options)
                numbers = [row[0] for row in result]
            self.write(f"{sum(numbers)}")

    fetch = serve(Handler)

    async def client(first: int) -> None:
        for number in range(first, first + 10):
            response = await fetch(f"/?number={number}", method="POST")
            assert response.code == 200
            response = await fetch(f"/?number={number}")
            assert response.body == str(number).encode()
        assert (await fetch(method="PUT")).body == b"4501500"

    await asyncio.gather(*(client(100 * first) for first in range(10)))
    written = sorted(map(int, flavour.texts()))
    assert written == [100 * first + more for first in range(10) for more in range(10)]


@only(*POSTGRESQL)
@pytest.mark.gen_test
async def test_reader_is_read_only(flavour: Flavour, db: Any) -> None:
    write = text("INSERT INTO note (text) VALUES ('by a reader')")
    with pytest.raises(ReadOnlyViolation):
        await use_reader(flavour, db, write)
    assert flavour.texts() == []


@only(*POSTGRESQL)
@pytest.mark.gen_test
async def test_reader_that_could_write_is_refused(flavour: Flavour, pgbouncer: PgBouncer) -> None:
    """PgBouncer is told to ignore the start-up parameter, and does not set it by other means."""
    db = pooled(flavour, pgbouncer, "dropped")
    with pytest.raises(ConfigurationError, match=r"not read-only.*reader_url.*connect_query"):
        await use_reader(flavour, db, select(1))
    assert db.reader.pool.checkedout() == 0
    await settle(db.dispose())


async def use_reader(flavour: Flavour, db: Any, statement: Any) -> None:
    block = db.scope(read_only=True)
    if flavour.is_async:
        async with block as session:
            await session.execute(statement)
    else:
        with block as session:
            session.execute(statement)
