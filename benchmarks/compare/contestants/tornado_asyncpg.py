"""The limit: Tornado and the driver, without SQLAlchemy."""

import asyncio
import random

import asyncpg
import options
import serve
import world
from tornado.web import RequestHandler

TABLE = world.World.__tablename__
SELECT = f"SELECT id, number FROM {TABLE} WHERE id = $1"


class Pool:
    """Made by the first request, for it needs the loop."""

    def __init__(self, size):
        self.size = size
        self.made = None

    async def acquire(self):
        if self.made is None:
            self.made = asyncpg.create_pool(options.PLAIN_URL, min_size=0, max_size=self.size)
            await self.made
        return self.made.acquire()


pool, small_pool = Pool(20), Pool(2)


class Plain(RequestHandler):
    def get(self):
        self.write({"message": "Hello, world"})


class Db(RequestHandler):
    async def get(self):
        async with await pool.acquire() as connection:
            self.write(dict(await connection.fetchrow(SELECT, world.any_id())))


class Queries(RequestHandler):
    async def get(self):
        async with await pool.acquire() as connection:
            rows = [
                dict(await connection.fetchrow(SELECT, one))
                for one in world.any_ids(int(self.get_query_argument("n")))
            ]
        self.write({"rows": rows})


class Update(RequestHandler):
    async def get(self):
        async with await pool.acquire() as connection, connection.transaction():
            row = dict(await connection.fetchrow(SELECT, world.any_id()))
            row["number"] = random.randint(1, world.ROWS)
            await connection.execute(
                f"UPDATE {TABLE} SET number = $1 WHERE id = $2", row["number"], row["id"]
            )
        self.write(row)


class Slow(RequestHandler):
    async def get(self):
        async with await pool.acquire() as connection:
            await connection.fetchrow(world.SLEEP.text)
        self.write({"slept": True})


class Hold(RequestHandler):
    async def get(self):
        async with await small_pool.acquire() as connection:
            await connection.fetchrow(world.ONE.text)
            await asyncio.sleep(world.HELD)
            await connection.fetchrow(world.ONE.text)
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
