"""Transactions in doubt, from the command line.

::

    python -m tornado_sa in-doubt URL [URL ...] [--json]
    python -m tornado_sa resolve URL [URL ...] XID (--commit | --rollback) [--json]

Exit codes: 0, nothing is in doubt, or the transaction was ended; 1, something is in doubt, or the
transaction could not be ended; 2, it could not be tried: a wrong argument, or no answer from the
database.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from tornado_sa import in_doubt
from tornado_sa.database import Database
from tornado_sa.errors import ConfigurationError, TornadoSAError
from tornado_sa.in_doubt import InDoubt
from tornado_sa.responses import is_unreachable
from tornado_sa.two_phase import check_driver

_URL = "such as postgresql+psycopg://user:password@host/database; no async driver"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        with ExitStack() as stack:
            databases = [_database(stack, url) for url in options.urls]
            engines = [database.engine for database in databases]
            decisions = [database._decisions for database in databases]
            if options.command == "in-doubt":
                found = in_doubt.in_doubt(engines, decisions)
                _show(found, options.json)
                return 1 if found else 0
            ended = in_doubt.resolve(engines, decisions, options.xid, options.commit)
            _show(ended, options.json)
            return 0
    except ConfigurationError as error:
        return _fail(error, 2)
    except TornadoSAError as error:
        return _fail(error, 1)
    except (SQLAlchemyError, OSError) as error:
        return _fail(error, 2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tornado_sa",
        description="Transactions in doubt: prepared, and neither committed nor rolled back.",
        epilog="Exit codes: 0, nothing is in doubt, or the transaction was ended; 1, something is"
        " in doubt, or the transaction could not be ended; 2, wrong argument or no answer.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("in-doubt", help="list them")
    listing.add_argument("urls", nargs="+", metavar="URL", help=_URL)
    ending = commands.add_parser("resolve", help="commit or roll back one of them")
    ending.add_argument("urls", nargs="+", metavar="URL", help=_URL)
    ending.add_argument("xid", metavar="XID", help="its id, as in-doubt lists it")
    way = ending.add_mutually_exclusive_group(required=True)
    way.add_argument("--commit", action="store_true")
    way.add_argument("--rollback", dest="commit", action="store_false")
    for each in listing, ending:
        each.add_argument("--json", action="store_true", help="write JSON, not lines of text")
    return parser


def _database(stack: ExitStack, url: str) -> Database:
    try:
        database = Database(url)
    except ConfigurationError as error:
        name = url.partition(":")[0]
        if "sync driver" not in str(error):
            raise
        backend = name.partition("+")[0]
        sync = {"postgresql": "psycopg", "mysql": "pymysql", "mariadb": "pymysql"}.get(backend)
        instead = f" Write {backend}+{sync}://..." if sync else ""
        raise ConfigurationError(f"{name} is an async driver.{instead}") from None
    stack.callback(database.dispose)
    check_driver(database.engine)
    return database


def _show(found: Sequence[InDoubt], as_json: bool) -> None:
    if as_json:
        print(json.dumps([dataclasses.asdict(row) for row in found], default=str))
        return
    for row in found:
        since = row.since.isoformat(" ", "seconds") if row.since else "-"
        print(row.xid, row.database, since, row.decision or "-", sep="\t")


def _fail(error: BaseException, code: int) -> int:
    """Say in one line what is wrong; the texts of drivers have several, but no password."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        error = error.orig  # the driver's own words, without SQLAlchemy's link and SQL
    what = "the database does not answer: " if is_unreachable(error) else ""
    print(f"error: {what}{' '.join(str(error).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
