"""A program that uses a database, forks, and uses it again in each process.

    python -m tests.forking HOW FLAVOUR URL

HOW is ``os.fork``, ``fork_processes`` or ``server.start``. Each process prints one line: who it is,
its number of notes, and the server connections that its two engines have, if there is a server.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from typing import Any

from sqlalchemy import func, select, text
from tornado.httpserver import HTTPServer
from tornado.ioloop import IOLoop
from tornado.process import fork_processes, task_id
from tornado.testing import bind_unused_port
from tornado.web import Application

from tests.support import Note, make_database, settle
from tornado_sa import AsyncDatabase, AsyncSessionHandler, SessionHandler

CHILDREN = 2


async def use(db: Any, who: str) -> str:
    """Write a note as ``who`` and read all; return the line to print."""
    gc.collect()  # what a child collects must not be the parent's connections
    await run(db, "begin", lambda session: session.add(Note(text=who)))
    number = await run(db, "scope", lambda session: session.scalar(select(func.count(Note.id))))
    found = [who, str(number)]
    if db.engine.dialect.name == "postgresql":
        pid = text("SELECT pg_backend_pid()")
        for read_only in (False, True):
            found.append(
                str(await run(db, "scope", lambda session: session.scalar(pid), read_only))
            )
    return " ".join(found)


async def work(db: Any, who: str) -> None:
    """All that a process does, to its end."""
    print(await use(db, who), flush=True)
    await settle(db.dispose())


async def run(db: Any, block: str, function: Any, read_only: bool = False) -> Any:
    options = {"read_only": True} if read_only else {}
    if isinstance(db, AsyncDatabase):
        async with getattr(db, block)(**options) as session:
            return await session.run_sync(function)
    with getattr(db, block)(**options) as session:
        return function(session)


def main(how: str, flavour: str, url: str) -> None:
    db = make_database(flavour, url, engine_options={"pool_size": 1})
    loop = asyncio.new_event_loop()
    print(loop.run_until_complete(use(db, "before")), flush=True)
    try:
        if how == "os.fork":  # with a loop that stays open
            for number in range(CHILDREN):
                if os.fork() == 0:
                    asyncio.run(work(db, f"child{number}"))
                    os._exit(0)
                assert os.wait()[1] == 0
        else:  # Tornado's own functions want none that is open, and keep the parent to themselves
            loop.close()
            if how == "fork_processes":
                number = fork_processes(CHILDREN, max_restarts=0)
                asyncio.run(work(db, f"child{number}"))
            else:
                serve(db, flavour)
            return
    except SystemExit as end:  # all children have ended
        assert end.code == 0
        loop = asyncio.new_event_loop()
    loop.run_until_complete(work(db, "after"))
    loop.close()


def serve(db: Any, flavour: str) -> None:
    """As Tornado's guide has it: bind, start, and run. Each process answers one request."""
    base: Any = SessionHandler
    if isinstance(db, AsyncDatabase) and not flavour.startswith("bridged"):
        base = AsyncSessionHandler

    class Handler(base):
        async def get(self) -> None:
            found = await settle(self.session.scalar(select(func.count(Note.id))))
            assert found > 0
            print(await use(db, f"child{task_id()}"), flush=True)
            server.stop()
            IOLoop.current().add_callback(IOLoop.current().stop)

    sock, port = bind_unused_port()
    sock.close()
    server = HTTPServer(Application([("/", Handler)], db=db))
    server.bind(port, "127.0.0.1")
    print(f"port {port}", flush=True)
    server.start(CHILDREN, max_restarts=0)
    IOLoop.current().start()
    IOLoop.current().run_sync(lambda: settle(db.dispose()))


if __name__ == "__main__":
    main(*sys.argv[1:])
