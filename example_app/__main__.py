"""The command line: ``python -m example_app``."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import sys
from collections.abc import Sequence

from tornado.netutil import bind_sockets

from example_app.database import in_memory
from example_app.processes import serve_in_processes
from example_app.serving import CannotStart, Serving, prepare, serve, starting

ADDRESS = "127.0.0.1"


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until SIGINT or SIGTERM. Exits with 1 and one line on stderr if it cannot start."""
    options = parse_arguments(arguments)
    logging.basicConfig(
        level=logging.DEBUG if options.debug else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("alembic").setLevel(logging.WARNING)  # the ledger says it in one line
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)  # why: docs/performance.rst, "The garbage collector"
    try:
        run(options)
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
        "--processes",
        type=process_count,
        default=1,
        metavar="N",
        help="how many processes share the work (default: %(default)s)",
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


def process_count(text: str) -> int:
    """A number of processes. Raises ``ValueError``."""
    number = int(text)
    if not 1 <= number <= 100:
        raise ValueError(text)
    return number


def run(options: argparse.Namespace) -> None:
    """Do what the command line asks for. Raises `.CannotStart`."""
    url, count = options.database_url, options.processes
    if count > 1:
        with starting("Cannot use the database"):
            alone = in_memory(url)
        if alone:
            raise CannotStart(
                f"SQLite in memory is there for one process, not for {count}."
                " Use a file: --database-url sqlite:///ledger.db"
            )
        # Once, and before there is anybody whose connections a fork could copy.
        asyncio.run(prepare(url))
    with starting(f"Cannot listen on {ADDRESS}:{options.port}"):
        sockets = bind_sockets(options.port, ADDRESS)
    bound_port = sockets[0].getsockname()[1]  # --port 0 leaves the choice to the system

    def ready() -> None:
        print(f"Ledger on http://{ADDRESS}:{bound_port} (Ctrl-C ends it)", flush=True)

    serving = Serving(url, options.debug, sockets)
    if count > 1:
        ready()
        serve_in_processes(serving, count)
    else:
        asyncio.run(serve(serving, ready))


if __name__ == "__main__":
    main()
