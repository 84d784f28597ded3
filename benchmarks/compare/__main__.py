"""tornado_sa beside its peers, and beside what one writes by hand: one command, tables, a plot.

Usage: ``python benchmarks/compare [--rounds 5] [--seconds 1] [--write]``

Makes a virtual environment of its own from ``requirements.txt``, beside this file, and needs wrk
(``apt-get install wrk``) and a PostgreSQL server. In each round, each contestant is started in
turn, one process pinned to core 0, and wrk asks it from core 1. Beside it runs the reference, which
is Tornado with ``async with async_sessionmaker()`` in each handler, on the same event loop; the two
are asked in turn, a second each, so that what is slow for a moment is slow for both. Printed are
the median of the ratios, the least and the most; then the claims, and whether they held. Exits with
1 if one did not.

``--profile`` prints whose code takes the time of ``/db`` instead, and ``--growth 1000000`` whether
a request costs more after so many others, beside 10,000 open WebSockets, and among 200 classes.

``--only`` and ``--loop`` choose contestants and event loops, ``--load`` what they are asked, such
as ``"/db 32"``: the path and the number of clients. Python's garbage collector is tuned, for all
of them, as docs/performance.rst advises; ``--default-gc`` leaves it as it is. ``--write`` puts the
figures and the plot into ``docs/``.
"""

import argparse
import hashlib
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "requirements.txt"
ENVIRONMENT = HERE / ".venv"
LOOPS = ["asyncio", "uvloop"]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=1, help="of load, each time")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--loop", nargs="+", choices=LOOPS, default=LOOPS)
    parser.add_argument("--load", nargs="+", metavar="LOAD")
    parser.add_argument("--database", default="127.0.0.1/postgres", help="host and name")
    parser.add_argument("--default-gc", action="store_true", help="the collector as Python sets it")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="only requests that fail count")
    parser.add_argument("--profile", action="store_true", help="whose code takes the time of /db")
    parser.add_argument("--growth", type=int, metavar="REQUESTS", help="does the cost grow?")
    return parser.parse_args()


def in_own_environment():
    """Go on in the virtual environment of the comparison, made if need be."""
    pinned = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    mark = ENVIRONMENT / "made-from"
    python = ENVIRONMENT / "bin" / "python"
    if not mark.exists() or mark.read_text() != pinned:
        print(f"making {ENVIRONMENT}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
        project = HERE.parents[1]
        subprocess.run(
            [python, "-m", "pip", "install", "-q", "-r", REQUIREMENTS, "-e", project], check=True
        )
        mark.write_text(pinned)
    if Path(sys.prefix).resolve() != ENVIRONMENT.resolve():
        os.execv(python, [python, *sys.orig_argv[1:]])


def main():
    options = arguments()
    in_own_environment()
    from rounds import run

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
