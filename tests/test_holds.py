"""The log line about a connection that was held for long."""

from __future__ import annotations

import asyncio
import gc
import re
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from tests.support import Flavour, Note, only, settle
from tornado_sa import ConfigurationError
from tornado_sa.holds import warn_of_long_holds

sync_only = only("sqlite", "psycopg")
async_only = only("aiosqlite", "asyncpg", "psycopg_async")


@pytest.fixture
def engine(flavour: Flavour) -> Engine:
    """The engine of the flavour, with warnings from 50 ms on."""
    engine = flavour.sync_engine
    if flavour.dialect == "sqlite":  # give it a statement that takes time

        @event.listens_for(engine, "connect")
        def add_sleep(connection: Any, _record: Any) -> None:
            connection.create_function("pg_sleep", 1, time.sleep)

    warn_of_long_holds(engine, 0.05)
    return engine


@pytest.fixture
def lines(
    caplog: pytest.LogCaptureFixture, expected_log: list[str], engine: Engine
) -> Iterator[list[str]]:
    """The warnings, filled at the end of the test; each has to be looked at there."""
    lines = _Lines(caplog)
    yield lines
    expected_log.extend(lines)


class _Lines(list[str]):
    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    def take(self) -> list[str]:
        """What was logged so far, and allowed to be."""
        self[:] = [line for line in self._caplog.messages if "held a connection" in line]
        return list(self)


def line_of(marker: str) -> int:
    with open(__file__) as source:
        return 1 + next(i for i, line in enumerate(source) if line.endswith(f"# {marker}\n"))


async def use(session: Any, *, sql: float = 0.0, wait: float = 0.0) -> None:
    sleep = text(f"SELECT pg_sleep({sql})")
    if isinstance(session, AsyncSession):
        await session.execute(sleep)  # first use, async
    else:
        session.execute(sleep)  # first use
    await asyncio.sleep(wait)


@pytest.mark.gen_test
async def test_a_long_hold_is_logged(flavour: Flavour, lines: Any) -> None:
    """Who, how long, how much of it in SQL, and where it began."""
    await flavour.in_scope(lambda session: use(session, wait=0.15))
    (line,) = lines.take()
    found = re.fullmatch(
        r"test held a connection for (0\.\d) s, 0\.0 s of it in SQL; first used at"
        r" tests/test_holds\.py:(\d+) in use\. Release it before a slow await:"
        r" await self\.release\(\)\.",
        line,
    )
    assert found is not None, line
    assert float(found[1]) >= 0.1
    assert int(found[2]) == line_of("first use, async" if flavour.is_async else "first use")


@pytest.mark.gen_test
async def test_a_slow_statement_is_told_from_a_slow_await(flavour: Flavour, lines: Any) -> None:
    """Who waits for SQL is not advised to release the connection first."""
    await flavour.in_scope(lambda session: use(session, sql=0.3))
    (line,) = lines.take()
    assert re.search(r"for 0\.[34] s, 0\.3 s of it in SQL; .* in use\.$", line), line


@pytest.mark.gen_test
async def test_a_short_hold_is_not_logged(flavour: Flavour, engine: Engine) -> None:
    await flavour.in_scope(lambda session: session.execute(select(Note)))


@pytest.mark.gen_test
async def test_each_hold_is_its_own(flavour: Flavour, lines: Any) -> None:
    """Between two uses nothing is held, and a short one after a long one is not logged."""

    async def twice(session: Any) -> None:
        await use(session, wait=0.06)
        await settle(session.commit())
        await asyncio.sleep(0.1)
        await use(session)

    await flavour.in_scope(twice)
    (line,) = lines.take()
    assert "for 0.1 s" in line


@async_only
@pytest.mark.gen_test
async def test_the_place_under_run_sync(flavour: Flavour, lines: Any) -> None:
    """In the greenlet itself, as under the bridge."""

    def inside(session: Session) -> None:
        session.scalars(select(Note)).all()  # inside
        time.sleep(0.1)

    await flavour.in_scope(lambda session: session.run_sync(inside))
    (line,) = lines.take()
    assert f"tests/test_holds.py:{line_of('inside')} in inside." in line


@async_only
@pytest.mark.gen_test
async def test_no_place_below_the_event_loop(flavour: Flavour, lines: Any) -> None:
    """Where a task is one call of SQLAlchemy, what started the loop is not the place."""

    async def gathered(session: Any) -> None:
        await asyncio.gather(session.execute(select(1)))
        await asyncio.sleep(0.1)

    await flavour.in_scope(gathered)
    (line,) = lines.take()
    assert "of it in SQL. Release" in line


@sync_only
def test_outside_of_any_unit_of_work(flavour: Flavour, engine: Engine, lines: Any) -> None:
    with engine.connect() as connection:
        connection.execute(select(1))
        time.sleep(0.06)
    (line,) = lines.take()
    assert line.startswith("code outside of any unit of work held a connection")


