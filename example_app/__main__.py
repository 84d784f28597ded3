"""The command line: ``python -m example_app``."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tornado.netutil import bind_sockets

from example_app.app import create_schema, make_app, open_database
from example_app.server import DrainingServer
from tornado_sa import AsyncDatabase

ADDRESS = "127.0.0.1"

# The largest body of a request, in bytes: a transfer takes some hundred.
MAX_BODY = 64 * 1024

# How long requests in flight may take once the server has been asked to end, in seconds.
GRACE = 10.0


class CannotStart(Exception):
    """The server cannot start, for a reason that fits in one line."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until SIGINT or SIGTERM. Exits with 1 and one line on stderr if it cannot start."""
    options = parse_arguments(arguments)
    logging.basicConfig(
        level=logging.DEBUG if options.debug else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    try:
        asyncio.run(serve(options.port, options.database_url, options.debug))
    except CannotStart as error:
        sys.exit(str(error))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line. Exits with 2 if it cannot be understood."""
    parser = argparse.ArgumentParser(
        prog="python -m example_app", description="A small ledger: accounts and transfers."
    )
    parser.add_argument(
        "--port",
        type=port,
        default=8888,
        help="where to listen on 127.0.0.1; 0 picks a free one (default: %(default)s)",
    )
    parser.add_argument(
        "--database-url",
        default="sqlite:///ledger.db",
        metavar="URL",
        help="the database, as SQLAlchemy writes it, with a sync or an async driver"
        " (default: %(default)s, a file in this folder)",
    )
    parser.add_argument(
        "--debug", action="store_true", help="show templates as they change, and log everything"
    )
    return parser.parse_args(arguments)


def port(text: str) -> int:
    """A port number. Raises ``ValueError``."""
    number = int(text)
    if not 0 <= number <= 65535:
        raise ValueError(text)
    return number


async def serve(port: int, database_url: str, debug: bool) -> None:
    """Start, answer requests until a signal comes, and end in good order."""
    ending = asyncio.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, ending.set)

    with starting("Cannot use the database"):
        db = open_database(database_url)
    try:
        with starting(f"Cannot use {db!r}"):
            await create_schema(db)
        server = DrainingServer(make_app(db, debug), max_body_size=MAX_BODY)
        with starting(f"Cannot listen on {ADDRESS}:{port}"):
            sockets = bind_sockets(port, ADDRESS)
        server.add_sockets(sockets)
        bound_port = sockets[0].getsockname()[1]  # --port 0 leaves the choice to the system
        print(f"Ledger on http://{ADDRESS}:{bound_port} (Ctrl-C ends it)", flush=True)
        await ending.wait()
        await server.drain(GRACE)
    finally:
        if isinstance(db, AsyncDatabase):
            await db.dispose()
        else:
            db.dispose()


@contextmanager
def starting(failure: str) -> Iterator[None]:
    """Turn an error of a step on the way up into one line for people."""
    try:
        yield
    except Exception as error:  # any kind: drivers raise what they like
        # SQLAlchemy adds the statement and a link to what the driver said.
        cause = getattr(error, "orig", None) or error
        raise CannotStart(f"{failure}: {' '.join(str(cause).split())}") from error


if __name__ == "__main__":
    main()
