"""What a read-only verb gains: requests per second, against the same verb in a transaction.

Usage: ``python benchmarks/read_only.py [URL ...]``, by default PostgreSQL by asyncpg and psycopg,
MariaDB, and an SQLite file. The pairs are a bridged verb, one with an ``AsyncSession``, and, by
hand, ``async_sessionmaker()`` on an engine in autocommit mode against one that is not.

In one process, without sockets to the clients, of which there are 16, in interleaved rounds. Prints
the median requests per second of each, and the median of the ratios within a round.
"""

import asyncio
import gc
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from tornado.httputil import HTTPHeaders, HTTPServerRequest, RequestStartLine
from tornado.web import Application, RequestHandler

from tests.test_memory import FakeConnection
from tornado_sa import AsyncDatabase, AsyncSessionHandler, SessionHandler, read_only

FILE = tempfile.NamedTemporaryFile(suffix=".db")
URLS = sys.argv[1:] or [
    "postgresql+asyncpg://postgres@127.0.0.1/postgres",
    "postgresql+psycopg://postgres@127.0.0.1/postgres",
    "mariadb+aiomysql://root@127.0.0.1/test",
    f"sqlite+aiosqlite:///{FILE.name}",
]
AT_ONCE = 16
COUNT = int(os.environ.get("COUNT", "640"))
ROUNDS = int(os.environ.get("ROUNDS", "15"))
POOL = {"pool_size": 40}


class Base(DeclarativeBase):
    pass


class Counter(Base):
    __tablename__ = "tornado_sa_read_only_benchmark"

    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int]


class Bridged(SessionHandler):
    def get(self):
        self.write({"number": self.session.get(Counter, 1).number})


class BridgedReadOnly(SessionHandler):
    @read_only
    def get(self):
        self.write({"number": self.session.get(Counter, 1).number})


class Async(AsyncSessionHandler):
    async def get(self):
        self.write({"number": (await self.session.get(Counter, 1)).number})


class AsyncReadOnly(AsyncSessionHandler):
    @read_only
    async def get(self):
        self.write({"number": (await self.session.get(Counter, 1)).number})


def by_hand(engine):
    make_session = async_sessionmaker(engine, expire_on_commit=False)

    class ByHand(RequestHandler):
        async def get(self):
            async with make_session() as session:
                self.write({"number": (await session.get(Counter, 1)).number})

    return ByHand


class Connection(FakeConnection):
    """Tells when the response is complete."""

    def __init__(self):
        self.answered = asyncio.get_running_loop().create_future()

    def finish(self):
        self.answered.set_result(None)


async def rate(db, handler, count):
    """Requests per second."""
    app = Application([("/", handler)], db=db, log_function=lambda handler: None)

    async def client():
        for _ in range(count // AT_ONCE):
            connection = Connection()
            request = HTTPServerRequest(
                connection=connection,
                headers=HTTPHeaders({"Host": "x"}),
                start_line=RequestStartLine("GET", "/", "HTTP/1.1"),
            )
            app.find_handler(request).finish()
            await connection.answered

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(AT_ONCE)))
    seconds = time.perf_counter() - began
    await asyncio.sleep(0.02)  # the last sessions are closed after their responses
    return count / seconds


async def compare(url):
    db = AsyncDatabase(url, engine_options=POOL)
    engine = create_async_engine(url, **POOL)
    autocommit = create_async_engine(url, isolation_level="AUTOCOMMIT", **POOL)
    async with db.begin() as session:
        connection = await session.connection()
        await connection.run_sync(Base.metadata.create_all)
        await session.merge(Counter(id=1, number=0))
    pairs = {
        "bridged": (Bridged, BridgedReadOnly),
        "async": (Async, AsyncReadOnly),
        "by hand": (by_hand(engine), by_hand(autocommit)),
    }
    print(url.partition(":")[0])
    handlers = [handler for pair in pairs.values() for handler in pair]
    for handler in handlers:
        await rate(db, handler, 96)
    rounds = []
    for _ in range(ROUNDS):
        gc.collect()
        gc.disable()
        rounds.append([await rate(db, handler, COUNT) for handler in handlers])
        gc.enable()
    for number, name in enumerate(pairs):
        measured = [(rates[2 * number], rates[2 * number + 1]) for rates in rounds]
        before, after = (median(column) for column in zip(*measured, strict=True))
        ratio = median(reading / other for other, reading in measured)
        print(f"  {name:8} {before:8.0f} -> {after:8.0f} requests/s, ratio {ratio:.2f}", flush=True)
    async with db.begin() as session:
        await (await session.connection()).run_sync(Base.metadata.drop_all)
    await db.dispose()
    await engine.dispose()
    await autocommit.dispose()


async def main():
    for url in URLS:
        await compare(url)


if __name__ == "__main__":
    asyncio.run(main())
