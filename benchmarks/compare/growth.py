"""Does a request cost more after many others, beside open WebSockets, or among many classes?

Each time two servers run, one that bears the burden and one that was just started, and are asked
in turn: what is slow for a moment is slow for both.
"""

import asyncio
import resource
from contextlib import asynccontextmanager
from statistics import median

from measure import Contestant, Load, serving

SCRIPT = "tornado_sa_plain.py"
LOAD = Load("/db", 32)
TIMES = 9
SOCKETS = 10_000
CLASSES = 200
HANDSHAKE = (
    b"GET /socket HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


def growth(database, requests):
    """Print how a burdened server compares with a fresh one."""
    fresh = Contestant("fresh", SCRIPT, ("--read-only",))
    many_classes = Contestant("among classes", SCRIPT, ("--read-only", "--classes", str(CLASSES)))
    with serving(fresh, "asyncio", database) as other:
        with serving(many_classes, "asyncio", database) as server:
            compare(f"{CLASSES} handler classes more", server, other)
        with serving(fresh, "asyncio", database) as server:
            asyncio.run(beside_sockets(server, other))
        with serving(fresh, "asyncio", database) as server:
            answered = 0
            while answered < requests:
                result = server.measure(LOAD, 60)
                assert result.failed == 0, result
                answered += round(result.rate * 60)
                print(f"  {answered:,} requests, {server.memory():.1f} MiB", flush=True)
            compare(f"{answered:,} requests before", server, other)


def compare(what, burdened, fresh):
    for server in (burdened, fresh):
        server.measure(LOAD, 2)
    rates, cpu = [], []
    for _ in range(TIMES):
        one, other = burdened.measure(LOAD, 2), fresh.measure(LOAD, 2)
        rates.append(one.rate / other.rate)
        cpu.append(one.cpu / other.cpu)
    print(
        f"{what}: requests per second {median(rates):.3f} ({min(rates):.2f}-{max(rates):.2f}),"
        f" CPU per request {median(cpu):.3f} of those of a fresh server",
        flush=True,
    )


async def beside_sockets(server, fresh):
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    async with open_sockets(server.port) as sockets:
        await asyncio.to_thread(compare, f"{len(sockets):,} open WebSockets", server, fresh)


@asynccontextmanager
async def open_sockets(port):
    sockets = []
    try:
        for _ in range(SOCKETS):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            sockets.append(writer)
            writer.write(HANDSHAKE)
            answer = await reader.readuntil(b"\r\n\r\n")
            assert b" 101 " in answer, answer
        yield sockets
    finally:
        for writer in sockets:
            writer.close()
