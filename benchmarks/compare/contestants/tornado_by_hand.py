"""The reference: Tornado, and `async with async_sessionmaker()` in each handler."""

import asyncio
import random

import options
import serve
import world
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from tornado.web import RequestHandler
from world import World

make_session = async_sessionmaker(create_async_engine(options.ASYNC_URL, **world.POOL))
make_small = async_sessionmaker(create_async_engine(options.ASYNC_URL, **world.SMALL_POOL))


class Plain(RequestHandler):
    async def get(self):
        async with make_session():
            self.write({"message": "Hello, world"})


class Db(RequestHandler):
    async def get(self):
        async with make_session() as session:
            self.write((await session.get(World, world.any_id())).as_dict())


class Queries(RequestHandler):
    async def get(self):
        async with make_session() as session:
            rows = [
                (await session.get(World, one)).as_dict()
                for one in world.any_ids(int(self.get_query_argument("n")))
            ]
            self.write({"rows": rows})


class Update(RequestHandler):
    async def get(self):
        async with make_session(expire_on_commit=False) as session:
            row = await session.get(World, world.any_id())
            row.number = random.randint(1, world.ROWS)
            await session.commit()
            self.write(row.as_dict())


class Slow(RequestHandler):
    async def get(self):
        async with make_session() as session:
            await session.execute(world.SLEEP)
            self.write({"slept": True})
            if options.given.answer_first:
                self.finish()


class Hold(RequestHandler):
    async def get(self):
        async with make_small() as session:
            await session.execute(world.ONE)
            await asyncio.sleep(world.HELD)
            await session.execute(world.ONE)
            self.write({"held": True})


serve.tornado(
    [
        ("/plain", Plain),
        ("/db", Db),
        ("/queries", Queries),
        ("/update", Update),
        ("/slow", Slow),
        ("/hold", Hold),
    ]
)
