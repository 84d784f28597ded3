"""tornado_sa with an AsyncSession."""

import asyncio
import random

import options
import serve
import world
from world import World

from tornado_sa import AsyncDatabase, AsyncSessionHandler

READS = frozenset({"GET"}) if options.given.read_only else frozenset()
small = AsyncDatabase(options.ASYNC_URL, engine_options=world.SMALL_POOL)


class Plain(AsyncSessionHandler):
    async def get(self):
        self.write({"message": "Hello, world"})


class Db(AsyncSessionHandler):
    read_only_methods = READS

    async def get(self):
        self.write((await self.session.get(World, world.any_id())).as_dict())


class Queries(AsyncSessionHandler):
    read_only_methods = READS

    async def get(self):
        rows = [
            (await self.session.get(World, one)).as_dict()
            for one in world.any_ids(int(self.get_query_argument("n")))
        ]
        self.write({"rows": rows})


class Update(AsyncSessionHandler):
    async def get(self):
        row = await self.session.get(World, world.any_id())
        row.number = random.randint(1, world.ROWS)
        await self.session.commit()
        self.write(row.as_dict())


class Slow(AsyncSessionHandler):
    read_only_methods = READS

    async def get(self):
        await self.session.execute(world.SLEEP)
        self.write({"slept": True})


class Hold(AsyncSessionHandler):
    database = small
    read_only_methods = READS

    async def get(self):
        await self.session.execute(world.ONE)
        await asyncio.sleep(world.HELD)
        await self.session.execute(world.ONE)
        self.write({"held": True})


serve.tornado(
    [
        ("/plain", Plain),
        ("/db", Db),
        ("/queries", Queries),
        ("/update", Update),
        ("/slow", Slow),
        ("/hold", Hold),
    ],
    db=AsyncDatabase(options.ASYNC_URL, engine_options=world.POOL),
)
