"""The fire drill: load on the example application while everything around it breaks.

Usage: ``python benchmarks/fire.py [--transfers 2000] [--database-url postgresql+asyncpg://...]``

Starts the example application on a database of its own, an SQLite file unless a server is named,
and sends it transfers from several clients, each with an ``Idempotency-Key``. Meanwhile it ends
database connections with ``pg_terminate_backend``, kills the server process, by turns with SIGKILL
and SIGTERM, and starts it again; and some clients close their socket instead of waiting for the
answer. Then it checks the books:

* no money was made or lost, and each balance is what the transfers make it;
* a transfer that was answered with 201 is there, once, as it was ordered (else it is *lost*);
* one that was refused is not there, and no other is there that nobody ordered (*phantom*);
* none is there twice (*doubled*);
* one whose answer never came, or was an error, is there or not; asked again with its key, it is
  there exactly once;
* no connection is out, none idles in a transaction, nothing is prepared, nobody holds a lock.

Prints a table; exits with 1 if the books are wrong. The full drill of the project is
``--transfers 20000 --kill-connections 200 --kill-servers 10``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, make_url, text

ROOT = Path(__file__).parents[1]
OPENING = 100_000
ACCOUNTS = 12
# How many requests a client breaks off, as a part of all.
ABORTED = 0.02
# What a client is told that can be anything, and so is asked again.
UNSURE = ("no answer", "broken off", "500", "503")


@dataclass
class Transfer:
    """One transfer that a client wants, and what became of it."""

    key: str
    order: dict[str, Any]
    outcome: str = "not sent"
    answers: list[str] = field(default_factory=list)


class Server:
    """The example application in a process, which is started again whenever it has ended."""

    def __init__(self, url: str, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.log = (folder / "server.log").open("w+")
        self._command = [sys.executable, "-m", "example_app"]
        self._command += ["--port", str(self.port), "--database-url", url]
        self.killed: Counter[str] = Counter()
        self.unclean = 0
        self.by_itself = 0
        self._ending = False

    def start(self) -> None:
        self._ending = False
        self.process = subprocess.Popen(
            self._command, cwd=ROOT, stdout=self.log, stderr=subprocess.STDOUT
        )

    async def end(self, signum: signal.Signals) -> None:
        """Send the signal, and wait for the end. After SIGTERM it must be a clean one."""
        self._ending = True
        self.process.send_signal(signum)
        code = await asyncio.to_thread(self.process.wait, 30)
        if signum == signal.SIGTERM and code != 0:
            self.unclean += 1

    async def look_after(self) -> None:
        """Start it again when it could not start: its connection was killed on the way up."""
        while True:
            if not self._ending and self.process.poll() is not None:
                self.by_itself += 1
                self.start()
            await asyncio.sleep(0.05)


class Client:
    """One connection to the server, made anew whenever it breaks."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(
        self, method: str, path: str, body: Any = None, key: str = "", abort: bool = False
    ) -> tuple[str, Any]:
        """Send one request; return the status and the body, or why there are none."""
        reader, writer = await self._connected()
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
        if content:
            head += "Content-Type: application/json\r\n"
        if key:
            head += f"Idempotency-Key: {key}\r\n"
        try:
            writer.write(head.encode() + b"\r\n" + content)
            await writer.drain()
            if abort:
                await asyncio.sleep(random.uniform(0, 0.01))
                self.close()
                return "broken off", None
            answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(answer.split("content-length: ")[1].split("\r\n")[0])
            received = await reader.readexactly(length)
            if "connection: close" in answer:
                self.close()
            return answer[9:12], json.loads(received)
        except (OSError, EOFError):
            self.close()
            return "no answer", None

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        deadline = time.monotonic() + 60
        while self._streams is None:
            try:
                self._streams = await asyncio.open_connection("127.0.0.1", self._port)
            except OSError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.02)
        return self._streams

    def close(self) -> None:
        """Leave without a goodbye."""
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None


