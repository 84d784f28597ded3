"""What waiting for the database does to the event loop: slow queries, and a pool that is too small.

Usage: ``python benchmarks/loop.py [postgresql://user@host/database]``

Serves and asks in one process. Prints for each kind of handler how long all requests took, how
they were answered, and the longest time for which the loop did nothing else.
"""

import asyncio
import logging
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from sqlalchemy import make_url, text
from tornado.httpclient import AsyncHTTPClient
from tornado.netutil import bind_sockets
from tornado.web import Application

from tornado_sa import AsyncDatabase, AsyncSessionHandler, Database, SessionHandler

URL = make_url(sys.argv[1] if len(sys.argv) > 1 else "postgresql://postgres@127.0.0.1/postgres")
SLOW = text("SELECT pg_sleep(1)")
ONE = text("SELECT 1")


class SlowPlain(SessionHandler):
    def get(self):
        self.session.execute(SLOW)


class SlowAsync(AsyncSessionHandler):
    async def get(self):
        await self.session.execute(SLOW)


class HoldPlain(SessionHandler):
    async def get(self):
        self.session.execute(ONE)
        await asyncio.sleep(0.05)
        self.session.execute(ONE)


class HoldAsync(AsyncSessionHandler):
    async def get(self):
        await self.session.execute(ONE)
        await asyncio.sleep(0.05)
        await self.session.execute(ONE)


async def longest_gap(gaps):
    before = time.monotonic()
    while True:
        await asyncio.sleep(0.001)
        now = time.monotonic()
        gaps[0] = max(gaps[0], now - before)
        before = now


async def measure(name, handler, db, requests):
    # Connected and prepared beforehand: what a connect costs is not the question here.
    warm_up = Application([("/", handler)], db=db).listen
    sockets = bind_sockets(0, "127.0.0.1")
    port = sockets[0].getsockname()[1]
    sockets[0].close()
    server = warm_up(port, "127.0.0.1")
    client = AsyncHTTPClient(force_instance=True, max_clients=requests)
    gaps = [0.0]
    watch = asyncio.ensure_future(longest_gap(gaps))
    await asyncio.sleep(0.01)
    gaps[0] = 0.0
    began = time.monotonic()
    answers = await asyncio.gather(
        *(
            client.fetch(f"http://127.0.0.1:{port}/", raise_error=False, request_timeout=120)
            for _ in range(requests)
        )
    )
    took = time.monotonic() - began
    watch.cancel()
    codes = dict(Counter(answer.code for answer in answers))
    print(
        f"{name:48} {requests:3} requests {took:7.2f} s  longest gap {gaps[0] * 1000:7.0f} ms "
        f" answers {codes}",
        flush=True,
    )
    server.stop()
    client.close()


async def main():
    logging.getLogger("tornado_sa").setLevel(logging.CRITICAL)
    logging.getLogger("tornado.access").setLevel(logging.CRITICAL)
    driver = URL.set(drivername="postgresql+asyncpg")

    async def async_database(size):
        db = AsyncDatabase(driver, engine_options={"pool_size": size, "max_overflow": 0})
        connections = [await db.engine.connect() for _ in range(size)]
        for connection in connections:
            await connection.close()
        return db

    def database(size):
        plain = URL.set(drivername="postgresql+psycopg")
        return Database(plain, engine_options={"pool_size": size, "max_overflow": 0})

    for name, handler in (("bridge", SlowPlain), ("AsyncSession", SlowAsync)):
        db = await async_database(64)
        await measure(f"1 s queries, pool of 64, {name}", handler, db, 64)
        await db.dispose()
    db = database(64)
    await measure("1 s queries, pool of 64, Session on the loop", SlowPlain, db, 4)
    db.dispose()
    for name, handler in (("bridge", HoldPlain), ("AsyncSession", HoldAsync)):
        db = await async_database(2)
        await measure(f"held over 50 ms, pool of 2, {name}", handler, db, 16)
        await db.dispose()
    db = database(2)
    await measure("held over 50 ms, pool of 2, Session on the loop", HoldPlain, db, 16)
    db.dispose()


if __name__ == "__main__":
    asyncio.run(main())
