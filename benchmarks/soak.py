"""Many requests against the example application: does anything grow?

Usage: ``python benchmarks/soak.py [--requests 100000] [--driver sqlite+aiosqlite]``

Starts the example application, with one handler more that counts what is alive, in a process of its
own, and sends it reads, writes and errors over 16 connections. After a warm-up of a fifth of the
requests, and of 5,000 at least, resident memory may grow by 1 MiB, and scopes, tasks and
connections not at all. Memory that has grown is given two more chances, for a leak grows each time.
Prints what it found; exits with 1 if something grew.
"""

import argparse
import asyncio
import gc
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from itertools import cycle
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

MIB = 1 << 20
CLIENTS = 16
CHANCES = 3
WARM_UP = 5000  # requests, at least: with aiosqlite's threads, memory levels off only then


def serve(url: str) -> None:
    """The example application, on a free port that is printed."""
    from sqlalchemy import event
    from tornado.httpserver import HTTPServer
    from tornado.testing import bind_unused_port
    from tornado.web import RequestHandler

    from example_app.app import create_schema, make_app, open_database
    from tornado_sa import AsyncDatabase, Scope

    class Counts(RequestHandler):
        def get(self) -> None:
            gc.collect()
            status = db.status()
            memory = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
            assert memory is not None
            self.write(
                {
                    "memory": int(memory[1]) * 1024,
                    "scopes": sum(isinstance(kept, Scope) for kept in gc.get_objects()),
                    "open_scopes": len(status.open_scopes),
                    "tasks": len(asyncio.all_tasks()),
                    "checked_out": status.checked_out,
                }
            )

    async def main() -> None:
        await create_schema(db)
        app = make_app(db, debug=False)
        app.settings["log_function"] = lambda handler: None
        app.add_handlers(".*", [("/counts", Counts)])
        sock, port = bind_unused_port()
        HTTPServer(app).add_socket(sock)
        print(port, flush=True)
        await asyncio.Event().wait()

    db = open_database(url)
    engine = db.engine.sync_engine if isinstance(db, AsyncDatabase) else db.engine
    # SQLite caches up to 2 MB of the growing file for each connection: not what is measured here.
    event.listen(engine, "connect", lambda connection, _: keep_cache_small(connection))
    asyncio.run(main())


def keep_cache_small(connection: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA cache_size = 10")
    cursor.close()


def request(method: str, path: str, body: object = None) -> bytes:
    content = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def mixture() -> list[bytes]:
    transfer = {"from": 1, "to": 2, "amount": 1, "memo": "there"}
    back = {"from": 2, "to": 1, "amount": 1, "memo": "and back"}
    return [
        request("GET", "/accounts/1"),
        request("GET", "/accounts"),
        request("GET", "/"),
        request("GET", "/accounts/404"),
        request("POST", "/transfers", transfer),
        request("DELETE", "/accounts"),
        request("GET", "/accounts/2"),
        request("POST", "/transfers", back),
        request("POST", "/transfers", {"nonsense": True}),
        request("GET", "/transfers"),
    ]


async def load(port: int, count: int) -> dict[str, int]:
    """Send ``count`` requests; return how many answers there were of each class."""
    answers: dict[str, int] = {}

    async def client(count: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _, message in zip(range(count), cycle(mixture())):
            writer.write(message)
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = re.search(r"Content-Length: (\d+)", head)
            await reader.readexactly(int(length[1]) if length else 0)
            answers[head[9:12]] = answers.get(head[9:12], 0) + 1
        writer.close()
        await writer.wait_closed()

    await asyncio.gather(*(client(count // CLIENTS) for _ in range(CLIENTS)))
    return answers


def counts(port: int) -> dict[str, int]:
    time.sleep(0.2)  # sessions of an async driver are still being closed when the answer is here
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/counts") as response:
        found: dict[str, int] = json.load(response)
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--driver", default="sqlite", help="sqlite or sqlite+aiosqlite")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        url = f"{arguments.driver}:///{folder}/ledger.db"
        command = [sys.executable, __file__, "--serve", url]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            for owner in ("Ada", "Grace"):
                account = {"owner": owner, "currency": "EUR", "balance": 1_000_000}
                urllib.request.urlopen(
                    urllib.request.Request(
                        f"http://127.0.0.1:{port}/accounts",
                        json.dumps(account).encode(),
                        {"Content-Type": "application/json"},
                    )
                ).close()
            asyncio.run(load(port, max(WARM_UP, arguments.requests // 5)))
            for _ in range(CHANCES):
                grown = soak(port, arguments.requests)
                if grown != {"memory"}:
                    break
        finally:
            server.terminate()
            server.wait()
    return int(bool(grown))


def soak(port: int, requests: int) -> set[str]:
    """Send the requests, print what was before and is after, and return the names of what grew."""
    before = counts(port)
    answers = asyncio.run(load(port, requests))
    print("answers:", dict(sorted(answers.items())))
    grown = set()
    for name, value in counts(port).items():
        allowed = MIB if name == "memory" else 0
        if value - before[name] > allowed:
            grown.add(name)
        verdict = "GREW" if name in grown else "ok"
        print(f"{name:12} {before[name]:>12,} -> {value:>12,}  {verdict}")
    return grown


if __name__ == "__main__":
    sys.exit(main())
