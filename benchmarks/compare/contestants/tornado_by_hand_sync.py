"""Tornado, and `with sessionmaker()` in each handler, which blocks the loop."""

import random

import options
import serve
import world
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker
from tornado.web import RequestHandler
from world import World

make_session = sessionmaker(create_engine(options.SYNC_URL, **world.POOL))


class Plain(RequestHandler):
    def get(self):
        with make_session():
            self.write({"message": "Hello, world"})


class Db(RequestHandler):
    def get(self):
        with make_session() as session:
            self.write(session.get(World, world.any_id()).as_dict())


class Queries(RequestHandler):
    def get(self):
        with make_session() as session:
            rows = [
                session.get(World, one).as_dict()
                for one in world.any_ids(int(self.get_query_argument("n")))
            ]
            self.write({"rows": rows})


class Update(RequestHandler):
    def get(self):
        with make_session(expire_on_commit=False) as session:
            row = session.get(World, world.any_id())
            row.number = random.randint(1, world.ROWS)
            session.commit()
            self.write(row.as_dict())


class Slow(RequestHandler):
    def get(self):
        with make_session() as session:
            session.execute(world.SLEEP)
            self.write({"slept": True})


# No /hold: a pool that is waited for on the loop's thread stops the process (60 s and more).
serve.tornado(
    [
        ("/plain", Plain),
        ("/db", Db),
        ("/queries", Queries),
        ("/update", Update),
        ("/slow", Slow),
    ]
)
