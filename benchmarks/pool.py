"""How long units of work take when there are more of them than connections: stock pool and ours.

Usage: ``python benchmarks/pool.py [postgresql+asyncpg://postgres@127.0.0.1:5432/postgres]``

64 clients on 20 connections, one short query and a COMMIT per unit, in interleaved rounds; prints
the median, the 99th percentile and the longest time from asking for a session to having closed it,
and how many units the busiest and the least lucky client got through.

Under two loads. "Paused": a client comes back after up to 5 ms, as one behind a network does.
"Greedy": it comes back in the very same turn of the event loop. There look at the clients and not
at the 99th percentile: those whom the stock pool leaves out contribute one unit each, and the lucky
ones thousands of short ones.
"""

import asyncio
import gc
import random
import sys
import time
from pathlib import Path
from statistics import median, quantiles

sys.path.insert(0, str(Path(__file__).parents[1]))

from sqlalchemy import text
from sqlalchemy.pool import AsyncAdaptedQueuePool, Pool

from tornado_sa import AsyncDatabase
from tornado_sa.pool import AsyncFairPool

URL = "postgresql+asyncpg://postgres@127.0.0.1:5432/postgres"
CLIENTS = 64
CONNECTIONS = 20
ROUNDS = 4
SECONDS = 2.5  # per round, load and pool
LOADS = {"paused": 0.005, "greedy": 0.0}  # seconds at most between two units of a client


async def round_on(url: str, poolclass: type[Pool], pause: float) -> tuple[float, ...]:
    """Median, 99th percentile and maximum in ms, fewest and most units of a client."""
    options = {"poolclass": poolclass, "pool_size": CONNECTIONS, "max_overflow": 0}
    db = AsyncDatabase(url, engine_options=options)
    query = text("SELECT pg_sleep(0.001)")

    async def client(until: float) -> list[float]:
        spent = []
        while (start := time.perf_counter()) < until:
            async with db.scope("benchmark") as session:
                await session.execute(query)
                await session.commit()
            spent.append((time.perf_counter() - start) * 1000)
            if pause:
                await asyncio.sleep(random.uniform(0, pause))
        return spent

    for seconds in 0.4, SECONDS:  # the first: to connect
        until = time.perf_counter() + seconds
        clients = await asyncio.gather(*(client(until) for _ in range(CLIENTS)))
    await db.dispose()
    spent = [unit for units in clients for unit in units]
    counts = [len(units) for units in clients]
    return median(spent), quantiles(spent, n=100)[98], max(spent), min(counts), max(counts)


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else URL
    kinds = {"stock": AsyncAdaptedQueuePool, "fair": AsyncFairPool}
    for load, pause in LOADS.items():
        rounds: dict[str, list[tuple[float, ...]]] = {name: [] for name in kinds}
        for _ in range(ROUNDS):
            for name, kind in kinds.items():
                rounds[name].append(asyncio.run(round_on(url, kind, pause)))
                gc.collect()
        stock, fair = (
            [median(column) for column in zip(*rounds[name], strict=True)] for name in kinds
        )
        for index, figure in enumerate(("p50", "p99", "max")):
            print(
                f"{load}  {figure}  stock {stock[index]:7.1f} ms  fair {fair[index]:7.1f} ms"
                f"  ratio {stock[index] / fair[index]:.2f}"
            )
        print(
            f"{load}  units per client  stock {stock[3]:.0f} to {stock[4]:.0f}"
            f"  fair {fair[3]:.0f} to {fair[4]:.0f}"
        )


if __name__ == "__main__":
    main()