class Drill:
    """Load, and what is done to it."""

    def __init__(self, options: argparse.Namespace, server: Server, admin: Engine) -> None:
        self.options, self.server, self.admin = options, server, admin
        self.connections_killed = 0
        self.transfers: list[Transfer] = []
        self.sent = 0

    async def run(self) -> None:
        first = Client(self.server.port)
        for number in range(ACCOUNTS):
            account = {"owner": f"Owner {number}", "currency": "EUR", "balance": OPENING}
            status, body = await first.ask("POST", "/accounts", account)
            assert (status, body["id"]) == ("201", number + 1), (status, body)
        first.close()
        for number in range(self.options.transfers):
            source, target = random.sample(range(1, ACCOUNTS + 1), 2)
            order = {"from": source, "to": target, "amount": random.randint(1, 20_000)}
            key = f"fire-{number}"
            self.transfers.append(Transfer(key, {**order, "memo": key}))
        waiting = iter(self.transfers)
        load = [asyncio.create_task(self.client(waiting)) for _ in range(self.options.clients)]
        breakers = [
            asyncio.create_task(self.kill_connections()),
            asyncio.create_task(self.kill_servers()),
        ]
        await asyncio.gather(*load, *breakers)

    async def client(self, waiting: Any) -> None:
        client = Client(self.server.port)
        for transfer in waiting:
            self.sent += 1
            abort = random.random() < ABORTED
            status, _ = await client.ask(
                "POST", "/transfers", transfer.order, transfer.key, abort=abort
            )
            transfer.outcome = status
            transfer.answers.append(status)
        client.close()

    async def reach(self, part: float) -> None:
        """Wait until so large a part of the transfers was sent."""
        while self.sent < part * len(self.transfers):  # noqa: ASYNC110  (a count, no event)
            await asyncio.sleep(0.002)

    async def kill_connections(self) -> None:
        if self.admin.dialect.name != "postgresql":
            return
        wanted = self.options.kill_connections
        with self.admin.connect() as connection:
            while self.connections_killed < wanted:
                await self.reach(self.connections_killed / (wanted + 1))
                # One at work, if there is one: that is where it hurts.
                self.connections_killed += (
                    connection.scalar(
                        text(
                            "SELECT count(pg_terminate_backend(pid)) FROM (SELECT pid"
                            " FROM pg_stat_activity WHERE datname = current_database()"
                            " AND pid != pg_backend_pid()"
                            " ORDER BY state = 'idle', random() LIMIT 1) AS one"
                        )
                    )
                    or 0
                )
                await asyncio.sleep(0.001)
                if self.sent == len(self.transfers):
                    break

    async def kill_servers(self) -> None:
        wanted = self.options.kill_servers
        for number in range(wanted):
            await self.reach((number + 1) / (wanted + 1))
            signum = signal.SIGTERM if number % 2 else signal.SIGKILL
            await self.server.end(signum)
            self.server.killed[signum.name] += 1
            self.server.start()

    async def ask_again(self) -> int:
        """Repeat, with its key, whatever is not known to be done or refused."""
        client = Client(self.server.port)
        asked = 0
        for transfer in self.transfers:
            while transfer.outcome in UNSURE:
                asked += 1
                transfer.outcome, _ = await client.ask(
                    "POST", "/transfers", transfer.order, transfer.key
                )
                transfer.answers.append(transfer.outcome)
        client.close()
        return asked


@dataclass
class Findings:
    """What is wrong in the books."""

    lost: list[str]
    doubled: list[str]
    phantom: list[str]
    total: int
    off: int
    stored: int

    def wrong(self) -> bool:
        made_or_lost = self.total != ACCOUNTS * OPENING
        return bool(self.lost or self.doubled or self.phantom or made_or_lost or self.off)


def check(connection: Connection, transfers: list[Transfer]) -> Findings:
    """Hold the books against what the clients were told."""
    rows = connection.execute(
        text("SELECT idempotency_key, from_id, to_id, amount, memo FROM transfer")
    ).all()
    times = Counter(row[0] for row in rows)
    stored = {
        row[0]: {"from": row[1], "to": row[2], "amount": row[3], "memo": row[4]} for row in rows
    }
    ordered = {transfer.key: transfer for transfer in transfers}
    phantom = [key for key, order in stored.items() if ordered[key].order != order]
    phantom += [one.key for one in transfers if one.outcome == "422" and one.key in stored]
    lost = [one.key for one in transfers if one.outcome == "201" and one.key not in stored]
    total = connection.scalar(text("SELECT sum(balance) FROM account")) or 0
    off = connection.scalar(
        text(
            "SELECT count(*) FROM account WHERE balance < balance_limit OR balance != opening"
            " + (SELECT coalesce(sum(amount), 0) FROM transfer WHERE to_id = account.id)"
            " - (SELECT coalesce(sum(amount), 0) FROM transfer WHERE from_id = account.id)"
        )
    )
    doubled = [key for key, count in times.items() if count > 1]
    return Findings(lost, doubled, phantom, int(total), int(off or 0), len(rows))


