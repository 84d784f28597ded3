"""What a request that never touches its session costs: CPU per request, against a bare handler.

Usage: ``python benchmarks/idle.py``

In one process, without sockets, in interleaved rounds; prints the best and the median of each.
"""

import asyncio
import gc
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

from tornado.web import Application, RequestHandler

from tests.test_memory import handle
from tornado_sa import SessionHandler

REQUESTS = 3000
ROUNDS = 12


class Bare(RequestHandler):
    async def get(self) -> None:
        pass


class WithSession(SessionHandler):
    async def get(self) -> None:
        pass


def cpu(handler: type[RequestHandler]) -> float:
    """Microseconds of CPU per request."""
    app = Application([("/", handler)], log_function=lambda handler: None)
    start = time.process_time()
    asyncio.run(handle(app, REQUESTS))
    spent = time.process_time() - start
    gc.collect()
    return spent / REQUESTS * 1e6


def main() -> None:
    gc.disable()
    cpu(Bare), cpu(WithSession)
    rounds = [(cpu(Bare), cpu(WithSession)) for _ in range(ROUNDS)]
    for name, pick in (("best", min), ("median", median)):
        bare, ours = (pick(column) for column in zip(*rounds, strict=True))
        print(
            f"{name:6}  bare {bare:6.1f} µs  with a session {ours:6.1f} µs"
            f"  {ours - bare:+.1f} µs  ratio {ours / bare:.3f}"
        )


if __name__ == "__main__":
    main()
