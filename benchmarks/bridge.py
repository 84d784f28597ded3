"""What the bridge costs: CPU per request of a bridged verb, against the same verb by hand.

Usage: ``python benchmarks/bridge.py [postgresql+asyncpg://user@host/database]``

By hand is ``async with async_sessionmaker() as session`` in a bare ``RequestHandler``. In one
process, without sockets to the clients, of which there are 1, 4 or 16, in interleaved rounds, with
all connections open before and without the garbage collector. Prints the median of each, in
microseconds, and the median of the ratios to the one by hand.
"""

import asyncio
import gc
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from tornado.httputil import HTTPHeaders, HTTPServerRequest, RequestStartLine
from tornado.web import Application, RequestHandler

from tests.test_memory import FakeConnection
from tornado_sa import AsyncDatabase, AsyncSessionHandler, SessionHandler

URL = sys.argv[1] if len(sys.argv) > 1 else "postgresql+asyncpg://postgres@127.0.0.1/postgres"
CLIENTS = (1, 4, 16)
ROUNDS = 11

engine = create_async_engine(URL, pool_size=40)
make_session = async_sessionmaker(engine, expire_on_commit=False)
# 40, because ours close after the response: at times there are two for each client.
db = AsyncDatabase(URL, engine_options={"pool_size": 40})


class Base(DeclarativeBase):
    pass


class Counter(Base):
    __tablename__ = "tornado_sa_bridge_benchmark"

    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int]


class ByHand(RequestHandler):
    async def get(self):
        async with make_session() as session:
            self.write({"number": (await session.get(Counter, 1)).number})

    async def post(self):
        async with make_session() as session:
            found = [await session.get(Counter, number) for number in range(1, 11)]
        self.write({"numbers": [counter.number for counter in found]})

    async def put(self):
        async with make_session() as session:
            counter = await session.get(Counter, 1)
            counter.number += 1
            await session.commit()
        self.write({"number": counter.number})

    async def delete(self):
        pass


class Bridged(SessionHandler):
    def get(self):
        self.write({"number": self.session.get(Counter, 1).number})

    def post(self):
        found = [self.session.get(Counter, number) for number in range(1, 11)]
        self.write({"numbers": [counter.number for counter in found]})

    def put(self):
        counter = self.session.get(Counter, 1)
        counter.number += 1
        self.session.commit()
        self.write({"number": counter.number})

    def delete(self):
        pass


class Async(AsyncSessionHandler):
    async def get(self):
        self.write({"number": (await self.session.get(Counter, 1)).number})

    async def post(self):
        found = [await self.session.get(Counter, number) for number in range(1, 11)]
        self.write({"numbers": [counter.number for counter in found]})

    async def put(self):
        counter = await self.session.get(Counter, 1)
        counter.number += 1
        await self.session.commit()
        self.write({"number": counter.number})

    async def delete(self):
        pass


class Connection(FakeConnection):
    """Tells when the response is complete."""

    def __init__(self):
        self.answered = asyncio.get_running_loop().create_future()

    def finish(self):
        self.answered.set_result(None)


async def handle(app, method, count, clients):
    async def client():
        for _ in range(count // clients):
            connection = Connection()
            request = HTTPServerRequest(
                connection=connection,
                headers=HTTPHeaders({"Host": "x"}),
                start_line=RequestStartLine(method, "/", "HTTP/1.1"),
            )
            app.find_handler(request).finish()
            await connection.answered

    await asyncio.gather(*(client() for _ in range(clients)))
    await asyncio.sleep(0.02)  # the last sessions are closed after their responses


async def cpu(handler, method, count, clients):
    """Microseconds of CPU per request."""
    app = Application([("/", handler)], db=db, log_function=lambda handler: None)
    began = time.process_time()
    await handle(app, method, count, clients)
    return (time.process_time() - began) / count * 1e6


async def main():
    async with db.begin() as session:
        connection = await session.connection()
        await connection.run_sync(Base.metadata.create_all)
        for number in range(1, 11):
            await session.merge(Counter(id=number, number=0))
    for each in (engine, db.engine):
        for connection in [await each.connect() for _ in range(40)]:
            await connection.close()
    gc.disable()
    print(f"{'':22} {'by hand':>9} {'bridged':>9} {'async':>9}   ratio: bridged   async")
    kinds = (ByHand, Bridged, Async)
    for name, method, count in (
        ("one get", "GET", 960),
        ("ten gets", "POST", 240),
        ("an update", "PUT", 480),
        ("nothing", "DELETE", 1920),
    ):
        for clients in CLIENTS:
            for kind in kinds:
                await cpu(kind, method, count, clients)
            rounds = [
                [await cpu(kind, method, count, clients) for kind in kinds] for _ in range(ROUNDS)
            ]
            gc.collect()
            medians = [median(column) for column in zip(*rounds, strict=True)]
            ratios = [median(times[kind] / times[0] for times in rounds) for kind in (1, 2)]
            print(
                f"{name:10} {clients:2} at once "
                + " ".join(f"{one:9.1f}" for one in medians)
                + f"          {ratios[0]:8.3f} {ratios[1]:7.3f}",
                flush=True,
            )
    async with db.begin() as session:
        await (await session.connection()).run_sync(Base.metadata.drop_all)
    await db.dispose()
    await engine.dispose()


if __name__ == "__main__":
    asyncio.run(main())
