"""The end of the fixtures' isolation: wherever it comes, nothing is left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tests.support import ASYNC, SYNC, Flavour, Note, only
from tornado_sa.leftovers import end_anywhere
from tornado_sa.testing import isolated

async_drivers = only(*ASYNC, "aiomysql")


async def add_note(flavour: Flavour) -> None:
    await flavour.in_scope(lambda session: session.add(Note(text="x")), commit=True)


async def sleep_long() -> None:
    await asyncio.sleep(3600)


def run_and_close(work: Callable[[], Coroutine[Any, Any, Any]]) -> None:
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(work())
    finally:
        loop.close()


@async_drivers
def test_the_loop_is_closed_before_the_isolation_ends(flavour: Flavour) -> None:
    isolation = isolated(flavour.db).switch_on()
    run_and_close(lambda: add_note(flavour))
    end_anywhere(isolation, check=True)
    assert flavour.checked_out() == 0
    assert flavour.texts() == []


@async_drivers
def test_the_loop_stands_still_when_the_isolation_ends(flavour: Flavour) -> None:
    isolation = isolated(flavour.db).switch_on()
    loop = asyncio.new_event_loop()
    before = loop.create_task(asyncio.sleep(3600))  # is nobody's of this test
    older = loop.create_task(sleep_long())
    loop.run_until_complete(asyncio.sleep(0))
    loop.run_until_complete(add_note(flavour))
    end_anywhere(isolation, check=True, moment=0.2)
    before.cancel()
    older.cancel()
    loop.run_until_complete(flavour.dispose())
    loop.close()
    assert flavour.texts() == []


@only(*SYNC, *ASYNC)
@pytest.mark.parametrize("what", ["unit", "task", "connection"])
def test_what_is_left_out_fails_the_test(flavour: Flavour, what: str) -> None:
    isolation = isolated(flavour.db).switch_on()
    loop = asyncio.new_event_loop()
    undo: list[Any] = []

    async def forget() -> None:
        await add_note(flavour)
        if what == "task":
            undo.append(asyncio.create_task(asyncio.Event().wait(), name="an event"))
            undo.append(asyncio.create_task(never(), name="forgotten"))
        elif what == "unit":
            block = flavour.db.scope("half way")
            undo.append(block)
            if flavour.is_async:
                await block.__aenter__()
            else:
                block.__enter__()
        else:
            undo.append(
                await flavour.db.engine.connect()
                if flavour.is_async
                else flavour.db.engine.connect()
            )

    async def never() -> None:
        await asyncio.sleep(3600)

    async def clean_up() -> None:
        for one in undo:
            if what == "task":
                one.cancel()
            elif what == "unit":
                await one.__aexit__(None, None, None) if flavour.is_async else one.__exit__(
                    None, None, None
                )
            else:
                await one.close() if flavour.is_async else one.close()
        await flavour.dispose()

    loop.run_until_complete(forget())
    said = {
        "task": "the task 'forgotten'",
        "unit": "the unit of work 'half way'",
        "connection": "1 connection of",
    }
    with pytest.raises(AssertionError, match=said[what]) as error:
        end_anywhere(isolation, check=True, moment=0.05)
    assert "an event" not in str(error.value)
    loop.run_until_complete(clean_up())
    loop.close()


@only("sqlite", "aiosqlite", "psycopg", "asyncpg")
@pytest.mark.gen_test
async def test_it_is_cheap(flavour: Flavour) -> None:
    """Measured are 0.1 ms for an empty test; 5 on SQLite and 10 on PostgreSQL are promised."""
    await add_note(flavour)  # the pool has a connection
    start = time.perf_counter()
    for _ in range(10):
        if flavour.is_async:
            async with isolated(flavour.db):
                await add_note(flavour)
        else:
            with isolated(flavour.db):
                await add_note(flavour)
    assert (time.perf_counter() - start) / 10 < 0.05
