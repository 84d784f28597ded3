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
    rf".*(?:site-packages|lib/python3\.\d+|{ROOT}/benchmarks/compare|{ROOT})/(\w+)(?:/(\w+))?"
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
    """Whose function it is that runs, or that has called into Python's library or into C.

    And, where it is ours, its module.
    """
    for frame in reversed(stack):
        package = PACKAGE.search(frame)
        if package is not None and package[1] in OWNERS:
            return OWNERS[package[1]], package[2] if package[1] == "tornado_sa" else ""
    return "the rest", ""


def show(title, found, cpu):
    """Print the shares as a table of reStructuredText, and another of ours by module.

    ``cpu``: of one request, in microseconds, while nobody looked.
    """
    total = sum(found.values())
    owners, modules = Counter(), Counter()
    for (name, module), count in found.items():
        owners[name] += count
        if module:
            modules[module] += count
    print(f"{title} ({total:,} samples, {cpu:.0f} µs of CPU per request)\n")
    for heading, counts in (("whose", owners), ("our module", modules)):
        if counts:
            line = "==============  ======  ======"
            print(f"{line}\n{heading:14}   share  µs\n{line}")
            for name, count in counts.most_common():
                print(f"{name:14}  {count / total:6.1%}  {count / total * cpu:6.1f}")
            print(f"{line}\n")
