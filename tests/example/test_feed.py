"""The live feed: each transfer, once it is committed, to everybody who listens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.web import Application
from tornado.websocket import WebSocketClientConnection, websocket_connect

from example_app import feed
from example_app.models import Transfer
from tests.example.support import Books, checked_out
from tests.support import until


@pytest.fixture
def listen(app: Application, http_server: Any, base_url: str) -> Iterator[Any]:
    """``socket = await listen()``"""
    sockets: list[WebSocketClientConnection] = []

    async def listen() -> WebSocketClientConnection:
        sockets.append(await websocket_connect(base_url.replace("http", "ws") + "/feed"))
        return sockets[-1]

    yield listen
    for socket in sockets:
        socket.close()


async def hear(socket: WebSocketClientConnection) -> Any:
    message = await asyncio.wait_for(socket.read_message(), 5)
    return None if message is None else json.loads(message)


async def settled(app: Application) -> None:
    """Wait until the feed has looked at the database for the first time."""
    await asyncio.sleep(0.1)


@pytest.mark.usefixtures("concurrent")
@pytest.mark.gen_test
async def test_everybody_hears_of_a_transfer(
    app: Application, books: Books, ask: Any, listen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, because of ``after_commit``: nobody looks at the database for another hour.

    And not too early, when there is nothing to be seen yet.
    """
    monkeypatch.setattr(feed, "POLL_SECONDS", 3600)
    first, second = await books.open(100, 0)
    sockets = [await listen(), await listen()]
    await settled(app)
    _, made = await ask("POST", "/transfers", {"from": first, "to": second, "amount": 30})
    for socket in sockets:
        message = await hear(socket)
        assert message.items() >= made.items()
        assert (message["from_owner"], message["to_owner"]) == ("Ada", "Ada")
        assert message["shown"] == "0.30 EUR"


@pytest.mark.gen_test
async def test_what_another_process_has_committed_is_heard_of_too(
    app: Application, books: Books, listen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if its id is the smaller one: the COMMITs of two processes come in any order."""
    monkeypatch.setattr(feed, "POLL_SECONDS", 0.05)
    first, second = await books.open(100, 0)
    socket = await listen()
    await settled(app)
    for ident in 12, 11, 13:
        await books.add(Transfer(id=ident, from_id=first, to_id=second, amount=1, memo=""))
        assert (await hear(socket))["id"] == ident


@pytest.mark.gen_test
async def test_a_refused_transfer_is_not_news(
    app: Application, books: Books, ask: Any, listen: Any
) -> None:
    first, second = await books.open(100, 0)
    socket = await listen()
    await settled(app)
    order = {"from": second, "to": first, "amount": 30}
    assert (await ask("POST", "/transfers", order, Idempotency_Key="x"))[0] == 422
    assert (await ask("POST", "/transfers", {"from": first, "to": second, "amount": 1}))[0] == 201
    assert (await hear(socket))["amount"] == 1


@pytest.mark.gen_test
async def test_a_client_may_ask_for_what_it_has_missed(books: Books, ask: Any, listen: Any) -> None:
    first, second = await books.open(100, 0)
    order = {"from": first, "to": second, "amount": 1}
    ids = [(await ask("POST", "/transfers", order))[1]["id"] for _ in range(3)]
    socket = await listen()
    await socket.write_message(json.dumps({"after": ids[0]}))
    assert [(await hear(socket))["id"] for _ in range(2)] == ids[1:]


@pytest.mark.parametrize("driver", ["sqlite", "asyncpg"], indirect=True)
@pytest.mark.parametrize("message", ["x", "{}", '{"after": -1}', '{"after": "1"}', b"\0", "[]"])
@pytest.mark.gen_test
async def test_a_bad_message_closes_the_socket(listen: Any, message: str | bytes) -> None:
    socket = await listen()
    await socket.write_message(message, binary=isinstance(message, bytes))
    assert await hear(socket) is None
    assert socket.close_code == feed.INVALID_DATA


@pytest.mark.usefixtures("concurrent")
@pytest.mark.gen_test
async def test_a_socket_holds_no_connection_and_nobody_looks_when_nobody_listens(
    app: Application, books: Books, listen: Any
) -> None:
    sockets = [await listen() for _ in range(20)]
    await settled(app)
    assert checked_out(books.db) == 0
    for socket in sockets:
        socket.close()
    await until(lambda: not [task for task in asyncio.all_tasks() if task.get_name() == "feed"])


@pytest.mark.gen_test
async def test_at_the_end_sockets_are_told(app: Application, listen: Any) -> None:
    before = await listen()
    await settled(app)
    await app.settings["feed"].close()
    assert await hear(before) is None
    after = await listen()
    assert await hear(after) is None
    assert before.close_code == after.close_code == feed.GOING_AWAY


@pytest.mark.parametrize("driver", ["sqlite", "asyncpg"], indirect=True)
@pytest.mark.gen_test
async def test_the_page_of_another_site_cannot_listen(
    app: Application, http_server: Any, base_url: str
) -> None:
    url = base_url.replace("http", "ws") + "/feed"
    request = HTTPRequest(url, headers={"Origin": "http://evil.example"})
    with pytest.raises(HTTPClientError, match="403"):
        await websocket_connect(request)


@pytest.mark.parametrize("driver", ["sqlite"], indirect=True)
@pytest.mark.gen_test
async def test_a_client_that_does_not_read_is_sent_away(
    app: Application, http_server: Any, base_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has not read is kept in memory."""
    monkeypatch.setattr(feed, "MAX_UNREAD", 10)
    reader, writer = await asyncio.open_connection("127.0.0.1", int(base_url.rsplit(":", 1)[1]))
    writer.write(
        b"GET /feed HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    await reader.readuntil(b"\r\n\r\n")
    writer.transport.pause_reading()  # type: ignore[attr-defined]  # it is a socket
    await settled(app)
    listeners = app.settings["feed"]._listeners
    assert len(listeners) == 1
    (handler,) = listeners
    message = {"memo": "x" * 200_000}
    for _ in range(100):
        handler.send(message)
    assert handler._unread == 10
    writer.transport.abort()
    await until(lambda: not listeners)
