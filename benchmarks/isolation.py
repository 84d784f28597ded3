"""What isolation costs a test: ``isolated(db)`` around an empty body, and around one unit of work.

Usage: ``python benchmarks/isolation.py [URL ...]``, by default SQLite and PostgreSQL, each with a
sync and an async driver.

Prints milliseconds per test, the median of interleaved rounds: an empty test without isolation, an
empty one with it, and one that commits a row, with it.
"""

import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

from sqlalchemy import text

from tornado_sa import AsyncDatabase, Database
from tornado_sa.testing import isolated

FILE = tempfile.NamedTemporaryFile(suffix=".db")
URLS = sys.argv[1:] or [
    f"sqlite:///{FILE.name}",
    f"sqlite+aiosqlite:///{FILE.name}",
    "postgresql+psycopg://postgres@127.0.0.1/postgres",
    "postgresql+asyncpg://postgres@127.0.0.1/postgres",
]
ROUNDS = int(os.environ.get("ROUNDS", "200"))
CREATE = text("CREATE TABLE IF NOT EXISTS tornado_sa_isolation_benchmark (id int)")
INSERT = text("INSERT INTO tornado_sa_isolation_benchmark VALUES (1)")
DROP = text("DROP TABLE tornado_sa_isolation_benchmark")


async def execute(db, statement):
    if isinstance(db, Database):
        with db.begin() as session:
            session.execute(statement)
    else:
        async with db.begin() as session:
            await session.execute(statement)


async def empty(db):
    pass


async def with_isolation(db, body=empty):
    if isinstance(db, Database):
        with isolated(db):
            await body(db)
    else:
        async with isolated(db):
            await body(db)


async def with_unit(db):
    await with_isolation(db, lambda db: execute(db, INSERT))


async def measure(db, rounds=ROUNDS):
    """Milliseconds for each kind of test, by its name."""
    await execute(db, CREATE)
    taken = {empty: [], with_isolation: [], with_unit: []}
    try:
        for _ in range(rounds):
            for test, times in taken.items():
                start = time.perf_counter()
                await test(db)
                times.append(1000 * (time.perf_counter() - start))
    finally:
        await execute(db, DROP)
    return {test.__name__: median(times) for test, times in taken.items()}


def make(url):
    try:
        return Database(url)
    except Exception:
        return AsyncDatabase(url)


async def main():
    for url in URLS:
        db = make(url)
        figures = await measure(db)
        print(db, "  ".join(f"{name} {value:.3f} ms" for name, value in figures.items()))
        disposed = db.dispose()
        if disposed is not None:
            await disposed


if __name__ == "__main__":
    asyncio.run(main())
