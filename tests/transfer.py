"""A program that moves 10 from one database to another, and stops or dies at a given step.

    python -m tests.transfer FLAVOUR URL URL STEP [kill | wait]

The steps are those of a two-phase commit; the hooks are events of SQLAlchemy, in this program.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Any

from sqlalchemy import Engine, event, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from tornado_sa import AsyncDatabase, Database, TornadoSAError


class Base(DeclarativeBase):
    """In the first database."""


class OtherBase(DeclarativeBase):
    """In the second."""


class Account(Base):
    __tablename__ = "account"

    id: Mapped[int] = mapped_column(primary_key=True)
    amount: Mapped[int]


class OtherAccount(OtherBase):
    __tablename__ = "other_account"

    id: Mapped[int] = mapped_column(primary_key=True)
    amount: Mapped[int]


# Step: the event, its how manieth time, and whether the listener comes before that of tornado_sa.
STEPS: dict[str, tuple[str, int, bool]] = {
    "before the first prepare": ("prepare_twophase", 1, False),
    "between the prepares": ("prepare_twophase", 2, False),
    "before the decision": ("commit_twophase", 1, True),
    "after the decision": ("commit_twophase", 1, False),
    "between the commits": ("commit_twophase", 2, False),
    "never": ("commit_twophase", 9, False),
}


def make(flavour: str, url: str, other: str, **options: Any) -> Any:
    made: Any = Database if flavour == "sync" else AsyncDatabase
    return made(
        url, binds={OtherBase: other}, session_options={"twophase": True} | options, ping_after=None
    )


def engines_of(db: Any) -> list[Engine]:
    found = [db.engine, db.binds[OtherBase]]
    return [getattr(engine, "sync_engine", engine) for engine in found]


def at(db: Any, step: str, do: Any) -> None:
    """Call ``do(connection, xid)`` at ``step``."""
    name, number, first = STEPS[step]
    engines, count = engines_of(db), 0

    def listener(connection: Any, xid: Any, *_: Any) -> None:
        nonlocal count
        if connection.engine in engines:
            count += 1
            if count == number:
                do(connection, xid)

    # Those of the class come before those of an engine, whenever they were added.
    for target in [Engine] if first else engines:
        event.listen(target, name, listener)


def move(session: Session) -> None:
    """Once by the ORM, once by Core: they find their engine in different ways."""
    account = session.get(Account, 1)
    assert account is not None
    account.amount = Account.amount - 10
    session.execute(update(OtherAccount).values(amount=OtherAccount.amount + 10))


async def transfer(flavour: str, db: Any) -> None:
    if flavour == "sync":
        with db.begin() as session:
            move(session)
    elif flavour == "async":
        async with db.begin() as session:
            (await session.get(Account, 1)).amount = Account.amount - 10
            await session.execute(update(OtherAccount).values(amount=OtherAccount.amount + 10))
    else:
        async with db.begin():
            await db.run_sync(move)


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wait(*_: Any) -> None:
    print("there", flush=True)
    sys.stdin.readline()


async def main(flavour: str, url: str, other: str, step: str, what: str) -> None:
    db = make(flavour, url, other)
    at(db, step, die if what == "kill" else wait)
    try:
        await transfer(flavour, db)
    except TornadoSAError as error:
        print(error)
    else:
        print("stored")
    if flavour == "sync":
        db.dispose()
    else:
        await db.dispose()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
