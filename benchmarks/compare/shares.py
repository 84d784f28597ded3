"""Where the time of a request goes: whose code runs, by samples that py-spy takes under load."""

import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

OWNERS = {
    "tornado_sa": "tornado_sa",
    "sqlalchemy": "SQLAlchemy",
    "asyncpg": "the driver",
    "tornado": "Tornado",
    "asyncio": "the event loop",
    "selectors": "the event loop",
    "contestants": "the handler",
}
ROOT = re.escape(str(Path(__file__).parents[2]))
PACKAGE = re.compile(
    rf".*(?:site-packages|lib/python3\.\d+|{ROOT}/benchmarks/compare|{ROOT})/(\w+)"
)
RATE = 250  # samples per second, for each of which the server is stopped


def shares(server, load, seconds):
    """How many of the samples each owner has, while wrk asks ``server`` for ``load``."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "raw.txt")
        record = f"py-spy record --pid {server.pid} --duration {seconds} --rate {RATE}"
        options = f"--format raw --full-filenames --output {raw}"
        pyspy = subprocess.Popen(
            f"{record} {options}".split(),
            executable=Path(sys.executable).with_name("py-spy"),
            stdout=subprocess.DEVNULL,
        )
        server.measure(load, seconds + 2)
        if pyspy.wait() != 0:
            raise SystemExit("py-spy could not look at the server; its own words are above.")
        found = Counter()
        for line in raw.read_text().splitlines():
            stack, _, count = line.rpartition(" ")
            found[owner(stack.split(";"))] += int(count)
    return found


def owner(stack):
    """Whose function it is that runs, or that has called into Python's library or into C."""
    for frame in reversed(stack):
        package = PACKAGE.search(frame)
        if package is not None and package[1] in OWNERS:
            return OWNERS[package[1]]
    return "the rest"


def show(title, found):
    """Print the shares as a table of reStructuredText."""
    total = sum(found.values())
    print(f"{title} ({total:,} samples)\n")
    print("==============  ======\nwhose           share\n==============  ======")
    for name, count in found.most_common():
        print(f"{name:14}  {count / total:6.1%}")
    print("==============  ======\n")
