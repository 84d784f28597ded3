"""Reading the books: lists a page at a time, and each account's past."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from example_app.models import Account, Transfer


@dataclass(frozen=True)
class Total:
    """The money in one currency. The books are right if ``balances == openings``."""

    currency: str
    accounts: int
    balances: int
    openings: int


def accounts_page(session: Session, limit: int, after: int | None = None) -> list[Account]:
    """Accounts, oldest first, from behind the one with id ``after``."""
    wanted = select(Account).order_by(Account.id).limit(limit)
    if after is not None:
        wanted = wanted.where(Account.id > after)
    return list(session.scalars(wanted))


def transfers_page(
    session: Session, limit: int, before: int | None = None, account_id: int | None = None
) -> list[Transfer]:
    """Transfers, latest first, from before the one with id ``before``; all, or one account's."""
    wanted = select(Transfer).order_by(Transfer.id.desc()).limit(limit)
    if before is not None:
        wanted = wanted.where(Transfer.id < before)
    if account_id is not None:
        wanted = wanted.where(or_(Transfer.from_id == account_id, Transfer.to_id == account_id))
    return list(session.scalars(wanted))


def totals(session: Session) -> list[Total]:
    """How much money there is in each currency, and how much there must be."""
    rows = session.execute(
        select(
            Account.currency,
            func.count(),
            func.sum(Account.balance),
            func.sum(Account.opening),
        )
        .group_by(Account.currency)
        .order_by(Account.currency)
    )
    # As integers: a sum of BIGINTs is a Decimal to PostgreSQL.
    return [Total(name, count, int(now), int(then)) for name, count, now, then in rows]


def past_balances(
    account: Account, latest_first: Iterable[Transfer]
) -> Sequence[tuple[datetime, int]]:
    """The balance of ``account`` after each of these transfers, which are its latest ones.

    In order of time, and first what it was before them.
    """
    balance = account.balance
    points = []
    earliest = account.opened_at
    for transfer in latest_first:
        if account.id not in (transfer.from_id, transfer.to_id):
            continue
        points.append((transfer.created_at, balance))
        balance += transfer.amount if transfer.from_id == account.id else -transfer.amount
        earliest = transfer.created_at
    if balance == account.opening:
        earliest = min(account.opened_at, earliest)
    return [(earliest, balance), *reversed(points)]
