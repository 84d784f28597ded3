"""What the tests of the example application share: a look at its books, and a server process."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from example_app.database import AnyDatabase, read, write
from example_app.models import Account, Transfer

ROOT = Path(__file__).parents[2]


def count_rows(session: Session) -> tuple[int, int]:
    """How many accounts there are, and how many transfers."""
    accounts = session.scalar(select(func.count()).select_from(Account)) or 0
    transfers = session.scalar(select(func.count()).select_from(Transfer)) or 0
    return accounts, transfers


def list_balances(session: Session) -> list[int]:
    """The balance of each account, in the order of their ids."""
    return list(session.scalars(select(Account.balance).order_by(Account.id)))


def add_accounts(session: Session, *opening: int, currency: str = "EUR", limit: int = 0) -> Any:
    """Open an account for each balance; return their ids."""
    accounts = [
        Account(owner="Ada", currency=currency, balance=money, limit=limit) for money in opening
    ]
    session.add_all(accounts)
    session.flush()
    return [account.id for account in accounts]


def off_the_books(session: Session) -> list[int]:
    """The accounts whose balance is not what their transfers make it. Must be empty."""
    moved = {
        side: select(func.coalesce(func.sum(Transfer.amount), 0))
        .where(getattr(Transfer, side) == Account.id)
        .scalar_subquery()
        for side in ("from_id", "to_id")
    }
    return list(
        session.scalars(
            select(Account.id).where(
                Account.balance != Account.opening + moved["to_id"] - moved["from_id"]
            )
        )
    )


def checked_out(db: AnyDatabase) -> int:
    """The connections that are out, of the reader too."""
    pools: list[Any] = [db.engine.pool, db.reader.pool]
    return sum(pool.checkedout() for pool in pools)


class Books:
    """The application's database, as a test looks at it and fills it."""

    def __init__(self, db: AnyDatabase) -> None:
        self.db = db

    async def rows(self) -> tuple[int, int]:
        return await read(self.db, "test", count_rows)

    async def balances(self) -> list[int]:
        return await read(self.db, "test", list_balances)

    async def open(self, *opening: int, currency: str = "EUR", limit: int = 0) -> list[int]:
        ids: list[int] = await write(
            self.db, "test", add_accounts, *opening, currency=currency, limit=limit
        )
        return ids

    async def add(self, *rows: Any) -> None:
        await write(self.db, "test", Session.add_all, rows)

    async def check(self) -> None:
        assert await read(self.db, "test", off_the_books) == []


class Server:
    """``python -m example_app`` in a process of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.log = folder / f"stderr-{time.monotonic_ns()}"
        with self.log.open("w") as log:
            self.process: subprocess.Popen[str] = subprocess.Popen(
                **command(folder, "--port", "0", *arguments), stderr=log
            )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        found = re.fullmatch(
            r"Ledger on (http://127\.0\.0\.1:(\d+)) \(Ctrl-C ends it\)\n", self.line
        )
        assert found, self.line + self.log.read_text()
        self.url, self.port = found[1], int(found[2])

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> int:
        named = {"Content-Type": "application/json", **(headers or {})}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), named)
        try:
            with urllib.request.urlopen(request, timeout=20) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=20) as response:
            return json.load(response)

    def end(self, signum: int = signal.SIGTERM) -> int:
        """Send a signal; return the exit status."""
        self.process.send_signal(signum)
        return self.process.wait(timeout=8)


def command(folder: Path, *arguments: str) -> dict[str, Any]:
    """What ``subprocess`` needs to run the command line in ``folder``."""
    return {
        "args": [sys.executable, "-m", "example_app", *arguments],
        "cwd": folder,
        "env": {"PYTHONPATH": str(ROOT)},
        "stdout": subprocess.PIPE,
        "text": True,
    }


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    return subprocess.run(
        **command(folder, *arguments), stderr=subprocess.PIPE, timeout=20, check=False
    )


@contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[Server]:
    server = Server(folder, *arguments)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.communicate()
    assert "Traceback" not in server.log.read_text(), server.log.read_text()


def refused(folder: Path, *arguments: str) -> str:
    """Start a server that cannot start; return the one line it says."""
    done = run(folder, "--port", "0", *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("\n") and done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr and "hunter2" not in done.stderr
    return done.stderr
