"""A server that stores notes, and a mail for each; SIGTERM ends it in good order.

python -m tests.serving FLAVOUR URL
"""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Any

from tornado.testing import bind_unused_port
from tornado.web import Application

from example_app.server import DrainingServer
from tests.support import Note, make_database, settle
from tornado_sa import AsyncDatabase, AsyncSessionHandler, SessionHandler, transactional


async def main(flavour: str, url: str) -> None:
    ending = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ending.set)
    db = make_database(flavour, url, engine_options={"pool_size": 5, "max_overflow": 0})
    is_async = isinstance(db, AsyncDatabase)
    is_bridged = flavour.startswith("bridged")
    base: Any = AsyncSessionHandler if is_async and not is_bridged else SessionHandler

    def store(text: str) -> None:
        with db.begin("mail") as session:
            session.add(Note(text=text))

    async def store_later(text: str) -> None:
        await asyncio.sleep(0.05)
        async with db.begin("mail") as session:
            session.add(Note(text=text))

    class Handler(base):
        @transactional(retries=20)
        async def post(self) -> None:
            text = self.get_argument("text")
            self.session.add(Note(text=text))
            await settle(self.session.flush())
            if is_async:
                await asyncio.sleep(0.02)
            self.after_commit(store_later if is_async else store, f"mail for {text}")
            self.write(text)

    server = DrainingServer(Application([("/", Handler)], db=db))
    sock, port = bind_unused_port()
    server.add_socket(sock)
    print(port, flush=True)
    await ending.wait()
    await server.drain(timeout=10)
    await settle(db.dispose(timeout=10))
    print(db.status())


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