@sync_only
def test_threads(flavour: Flavour, engine: Engine, lines: Any) -> None:
    """Each thread's connection has a record of its own."""

    def work(number: int) -> None:
        with flavour.db.scope(f"job {number}") as session:
            session.execute(text("SELECT pg_sleep(0)"))
            time.sleep(0.1 if number % 2 else 0)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(line.split(" held")[0] for line in lines.take()) == ["job 1", "job 3"]


@pytest.mark.gen_test
async def test_a_failed_statement_stops_the_clock(flavour: Flavour, lines: Any) -> None:
    """The time after it is not time in SQL."""

    async def fail(session: Any) -> None:
        with pytest.raises(DBAPIError):
            await settle(session.execute(text("SELECT nonsense")))
        await asyncio.sleep(0.15)

    await flavour.in_scope(fail)
    (line,) = lines.take()
    assert " 0.0 s of it in SQL" in line


@pytest.mark.gen_test
async def test_invalidated_while_out(flavour: Flavour, lines: Any) -> None:
    """That is the end of the hold; the next one, on the same place of the pool, is fresh."""

    async def lose(session: Any) -> None:
        await use(session, wait=0.06)
        await settle(session.invalidate())
        assert len(lines.take()) == 1

    await flavour.in_scope(lose)
    await flavour.in_scope(use)
    assert len(lines.take()) == 1


@only("asyncpg", "psycopg_async")
@pytest.mark.gen_test
async def test_a_cancelled_statement(flavour: Flavour, lines: Any) -> None:
    """Counts as SQL until it was broken off."""
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(flavour.in_scope(lambda session: use(session, sql=5)), 0.3)
    (line,) = lines.take()
    found = re.search(r"for ([\d.]+) s, ([\d.]+) s of it in SQL; .* in use\.$", line)
    assert found is not None, line
    assert 0.2 <= float(found[2]) <= float(found[1])


@only("asyncpg")
@pytest.mark.gen_test
async def test_taken_away_during_a_statement(flavour: Flavour, lines: Any) -> None:
    """As when a unit of work ends under a forgotten task: SQL until then."""
    session = AsyncSession(flavour.db.engine)
    task = asyncio.create_task(use(session, sql=5))
    await asyncio.sleep(0.3)
    session.sync_session.invalidate()
    assert " 0.3 s of it in SQL" in lines.take()[0]
    await asyncio.wait([task])
    assert task.exception() is not None


@sync_only
def test_detached_while_out(engine: Engine, lines: Any) -> None:
    """The pool has its place back; what becomes of the connection is not logged."""
    with engine.connect() as connection:
        time.sleep(0.06)
        connection.detach()
        assert len(lines.take()) == 1
        connection.execute(select(1))
        time.sleep(0.06)
    assert len(lines.take()) == 1


@sync_only
def test_info_that_was_cleared(engine: Engine, lines: Any) -> None:
    """Somebody else's mistake makes no line and no error."""
    with engine.connect() as connection:
        connection.info.clear()
        connection.execute(select(1))
        time.sleep(0.06)
    assert lines.take() == []


@sync_only
def test_found_by_the_garbage_collector(engine: Engine, lines: Any) -> None:
    connection = engine.raw_connection()
    time.sleep(0.06)
    del connection
    gc.collect()
    assert len(lines.take()) == 1


@only("asyncpg")
@pytest.mark.gen_test
async def test_async_connection_found_by_the_garbage_collector(
    flavour: Flavour, lines: Any, expected_log: list[str]
) -> None:
    """SQLAlchemy detaches it; its place in the pool is free again."""
    session = AsyncSession(flavour.db.engine)
    await use(session, wait=0.06)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        del session
        gc.collect()
    assert len(lines.take()) == 1
    expected_log.append("garbage collector is trying to clean up")
    await asyncio.sleep(0.05)


@sync_only
def test_survives_dispose_and_a_refused_checkout(engine: Engine, lines: Any) -> None:
    """A new pool has the listeners; a checkout that another listener refuses leaves nothing."""
    engine.dispose()

    def refuse(*_args: Any) -> None:
        raise ValueError("refused")

    event.listen(engine, "checkout", refuse)
    with pytest.raises(ValueError, match="refused"):
        engine.connect()
    event.remove(engine, "checkout", refuse)
    with engine.connect():
        time.sleep(0.06)
    assert len(lines.take()) == 1


@sync_only
def test_nothing_is_kept(engine: Engine) -> None:
    """An idle connection knows nothing of who held it last."""
    with engine.connect() as connection:
        info = connection.info
        before = len(info)
    assert len(info) == before - 1


@pytest.mark.parametrize("seconds", [0, -1, True, "1", None, float("nan"), float("inf")])
def test_wrong_seconds(seconds: Any) -> None:
    with pytest.raises(ConfigurationError, match="hold_warning is a number of seconds greater"):
        warn_of_long_holds(create_engine("sqlite://"), seconds)