def left_behind(connection: Connection) -> dict[str, int]:
    """What the server of the database still has of us."""
    if connection.dialect.name != "postgresql":
        return {}
    here = "datname = current_database() AND pid != pg_backend_pid()"
    questions = {
        "idle in transaction": f"pg_stat_activity WHERE state LIKE 'idle in%' AND {here}",
        "active": f"pg_stat_activity WHERE state = 'active' AND {here}",
        "prepared": "pg_prepared_xacts WHERE database = current_database()",
        "locks": "pg_locks WHERE locktype IN ('transactionid', 'tuple', 'advisory') AND database ="
        " (SELECT oid FROM pg_database WHERE datname = current_database())",
    }
    return {
        what: connection.scalar(text(f"SELECT count(*) FROM {where}")) or 0
        for what, where in questions.items()
    }


async def drill(options: argparse.Namespace, url: URL, folder: Path) -> bool:
    """Run it and print the table. True if all is well."""
    plain = {"postgresql": "postgresql+psycopg", "sqlite": "sqlite"}[url.get_backend_name()]
    admin = create_engine(url.set(drivername=plain), isolation_level="AUTOCOMMIT")
    server = Server(url.render_as_string(hide_password=False), folder)
    run = Drill(options, server, admin)
    server.start()
    looking = asyncio.create_task(server.look_after())
    begun = time.monotonic()
    try:
        await run.run()
        seconds = time.monotonic() - begun
        outcomes = Counter(transfer.outcome for transfer in run.transfers)
        await asyncio.sleep(0.5)  # what was broken off runs to its end
        with admin.connect() as connection:
            before = check(connection, run.transfers)
        again = await run.ask_again()
        await asyncio.sleep(0.5)
        with admin.connect() as connection:
            after = check(connection, run.transfers)
            left = left_behind(connection)
        client = Client(server.port)
        _, health = await client.ask("GET", "/healthz")
        client.close()
        left["connections out"] = health["connections_out"]
        left["units of work open"] = health["units_of_work"]
        await server.end(signal.SIGTERM)
    finally:
        looking.cancel()
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()
        admin.dispose()

    def row(what: str, value: object) -> None:
        print(f"{what:44} {value!s:>12}")

    row("database", url.drivername)
    row("transfers sent", f"{run.sent:,}")
    row("seconds", f"{seconds:.1f}")
    for outcome, count in sorted(outcomes.items()):
        row(f"  first answer: {outcome}", f"{count:,}")
    row("database connections killed", run.connections_killed)
    row("servers ended by SIGKILL", server.killed["SIGKILL"])
    row("servers ended by SIGTERM", server.killed["SIGTERM"])
    row("  of which not with exit code 0", server.unclean)
    row("servers that could not start, and did again", server.by_itself)
    row("asked again by key", f"{again:,}")
    row("stored, before and after that", f"{before.stored:,} / {after.stored:,}")
    for what in ("lost", "doubled", "phantom"):
        row(what, f"{len(getattr(before, what))} / {len(getattr(after, what))}")
    row("accounts whose balance is off", f"{before.off} / {after.off}")
    row("money", f"{after.total:,} of {ACCOUNTS * OPENING:,}")
    for what, count in left.items():
        row(f"left behind: {what}", count)
    unanswered = [one.key for one in run.transfers if one.outcome not in ("201", "422")]
    complete = after.stored == sum(one.outcome == "201" for one in run.transfers)
    well = not (before.wrong() or after.wrong() or any(left.values()) or unanswered)
    well = well and complete and not server.unclean
    print("the books are right" if well else f"THE BOOKS ARE WRONG: {before} {after}")
    if not well or options.verbose:
        server.log.seek(0)
        lines = [line for line in server.log if " tornado.access: " not in line]
        print("".join(lines if options.verbose else lines[-60:]), file=sys.stderr)
    server.log.close()
    return well


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--transfers", type=int, default=2000)
    parser.add_argument("--kill-connections", type=int, default=20)
    parser.add_argument("--kill-servers", type=int, default=4)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--verbose", action="store_true", help="print the server's log, too")
    parser.add_argument(
        "--database-url",
        default="sqlite://",
        help="a driver, and for PostgreSQL a server, on which a database is made for the drill",
    )
    options = parser.parse_args()
    random.seed(options.seed)
    url = make_url(options.database_url)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if url.get_backend_name() == "sqlite":
            return int(not asyncio.run(drill(options, url.set(database=f"{name}/fire.db"), folder)))
        server = create_engine(url.set(drivername="postgresql+psycopg"))
        server = server.execution_options(isolation_level="AUTOCOMMIT")
        own = f"fire_{os.getpid()}_{uuid.uuid4().hex[:6]}"
        with server.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {own}"))
        try:
            return int(not asyncio.run(drill(options, url.set(database=own), folder)))
        finally:
            with server.connect() as connection:
                connection.execute(text(f"DROP DATABASE {own} WITH (FORCE)"))
            server.dispose()


if __name__ == "__main__":
    sys.exit(main())
