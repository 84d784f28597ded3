"""One process that serves: from its start to its end in good order."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from example_app.app import create_schema, make_app, open_database
from example_app.database import dispose
from example_app.server import DrainingServer
from example_app.statements import every_day

# The largest body of a request, in bytes: a transfer takes some hundred.
MAX_BODY = 64 * 1024

# How long requests in flight may take once the server has been asked to end, in seconds.
GRACE = 10.0

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class CannotStart(Exception):
    """The server cannot start, for a reason that fits in one line."""


@dataclass(frozen=True)
class Serving:
    """What a process needs to know to serve."""

    database_url: str
    debug: bool
    sockets: Sequence[socket.socket]


async def prepare(database_url: str) -> None:
    """Bring the database up to date. Raises `CannotStart`."""
    with starting("Cannot use the database"):
        db = open_database(database_url)
    try:
        with starting(f"Cannot use {db!r}"):
            await create_schema(db)
    finally:
        await dispose(db)


async def serve(serving: Serving, ready: Callable[[], None], parent: int | None = None) -> None:
    """Call ``ready``, answer requests until a signal comes, and end in good order.

    A process that serves beside others ends too when ``parent``, a pipe that
    its parent holds the other end of, is closed: so none outlives it.
    """
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in SIGNALS:
        loop.add_signal_handler(signum, ending.set)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # held back until now: see `processes`
    if parent is not None:
        loop.add_reader(parent, ending.set)

    with starting("Cannot use the database"):
        db = open_database(serving.database_url, serving.debug)
    jobs: list[asyncio.Task[None]] = []
    try:
        if parent is None:  # which has done so otherwise
            with starting(f"Cannot use {db!r}"):
                await create_schema(db)
        app = make_app(db, serving.debug)
        jobs.append(asyncio.create_task(every_day(db, ending), name="daily statement"))
        server = DrainingServer(app, max_body_size=MAX_BODY)
        server.add_sockets(serving.sockets)
        ready()
        await ending.wait()
        if parent is not None:
            loop.remove_reader(parent)
        server.stop()
        await app.settings["feed"].close()
        await server.drain(GRACE)
    finally:
        ending.set()
        if jobs:
            for late in (await asyncio.wait(jobs, timeout=GRACE))[1]:  # the database may hang
                late.cancel()
        await dispose(db)


@contextlib.contextmanager
def starting(failure: str) -> Iterator[None]:
    """Turn an error of a step on the way up into one line for people."""
    try:
        yield
    except Exception as error:  # any kind: drivers raise what they like
        # SQLAlchemy adds the statement and a link to what the driver said.
        cause = getattr(error, "orig", None) or error
        raise CannotStart(f"{failure}: {' '.join(str(cause).split())}") from error
