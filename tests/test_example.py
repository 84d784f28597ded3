"""The example application's server, and how it ends. What it serves is tested in ``example/``."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tornado.testing import bind_unused_port
from tornado.web import Application, RequestHandler

from example_app.server import DrainingServer
from tests.support import RawClient, until


class Waiting(RequestHandler):
    """Answers when ``release`` is set."""

    def initialize(self, arrived: list[Any], release: asyncio.Event) -> None:
        self.arrived, self.release = arrived, release

    async def get(self) -> None:
        self.arrived.append(asyncio.current_task())
        await self.release.wait()
        self.write("done")


class Draining:
    """A `DrainingServer` with requests that wait, and connections that send them."""

    def __init__(self) -> None:
        self.arrived: list[Any] = []
        self.release = asyncio.Event()
        arguments = {"arrived": self.arrived, "release": self.release}
        self.server = DrainingServer(Application([(r"/", Waiting, arguments)]))
        sock, self.port = bind_unused_port()
        self.server.add_socket(sock)

    async def send(self, client: RawClient) -> None:
        """Send a request, and wait until its handler runs."""
        already = len(self.arrived)
        await client.send("GET / HTTP/1.1\nHost: x")
        await until(lambda: len(self.arrived) > already)


@pytest.mark.gen_test
async def test_drain_cuts_off_a_request_that_takes_too_long(expected_log: list[str]) -> None:
    draining = Draining()
    async with RawClient(f"http://127.0.0.1:{draining.port}") as client:
        await draining.send(client)
        expected_log.append("Cut off after 0.05 s: 1 unanswered requests")
        await draining.server.drain(0.05)
        assert await client.reader.read() == b""
    draining.release.set()
    await asyncio.wait(draining.arrived)


@pytest.mark.gen_test
async def test_drain_answers_a_late_request_as_the_last_of_its_connection() -> None:
    draining = Draining()
    url = f"http://127.0.0.1:{draining.port}"
    async with RawClient(url) as first, RawClient(url) as second:
        await draining.send(first)
        drained = asyncio.ensure_future(draining.server.drain(5))
        await asyncio.sleep(0)
        await draining.send(second)
        draining.release.set()
        assert (await first.reader.read()).endswith(b"done")
        answer = await second.reader.read()
        assert answer.endswith(b"done") and b"Connection: close" in answer
        await drained
