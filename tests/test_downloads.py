"""Streamed downloads from a server-side cursor, and clients that leave. Row 15."""

from __future__ import annotations

import asyncio
import re
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import TextClause, text

from tests.support import Flavour, RawClient, until
from tornado_sa import AsyncSessionHandler, read_only

ROWS = 100_000
# 500 characters each, so 50 MB in all. One that is made while it is read.
PADDED = {"postgresql": "lpad(cast(n AS text), 500)", "sqlite": "printf('%500d', n)"}
GET = "GET / HTTP/1.1\nHost: x"


def statement(flavour: Flavour) -> TextClause:
    return text(
        "WITH RECURSIVE numbers(n) AS"
        f" (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {ROWS})"
        f" SELECT {PADDED[flavour.dialect]} FROM numbers"
    ).execution_options(yield_per=1000)


def make_handler(flavour: Flavour, written: list[int], marked: bool = True) -> Any:
    """A handler that streams all rows and notes how many it has handed to the socket."""

    class Handler(flavour.Handler):
        async def get(self) -> None:
            if isinstance(self, AsyncSessionHandler):
                result = await self.session.stream_scalars(statement(flavour))
                try:
                    async for rows in result.partitions(1000):
                        await self.send(rows)
                finally:
                    await result.close()
            else:
                with closing(self.session.scalars(statement(flavour))) as result:
                    for rows in result.partitions(1000):
                        await self.send(rows)

        async def send(self, rows: Any) -> None:
            self.write("\n".join(rows) + "\n")
            await self.flush()
            written.append(len(rows))

        if marked:
            get = read_only(stream=True)(get)

    return Handler


def memory() -> int:
    """Resident memory of this process, in bytes."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.gen_test(timeout=60)
async def test_all_rows_arrive_and_memory_stays_flat(
    flavour: Flavour, serve: Any, base_url: str
) -> None:
    written: list[int] = []
    serve(make_handler(flavour, written))
    async with RawClient(base_url) as client:
        await client.send(GET + "\nConnection: close")
        before, most, length = memory(), 0, 0
        while chunk := await client.reader.read(1 << 20):
            length += len(chunk)
            most = max(most, memory())
    assert sum(written) == ROWS
    assert length > 500 * ROWS
    assert most - before < 20 << 20
    await until(lambda: flavour.checked_out() == 0)


@pytest.mark.parametrize("marked", [True, False], ids=["read_only", "unmarked"])
@pytest.mark.parametrize("leaves", ["reading", "not reading"])
@pytest.mark.gen_test(timeout=30)
async def test_client_leaves_half_way(
    flavour: Flavour,
    serve: Any,
    base_url: str,
    expected_log: list[str],
    leaves: str,
    marked: bool,
) -> None:
    """One who reads no further is waited for, and his rows stay in the database."""
    written: list[int] = []
    serve(make_handler(flavour, written, marked))
    async with RawClient(base_url) as client:
        await client.send(GET)
        await client.reader.readexactly(500_000)
        if leaves == "reading":
            for _ in range(10):
                await client.reader.readexactly(500_000)
        else:
            await until(lambda: has_stopped(written))
        assert flavour.checked_out() == 1
        client.vanish()
        await until(lambda: flavour.checked_out() == 0, seconds=1)
    assert sum(written) < ROWS
    # As Tornado has it: flush() raises StreamClosedError in the verb.
    expected_log += ["Uncaught exception GET /", "Cannot send error response after headers"]
    await no_query_runs(flavour)
    assert await flavour.in_scope(lambda session: session.scalar(text("SELECT 1"))) == 1


seen: list[int] = []


def has_stopped(written: list[int]) -> bool:
    """True when nothing more was written for a while."""
    seen.append(len(written))
    return len(seen) > 20 and seen[-20] == seen[-1]


async def no_query_runs(flavour: Flavour) -> None:
    if flavour.dialect != "postgresql":
        return
    query = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND pid <> pg_backend_pid() AND state <> 'idle'"
    )
    for _ in range(100):
        with flavour.admin.connect() as connection:
            if connection.scalar(query) == 0:
                return
        await asyncio.sleep(0.01)
    pytest.fail("a query is still running on the server")
