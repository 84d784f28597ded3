"""tornado-sqlalchemy: its SessionMixin, queries on the loop, slow ones with as_future()."""

import random

import options
import serve
import world
from tornado.web import RequestHandler
from tornado_sqlalchemy import SessionMixin, SQLAlchemy, as_future, set_max_workers
from world import World

set_max_workers(20)


class Plain(SessionMixin, RequestHandler):
    def get(self):
        self.write({"message": "Hello, world"})


class Db(SessionMixin, RequestHandler):
    def get(self):
        with self.make_session() as session:
            self.write(session.get(World, world.any_id()).as_dict())


class Queries(SessionMixin, RequestHandler):
    def get(self):
        with self.make_session() as session:
            rows = [
                session.get(World, one).as_dict()
                for one in world.any_ids(int(self.get_query_argument("n")))
            ]
            self.write({"rows": rows})


class Update(SessionMixin, RequestHandler):
    def get(self):
        with self.make_session() as session:
            row = session.get(World, world.any_id())
            row.number = random.randint(1, world.ROWS)
            self.write(row.as_dict())


class Slow(SessionMixin, RequestHandler):
    async def get(self):
        with self.make_session() as session:
            await as_future(lambda: session.execute(world.SLEEP))
            self.write({"slept": True})


# No /hold: its COMMIT and its pool wait on the loop's thread.
serve.tornado(
    [
        ("/plain", Plain),
        ("/db", Db),
        ("/queries", Queries),
        ("/update", Update),
        ("/slow", Slow),
    ],
    db=SQLAlchemy(options.SYNC_URL, engine_options=world.POOL),
)
