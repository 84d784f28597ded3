"""A large download from PostgreSQL: does the server's memory grow, and is anything left of it?

Usage: ``python benchmarks/download.py [--rows 1000000] [--aborts 100] [--driver asyncpg]``

Starts a server in a process of its own that streams NDJSON from a server-side cursor. Downloads all
rows once, then leaves ``--aborts`` downloads half-way, four at a time. Prints how much the server's
resident memory grew (allowed are 20 MiB), how many connections are still checked out, and how many
queries of it still run on the database server (none are allowed). Exits with 1 if not so.

Drivers: ``asyncpg`` and ``psycopg`` under the bridge, ``AsyncSession`` for the former with
``--async-session``, and ``sync``: a `Database` with psycopg, whose queries block the loop.
"""

import argparse
import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import time
import uuid
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg

sys.path.insert(0, str(Path(__file__).parents[1]))

MIB = 1 << 20
SERVER = os.environ.get("TORNADO_SA_POSTGRESQL", "postgresql://postgres@127.0.0.1:5432/postgres")
AT_ONCE = 4


def serve(url: str, rows: int, kind: str) -> None:
    from sqlalchemy import String, cast, func, select
    from tornado.httpserver import HTTPServer
    from tornado.iostream import StreamClosedError
    from tornado.testing import bind_unused_port
    from tornado.web import Application, RequestHandler

    from tornado_sa import AsyncDatabase, AsyncSessionHandler, Database, SessionHandler, read_only

    db: Any = Database(url) if kind == "sync" else AsyncDatabase(url)
    number = func.generate_series(1, rows).column_valued("number")
    query = select(number, func.md5(cast(number, String))).execution_options(yield_per=1000)

    class Send(RequestHandler):
        async def send(self, part: Any) -> None:
            self.write("".join(f'{{"number": {n}, "text": "{text}"}}\n' for n, text in part))
            await self.flush()

    class Plain(SessionHandler, Send):
        @read_only(stream=True)
        async def get(self) -> None:
            with closing(self.session.execute(query)) as result:
                try:
                    for part in result.partitions():
                        await self.send(part)
                except StreamClosedError:
                    pass

    class Async(AsyncSessionHandler, Send):
        @read_only(stream=True)
        async def get(self) -> None:
            result = await self.session.stream(query)
            try:
                async for part in result.partitions():
                    await self.send(part)
            except StreamClosedError:
                pass
            finally:
                await result.close()

    class Counts(RequestHandler):
        def get(self) -> None:
            pools = [db.engine.pool, db.reader.pool]
            self.write({"memory": memory(), "out": sum(pool.checkedout() for pool in pools)})

    async def main() -> None:
        handler: Any = Async if kind == "async" else Plain
        app = Application([("/", handler), ("/counts", Counts)], db=db)
        app.settings["log_function"] = lambda handler: None
        sock, port = bind_unused_port()
        HTTPServer(app).add_socket(sock)
        print(port, flush=True)
        await asyncio.Event().wait()

    asyncio.run(main())


def memory() -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


async def download(port: int, most: int | None, peak: list[int]) -> int:
    """Read ``most`` bytes, or all, and leave; return how many came."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    length, looked = 0, time.monotonic()
    while (most is None or length < most) and (chunk := await reader.read(1 << 18)):
        length += len(chunk)
        if time.monotonic() - looked > 0.5:
            peak.append((await counts(port))["memory"])
            looked = time.monotonic()
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    writer.transport.abort()
    return length


async def counts(port: int) -> dict[str, int]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /counts HTTP/1.0\r\n\r\n")
    found: dict[str, int] = json.loads((await reader.read()).partition(b"\r\n\r\n")[2])
    writer.close()
    return found


async def drill(port: int, aborts: int, admin: Any, name: str) -> bool:
    await download(port, MIB, [])  # connects, and imports what is imported late
    before, peak = (await counts(port))["memory"], [0]
    started = time.monotonic()
    length = await download(port, None, peak)
    took = time.monotonic() - started
    print(f"download: {length / MIB:,.0f} MiB in {took:.1f} s")
    left = aborts
    while left > 0:
        together = min(left, AT_ONCE)
        await asyncio.gather(*(download(port, length // 2, peak) for _ in range(together)))
        left -= together
    await asyncio.sleep(1)
    after = await counts(port)
    running = admin.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND state <> 'idle'", [name]
    ).fetchone()[0]
    grown = max(*peak, after["memory"]) - before
    rows = [
        ("memory, bytes more at most", grown, grown < 20 * MIB),
        (f"checked out after {aborts} aborts", after["out"], after["out"] == 0),
        ("queries still running", running, running == 0),
    ]
    for what, value, good in rows:
        print(f"{what:32} {value:>12,}  {'ok' if good else 'NOT SO'}")
    return all(good for *_, good in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--aborts", type=int, default=100)
    parser.add_argument("--driver", choices=["asyncpg", "psycopg", "sync"], default="asyncpg")
    parser.add_argument("--async-session", action="store_true")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve[0], arguments.rows, arguments.serve[1])
        return 0
    name = f"tornado_sa_{uuid.uuid4().hex[:12]}"
    admin = psycopg.connect(SERVER, autocommit=True)
    admin.execute(f"CREATE DATABASE {name}")
    driver = "psycopg" if arguments.driver == "sync" else arguments.driver
    url = SERVER.rpartition("/")[0].replace("postgresql:", f"postgresql+{driver}:") + f"/{name}"
    kind = "async" if arguments.async_session else arguments.driver
    command = [sys.executable, __file__, "--rows", str(arguments.rows), "--serve", url, kind]
    server = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        good = asyncio.run(drill(port, arguments.aborts, admin, name))
    finally:
        server.terminate()
        server.wait()
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
        admin.close()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
