"""tornado_sa with a plain Session: over the bridge, or on a Database with --sync."""

import asyncio
import random
import time

import options
import serve
import world
from world import World

from tornado_sa import (
    AsyncDatabase,
    Database,
    SessionHandler,
    SessionWebSocketHandler,
    transactional,
)

READS = frozenset({"GET"}) if options.given.read_only else frozenset()

if options.given.sync:
    db = Database(options.SYNC_URL, engine_options=world.POOL)
    small = Database(options.SYNC_URL, engine_options=world.SMALL_POOL)
else:
    db = AsyncDatabase(options.ASYNC_URL, engine_options=world.POOL)
    small = AsyncDatabase(options.ASYNC_URL, engine_options=world.SMALL_POOL)


class Plain(SessionHandler):
    def get(self):
        self.write({"message": "Hello, world"})


class Db(SessionHandler):
    read_only_methods = READS

    def get(self):
        self.write(self.session.get(World, world.any_id()).as_dict())


class Queries(SessionHandler):
    read_only_methods = READS

    def get(self):
        rows = [
            self.session.get(World, one).as_dict()
            for one in world.any_ids(int(self.get_query_argument("n")))
        ]
        self.write({"rows": rows})


class Update(SessionHandler):
    @transactional
    def get(self):
        row = self.session.get(World, world.any_id())
        row.number = random.randint(1, world.ROWS)
        self.write(row.as_dict())


class Slow(SessionHandler):
    read_only_methods = READS

    def get(self):
        self.session.execute(world.SLEEP)
        self.write({"slept": True})


class Hold(SessionHandler):
    database = small
    read_only_methods = READS

    async def get(self):
        self.session.execute(world.ONE)
        await asyncio.sleep(world.HELD)
        self.session.execute(world.ONE)
        self.write({"held": True})


class SlowInThread(SessionHandler):
    read_only_methods = READS

    async def get(self):
        await db.to_thread(lambda: db.session.execute(world.SLEEP))
        self.write({"slept": True})


class HoldInThread(SessionHandler):
    database = small
    read_only_methods = READS

    async def get(self):
        await small.to_thread(self.hold)
        self.write({"held": True})

    def hold(self):
        small.session.execute(world.ONE)
        time.sleep(world.HELD)
        small.session.execute(world.ONE)


class Socket(SessionWebSocketHandler):
    def on_message(self, message):
        self.write_message(self.session.get(World, int(message)).as_dict())


def another(number):
    class Another(Update):
        def post(self):
            self.session.execute(world.ONE)

    return (f"/another/{number}", Another)


serve.tornado(
    [
        ("/plain", Plain),
        ("/db", Db),
        ("/queries", Queries),
        ("/update", Update),
        ("/slow", SlowInThread if options.given.sync else Slow),
        ("/hold", HoldInThread if options.given.sync else Hold),
        ("/socket", Socket),
        *map(another, range(options.given.classes)),
    ],
    db=db,
)
