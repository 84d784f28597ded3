"""SIGTERM while wrk loads the example server: is any request dropped without an answer?

Usage: ``python benchmarks/shutdown.py [--times 20] [--database-url postgresql+asyncpg://...]``

Each time, starts ``python -m example_app``, lets wrk (Debian's package) read from it over 32
connections, and sends SIGTERM after a second. wrk counts a connection that ends in the middle of a
request as a read error. Prints what it found; exits with 1 if there was such an error, an answer
other than 2xx, or an exit code other than 0.
"""

import argparse
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONNECTIONS = 32
LOAD = 2  # seconds
AFTER = 1.0  # seconds until SIGTERM


def once(database_url: str) -> tuple[int, int, int, int, float]:
    """Requests answered, requests dropped, answers other than 2xx, exit code, seconds to exit."""
    arguments = ["--port", "0", "--database-url", database_url]
    server = subprocess.Popen(
        [sys.executable, "-m", "example_app", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[2]
        load = subprocess.Popen(
            ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{LOAD}s", "--timeout", "10s", f"{url}/accounts"],
            stdout=subprocess.PIPE,
            text=True,
        )
        time.sleep(AFTER)
        server.send_signal(signal.SIGTERM)
        started = time.monotonic()
        code = server.wait(timeout=30)
        took = time.monotonic() - started
        report, _ = load.communicate()
    finally:
        server.kill()
        server.wait()
    return (
        found(r"(\d+) requests in", report),
        found(r"read (\d+)", report) + found(r"timeout (\d+)", report),
        found(r"Non-2xx or 3xx responses: (\d+)", report),
        code,
        took,
    )


def found(pattern: str, report: str) -> int:
    match = re.search(pattern, report)
    return int(match[1]) if match else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--database-url", help="default: an SQLite file")
    arguments = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("wrk is not installed: apt-get install wrk")
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        url = arguments.database_url or f"sqlite:///{folder}/ledger.db"
        print("answered  dropped  not 2xx  exit code  seconds to exit")
        for _ in range(arguments.times):
            answered, dropped, other, code, took = once(url)
            bad += bool(dropped or other or code or not answered)
            print(f"{answered:8,}  {dropped:7}  {other:7}  {code:9}  {took:15.2f}")
    print("ok" if not bad else f"{bad} of {arguments.times} times something was wrong")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
