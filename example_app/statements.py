"""The daily statement: what a day has done to each account, written once the day is over."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from datetime import UTC, date, datetime, time, timedelta

from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from example_app.database import AnyDatabase, write
from example_app.models import Account, Statement, Transfer

logger = logging.getLogger("example_app")

# A transfer bears the time before its COMMIT. Those of the last moment of a day are visible by now.
SETTLING = timedelta(minutes=5)


async def every_day(db: AnyDatabase, ending: asyncio.Event) -> None:
    """Write the statements of the days that are over, now and after each midnight.

    Returns when ``ending`` is set, and between two units of work: to cancel it
    could break off a COMMIT, whose outcome nobody would know.
    """
    while not ending.is_set():
        try:
            await write_missing(db, datetime.now(UTC))
        except Exception:
            logger.exception("Statements could not be written; tried again in a minute")
            pause = 60.0
        else:
            now = datetime.now(UTC)
            pause = (_over_at(now.date()) - now).total_seconds() + 1
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ending.wait(), pause)


async def write_missing(db: AnyDatabase, now: datetime) -> int:
    """Write the statements that are due and missing, each day in a transaction of its own.

    Returns how many days there were. Any number of processes may do this at
    the same time: of two that write the same day, one has its work rolled back.
    """
    days = 0
    try:
        while await write(db, "daily statement", write_next_day, now):
            days += 1
    except IntegrityError:
        logger.info("Another process writes the statements")
    return days


def write_next_day(session: Session, now: datetime) -> bool:
    """Write the statements of the first day that has none. False if none is due."""
    latest = session.scalar(select(func.max(Statement.day)))
    if latest is not None:
        day = latest + timedelta(days=1)
    else:
        opened = session.scalar(select(func.min(Account.opened_at)))
        if opened is None:
            return False
        day = opened.date()
    if now < _over_at(day):
        return False
    begins = datetime.combine(day, time(), UTC)
    ends = begins + timedelta(days=1)
    received = _moved(session, "to_id", begins, ends)
    paid = _moved(session, "from_id", begins, ends)
    before = session.execute(
        select(Statement.account_id, Statement.closing).where(
            Statement.day == day - timedelta(days=1)
        )
    )
    closings = {account_id: closing for account_id, closing in before}
    for account in session.scalars(select(Account).where(Account.opened_at < ends)):
        opening = closings.get(account.id, account.opening)
        statement = Statement(
            account_id=account.id,
            day=day,
            received=received.get(account.id, 0),
            paid=paid.get(account.id, 0),
            closing=opening + received.get(account.id, 0) - paid.get(account.id, 0),
        )
        session.add(statement)
    return True


def _over_at(day: date) -> datetime:
    return datetime.combine(day + timedelta(days=1), time(), UTC) + SETTLING


def _moved(session: Session, side: str, begins: datetime, ends: datetime) -> dict[int, int]:
    column = getattr(Transfer, side)
    rows = session.execute(
        select(column, func.sum(Transfer.amount))
        .where(Transfer.created_at >= begins, Transfer.created_at < ends)
        .group_by(column)
    )
    return {account_id: int(amount) for account_id, amount in rows}
