"""SIGTERM under load: what was accepted is answered, stored and followed up. Row 29."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys

import pytest
from sqlalchemy import text
from tornado.testing import bind_unused_port
from tornado.web import Application, RequestHandler

from example_app.server import DrainingServer
from tests.support import Flavour, RawClient, until

CLIENTS = 8


async def client(port: int, number: int, answered: list[str], dropped: list[str]) -> None:
    """Send one request after the other over one connection, until the server closes it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for turn in range(10_000):
        sent = f"{number}-{turn}"
        body = f"text={sent}"
        writer.write(
            "POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            answer = await reader.readexactly(len(sent))
        except (asyncio.IncompleteReadError, ConnectionError):
            dropped.append(sent)
            break
        assert head.startswith(b"HTTP/1.1 200"), head
        assert answer == sent.encode()
        answered.append(sent)
        if b"Connection: close" in head:
            assert await reader.read() == b""
            break
    writer.close()
    await writer.wait_closed()


def connections(flavour: Flavour) -> int:
    """How many the server has, those of other tests among them; 0 for SQLite."""
    if flavour.dialect != "postgresql":
        return 0
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    with flavour.admin.connect() as connection:
        found: int = connection.scalar(text(query))
        return found


@pytest.mark.gen_test(timeout=60)
async def test_sigterm_under_load(flavour: Flavour) -> None:
    url = flavour.sync_engine.url.render_as_string(hide_password=False)
    before = connections(flavour)
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-m", "tests.serving", flavour.name, url),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert server.stdout is not None
    port = int(await server.stdout.readline())
    answered: list[str] = []
    dropped: list[str] = []
    clients = [client(port, number, answered, dropped) for number in range(CLIENTS)]
    asyncio.get_running_loop().call_later(0.5, server.send_signal, signal.SIGTERM)
    await asyncio.gather(*clients)
    out, errors = await server.communicate()

    assert (server.returncode, errors, dropped) == (0, b"", [])
    assert b"checked_out=0" in out and b"open_scopes=[]" in out
    assert len(answered) > CLIENTS
    mails = [f"mail for {one}" for one in answered]
    assert sorted(flavour.texts()) == sorted([*answered, *mails])
    await until(lambda: connections(flavour) <= before)  # a backend takes its time


@pytest.mark.gen_test
async def test_request_that_is_on_its_way_is_answered() -> None:
    """The next one of a connection that is idle at the moment when the server is told to end."""

    class Handler(RequestHandler):
        def get(self) -> None:
            self.finish("hello")

    server = DrainingServer(Application([("/", Handler)]))
    sock, port = bind_unused_port()
    server.add_socket(sock)
    async with RawClient(f"http://127.0.0.1:{port}/") as client:
        await client.send("GET / HTTP/1.1\nHost: x")
        await client.reader.readuntil(b"hello")
        drained = asyncio.ensure_future(server.drain(5))
        await asyncio.sleep(0.02)
        assert not drained.done()
        await client.send("GET / HTTP/1.1\nHost: x")
        answer = await client.reader.read()
        assert answer.endswith(b"hello") and b"Connection: close" in answer
        await drained


@pytest.mark.gen_test
async def test_what_is_not_answered_is_not_done() -> None:
    """Of requests that a client has sent on ahead, those after the last answer are left alone."""
    done: list[str] = []

    class Handler(RequestHandler):
        async def get(self) -> None:
            await asyncio.sleep(0.05)
            done.append(self.request.path)
            self.write("hello")

    server = DrainingServer(Application([("/.*", Handler)]))
    sock, port = bind_unused_port()
    server.add_socket(sock)
    async with RawClient(f"http://127.0.0.1:{port}/") as client:
        for number in range(4):
            await client.send(f"GET /{number} HTTP/1.1\nHost: x")
        await until(lambda: done)
        await server.drain(5)
        answers = await client.reader.read()
    await asyncio.sleep(0.1)
    assert len(done) == answers.count(b"hello") < 4
