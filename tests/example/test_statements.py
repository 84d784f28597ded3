"""Daily statements: what a day has done to each account, written once the day is over."""

from __future__ import annotations

import asyncio
from datetime import UTC, date, datetime, timedelta

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from example_app.database import read
from example_app.models import Account, Statement, Transfer
from example_app.statements import every_day, write_missing
from tests.example.support import Books
from tests.support import until

MONDAY = datetime(2026, 3, 2, 9, tzinfo=UTC)


def statements(session: Session) -> list[tuple[str, date, int, int, int]]:
    rows = session.execute(
        select(Account.owner, Statement.day, Statement.received, Statement.paid, Statement.closing)
        .join(Account)
        .order_by(Statement.day, Account.owner)
    )
    return [tuple(row) for row in rows]


async def fill(books: Books) -> None:
    """Two accounts opened on Monday, transfers on Monday and Wednesday, a third on Wednesday."""
    ada = Account(owner="Ada", currency="EUR", balance=70, opening=100, opened_at=MONDAY)
    bob = Account(owner="Bob", currency="EUR", balance=30, opening=0, opened_at=MONDAY)
    wednesday = MONDAY + timedelta(days=2)
    cyd = Account(owner="Cyd", currency="EUR", balance=5, opened_at=wednesday)
    at_midnight = datetime(2026, 3, 4, tzinfo=UTC)
    await books.add(
        ada,
        bob,
        cyd,
        Transfer(source=ada, target=bob, amount=50, memo="", created_at=MONDAY),
        Transfer(source=bob, target=ada, amount=15, memo="", created_at=at_midnight),
        Transfer(source=bob, target=ada, amount=5, memo="", created_at=wednesday),
    )


@pytest.mark.gen_test
async def test_each_day_that_is_over_gets_a_statement_for_each_account(books: Books) -> None:
    await fill(books)
    assert await write_missing(books.db, MONDAY + timedelta(days=3)) == 3
    monday, tuesday, wednesday = (date(2026, 3, day) for day in (2, 3, 4))
    assert await read(books.db, "test", statements) == [
        ("Ada", monday, 0, 50, 50),
        ("Bob", monday, 50, 0, 50),
        ("Ada", tuesday, 0, 0, 50),
        ("Bob", tuesday, 0, 0, 50),
        ("Ada", wednesday, 20, 0, 70),
        ("Bob", wednesday, 0, 20, 30),
        ("Cyd", wednesday, 0, 0, 5),
    ]
    assert await write_missing(books.db, MONDAY + timedelta(days=3)) == 0


@pytest.mark.gen_test
async def test_a_day_is_not_over_before_its_last_transfers_are_visible(books: Books) -> None:
    await fill(books)
    midnight = datetime(2026, 3, 3, tzinfo=UTC)
    assert await write_missing(books.db, midnight + timedelta(minutes=4)) == 0
    assert await write_missing(books.db, midnight + timedelta(minutes=6)) == 1


@pytest.mark.gen_test
async def test_an_empty_ledger_has_no_statements(books: Books) -> None:
    assert await write_missing(books.db, MONDAY) == 0


@pytest.mark.usefixtures("concurrent")
@pytest.mark.gen_test
async def test_processes_that_write_at_the_same_time_write_each_day_once(books: Books) -> None:
    await fill(books)
    now = MONDAY + timedelta(days=3)
    await asyncio.gather(*(write_missing(books.db, now) for _ in range(4)))
    await write_missing(books.db, now)
    assert len(await read(books.db, "test", statements)) == 7


@pytest.mark.usefixtures("concurrent")
@pytest.mark.gen_test
async def test_the_job_begins_with_what_is_missing_and_ends_when_it_is_told(books: Books) -> None:
    opened = datetime.now(UTC) - timedelta(days=2)
    await books.add(Account(owner="Ada", currency="EUR", balance=5, opened_at=opened))
    ending = asyncio.Event()
    job = asyncio.create_task(every_day(books.db, ending))
    found: list[object] = []

    async def look() -> None:
        while not found:
            found.extend(await read(books.db, "test", statements))
            await asyncio.sleep(0.01)

    looking = asyncio.create_task(look())
    await until(lambda: found)
    ending.set()
    await asyncio.wait_for(asyncio.gather(job, looking), 5)
