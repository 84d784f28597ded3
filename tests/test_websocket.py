"""WebSockets: each event is a unit of work of its own. Rows 17 and 18."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tornado
from sqlalchemy import literal, select
from tornado import gen
from tornado.httpclient import HTTPClientError
from tornado.websocket import WebSocketHandler, websocket_connect

from tests.support import (
    BRIDGED,
    CANCELLED_LOG,
    Flavour,
    Note,
    RawClient,
    Reply,
    only,
    settle,
    until,
    with_options,
)
from tests.test_memory import no_garbage_collector
from tornado_sa import (
    AsyncSessionWebSocketHandler,
    BaseHandler,
    NoActiveScope,
    ScopeClosed,
    SessionWebSocketHandler,
    TornadoSAError,
    current_scope,
)

Connect = Callable[..., Any]


def socket_class(flavour: Flavour) -> Any:
    """The WebSocket handler class of a flavour."""
    awaits = flavour.is_async and not flavour.is_bridged
    return AsyncSessionWebSocketHandler if awaits else SessionWebSocketHandler


@pytest.fixture
def connect(app: Any, http_server: Any, base_url: str) -> Iterator[Connect]:
    """``client = await connect(Handler)``: serves it, and opens a socket to it."""
    clients: list[Any] = []

    async def start(handler: Any, path: str = "/feed") -> Any:
        app.add_handlers(r".*", [(path, handler)])
        clients.append(await websocket_connect(base_url.replace("http", "ws") + path))
        return clients[-1]

    yield start
    for client in clients:
        client.close()


async def ask(client: Any, message: str = "") -> Any:
    await client.write_message(message)
    return await client.read_message()


async def no_connection_out(flavour: Flavour) -> None:
    await until(lambda: flavour.checked_out() == 0)


def vanish(client: Any) -> None:
    """Close the client's end without a goodbye."""
    client.protocol.stream.close()


# -- one event, one unit of work -------------------------------------------------


@pytest.mark.parametrize("kind", ["async def", "generator", "def"])
@pytest.mark.gen_test
async def test_one_session_for_each_message(flavour: Flavour, connect: Connect, kind: str) -> None:
    """Row 17: three messages that query, then close. Nothing is out after any of them."""
    if kind == "def" and flavour.is_async and not flavour.is_bridged:
        pytest.skip("an AsyncSession has to be awaited")
    if kind == "generator" and flavour.is_bridged:
        pytest.skip("the bridge is for async def")
    sessions: list[Any] = []
    scopes: list[Any] = []

    def seen(handler: Any) -> None:
        assert handler.session is handler.session is flavour.session()
        sessions.append(handler.session)
        scopes.append(current_scope())

    class Handler(socket_class(flavour)):
        if kind == "async def":

            async def on_message(self, message: Any) -> None:
                seen(self)
                found = (await settle(self.session.execute(select(1)))).scalar()
                await asyncio.sleep(0)
                seen(self)
                self.write_message(f"{found}")

        elif kind == "generator":

            @gen.coroutine
            def on_message(self, message: Any) -> Any:
                seen(self)
                result = self.session.execute(select(1))
                result = (yield result) if flavour.is_async else result
                yield gen.moment
                seen(self)
                self.write_message(f"{result.scalar()}")

        else:

            def on_message(self, message: Any) -> None:
                seen(self)
                seen(self)
                self.write_message(f"{self.session.scalar(select(1))}")

    client = await connect(Handler)
    for _ in range(3):
        assert await ask(client) == "1"
        await no_connection_out(flavour)
        assert flavour.db.status().open_scopes == []
    client.close()
    assert len(sessions) == 6 and len(set(map(id, sessions))) == 3
    assert all(scope.closed and scope.label == "WS /feed on_message" for scope in scopes)


@pytest.mark.gen_test
async def test_a_message_commits_what_it_commits(flavour: Flavour, connect: Connect) -> None:
    class Handler(socket_class(flavour)):
        async def on_message(self, message: Any) -> None:
            self.session.add(Note(text=message))
            await settle(self.session.flush())
            if message != "lost":
                await settle(self.session.commit())
            self.write_message("done")

    client = await connect(Handler)
    for message in ("one", "lost", "two"):
        await ask(client, message)
    client.close()
    await no_connection_out(flavour)
    assert sorted(flavour.texts()) == ["one", "two"]


@pytest.mark.gen_test
async def test_each_event_has_its_own_session(flavour: Flavour, connect: Connect) -> None:
    """The handshake, open, on_message, on_ping, on_pong and on_close."""
    labels: list[str] = []
    sessions: list[Any] = []

    async def use(handler: Any) -> None:
        await settle(handler.session.execute(select(1)))
        labels.append(current_scope().label)
        sessions.append(handler.session)

    class Handler(socket_class(flavour)):
        async def prepare(self) -> None:
            await use(self)
            self.user = "kept on the handler"

        async def open(self, *args: Any) -> None:
            assert flavour.db.status().open_scopes == []  # the handshake is over
            await use(self)

        async def on_message(self, message: Any) -> None:
            assert self.user == "kept on the handler"
            await use(self)
            self.ping(b"x")

        async def on_ping(self, data: bytes) -> None:
            await use(self)

        async def on_pong(self, data: bytes) -> None:
            await use(self)

        async def on_close(self) -> None:
            await use(self)

    client = await connect(Handler)
    await client.write_message("")
    await until(lambda: "WS /feed on_pong" in labels)
    client.ping(b"y")
    await until(lambda: "WS /feed on_ping" in labels)
    client.close()
    await until(lambda: "WS /feed on_close" in labels)
    events = ["open", "on_message", "on_pong", "on_ping", "on_close"]
    assert labels == ["GET /feed", *(f"WS /feed {event}" for event in events)]
    assert len(set(map(id, sessions))) == 6


@pytest.mark.gen_test
async def test_mixed_in_by_hand(flavour: Flavour, connect: Connect) -> None:
    """BaseHandler before Tornado's own class, with the events in a plain mixin."""
    sessions: list[Any] = []

    class Events:
        async def on_message(self: Any, message: Any) -> None:
            found = (await settle(self.session.execute(select(1)))).scalar()
            sessions.append(self.session)
            self.write_message(f"{found}")

    class ByHand(Events, BaseHandler, WebSocketHandler):
        pass

    class Ours(Events, socket_class(flavour)):
        pass

    awaits = issubclass(Ours, AsyncSessionWebSocketHandler)
    client = await connect(Ours if awaits else ByHand)
    assert [await ask(client) for _ in range(2)] == ["1", "1"]
    client.close()
    assert sessions[0] is not sessions[1]


def test_wrong_order_of_bases() -> None:
    with pytest.raises(TypeError, match="BaseHandler must come before"):
        type("Wrong", (WebSocketHandler, BaseHandler), {})


@pytest.mark.gen_test
async def test_inner_calls_belong_to_the_event(flavour: Flavour, connect: Connect) -> None:
    scopes: list[Any] = []

    class Parent(socket_class(flavour)):
        async def on_message(self, message: Any) -> Any:
            scopes.append(current_scope())
            await settle(self.session.execute(select(1)))
            return "inner"

    class Handler(Parent):
        async def on_message(self, message: Any) -> None:
            assert await super().on_message(message) == "inner"
            assert await Parent.on_message(self, message) == "inner"
            scopes.append(current_scope())
            self.write_message(await self.on_ping(b""))

        async def on_ping(self, data: bytes) -> str:
            scopes.append(current_scope())
            return "pinged"

    client = await connect(Handler)
    assert await ask(client) == "pinged"
    client.close()
    assert len(scopes) == 4 and len(set(scopes)) == 1


# -- where there is a session, and where not ---------------------------------------


@pytest.mark.gen_test
async def test_no_session_outside_an_event(flavour: Flavour, connect: Connect) -> None:
    handlers: list[Any] = []

    class Handler(socket_class(flavour)):
        def open(self, *args: Any) -> None:
            handlers.append(self)

        async def on_message(self, message: Any) -> None:
            if len(handlers) == 2:
                with pytest.raises(NoActiveScope, match="code of 'WS /feed on_message'"):
                    (self if self is handlers[1] else handlers[1]).session  # noqa: B018  (asking is enough)
            self.write_message("")

    client = await connect(Handler)
    other = await connect(Handler)
    await ask(client)  # another handler's event
    for use in ("session", "release"):
        with pytest.raises(NoActiveScope, match=r"WS /feed.*code of no event.*db\.scope"):
            getattr(handlers[0], use)()
    client.close()
    other.close()
    await until(lambda: handlers[0].ws_connection is None)
    with pytest.raises(NoActiveScope):
        handlers[0].session  # noqa: B018


@pytest.mark.gen_test
async def test_task_that_outlives_its_event(flavour: Flavour, connect: Connect) -> None:
    """ScopeClosed, through self.session and db.session alike; nothing comes back to life."""
    go_on = asyncio.Event()
    tasks: list[Any] = []

    class Handler(socket_class(flavour)):
        async def later(self) -> str:
            await go_on.wait()
            for use in (lambda: self.session, flavour.session):
                with pytest.raises(ScopeClosed, match="WS /feed on_message"):
                    use()
            return "closed"

        async def on_message(self, message: Any) -> None:
            await settle(self.session.execute(select(1)))
            tasks.append(asyncio.ensure_future(self.later()))
            self.write_message("")

    client = await connect(Handler)
    await ask(client)
    await ask(client)
    go_on.set()
    assert await asyncio.gather(*tasks) == ["closed", "closed"]
    client.close()


@pytest.mark.gen_test
async def test_a_block_inside_an_event(flavour: Flavour, connect: Connect) -> None:
    """db.session is the block's in there, and self.session the event's, as in a request."""
    seen: list[Any] = []

    class Handler(socket_class(flavour)):
        async def on_message(self, message: Any) -> None:
            mine = self.session

            async def write(session: Any) -> None:
                assert flavour.db.session() is session and session is not mine
                seen.append(self.session is mine)
                seen.append(self.current_user is mine)
                session.add(Note(text="block"))

            await flavour.in_scope(write, commit=True)
            assert flavour.session() is mine
            self.write_message("")

        def get_current_user(self) -> Any:
            return flavour.session()

    client = await connect(Handler)
    await ask(client)
    client.close()
    assert seen == [True, True] and flavour.texts() == ["block"]


@pytest.mark.gen_test
async def test_children_of_an_event_share_its_session(flavour: Flavour, connect: Connect) -> None:
    class Handler(socket_class(flavour)):
        async def child(self) -> Any:
            await asyncio.sleep(0)
            assert self.session is flavour.session()
            return self.session

        async def on_message(self, message: Any) -> None:
            children = await asyncio.gather(self.child(), self.child())
            self.write_message(str(all(child is self.session for child in children)))

    client = await connect(Handler)
    assert await ask(client) == "True"
    client.close()


# -- events that overlap, and the end of the socket ----------------------------------


@pytest.mark.gen_test
async def test_on_ping_during_on_message(flavour: Flavour, connect: Connect) -> None:
    """A ping that comes before the message goes on while the message does."""
    sessions: dict[str, Any] = {}
    pinged, answered = asyncio.Event(), asyncio.Event()

    class Handler(socket_class(flavour)):
        async def on_ping(self, data: bytes) -> None:
            await settle(self.session.execute(select(1)))
            sessions["ping"] = self.session
            pinged.set()
            await answered.wait()
            assert self.session is flavour.session() is sessions["ping"]
            await settle(self.session.execute(select(1)))

        async def on_message(self, message: Any) -> None:
            await pinged.wait()
            await settle(self.session.execute(select(1)))
            sessions["message"] = self.session
            answered.set()
            await asyncio.sleep(0.01)
            assert self.session is flavour.session() is sessions["message"]
            self.write_message("")

    client = await connect(Handler)
    client.ping(b"")
    await ask(client)
    client.close()
    assert sessions["ping"] is not sessions["message"]


@pytest.mark.parametrize("kind", ["def", "async def", "generator"])
@pytest.mark.gen_test
async def test_on_close_after_an_abrupt_close(
    flavour: Flavour, connect: Connect, kind: str
) -> None:
    """It has a session of its own, and comes after the message that is running."""
    order: list[str] = []
    sessions: list[Any] = []
    reading, go_on = asyncio.Event(), asyncio.Event()
    is_awaited = flavour.is_async and not flavour.is_bridged

    class Handler(socket_class(flavour)):
        async def on_message(self, message: Any) -> None:
            sessions.append(self.session)
            self.session.add(Note(text="whole"))
            await settle(self.session.flush())
            reading.set()
            await go_on.wait()
            await settle(self.session.commit())
            order.append("on_message")

        if kind == "def":

            def on_close(self) -> None:
                sessions.append(self.session)
                if not is_awaited:
                    assert self.session.scalar(select(Note.text)) == "whole"
                order.append("on_close")

        elif kind == "async def":

            async def on_close(self) -> None:
                sessions.append(self.session)
                result = await settle(self.session.execute(select(Note.text)))
                assert result.scalar() == "whole"
                self.session.add(Note(text="closed"))
                await settle(self.session.commit())
                order.append("on_close")

        else:

            @gen.coroutine
            def on_close(self) -> Any:
                sessions.append(self.session)
                yield gen.moment
                order.append("on_close")
                assert self.session is sessions[1]

    client = await connect(Handler)
    await client.write_message("")
    await reading.wait()
    vanish(client)
    await asyncio.sleep(0.01)
    go_on.set()
    await until(lambda: order == ["on_message", "on_close"])
    await no_connection_out(flavour)
    assert sessions[0] is not sessions[1]
    assert sorted(flavour.texts()) == (["closed", "whole"] if kind == "async def" else ["whole"])


@pytest.mark.gen_test
async def test_dispose_waits_for_on_close(flavour: Flavour, connect: Connect) -> None:
    if not flavour.is_async:
        pytest.skip("Database.dispose() is no coroutine")
    closing = asyncio.Event()

    class Handler(socket_class(flavour)):
        async def on_close(self) -> None:
            closing.set()
            await asyncio.sleep(0.02)
            self.session.add(Note(text="closed"))
            await settle(self.session.commit())

    vanish(await connect(Handler))
    await closing.wait()
    await flavour.db.dispose()
    assert flavour.texts() == ["closed"]


@pytest.mark.gen_test
async def test_dispose_waits_for_a_message_that_is_being_handled(
    flavour: Flavour, connect: Connect
) -> None:
    """But not for its socket, which stays open."""
    if not flavour.is_async:
        pytest.skip("Database.dispose() is no coroutine")
    begun = asyncio.Event()

    class Handler(socket_class(flavour)):
        async def on_message(self, message: Any) -> None:
            self.session.add(Note(text=message))
            await settle(self.session.flush())
            begun.set()
            await asyncio.sleep(0.05)
            await settle(self.session.commit())
            self.write_message("stored")

    client = await connect(Handler)
    client.write_message("whole")
    await begun.wait()
    await flavour.db.dispose()
    assert flavour.texts() == ["whole"]
    assert await client.read_message() == "stored"
    client.close()


@pytest.mark.gen_test
async def test_messages_keep_their_order(flavour: Flavour, connect: Connect) -> None:
    """Tornado waits for one message before the next; so do we, its session included."""
    order: list[str] = []
    running: list[str] = []

    class Handler(socket_class(flavour)):
        async def on_message(self, message: Any) -> None:
            assert running == [] and flavour.checked_out() == 0
            running.append(message)
            await settle(self.session.execute(select(1)))
            await asyncio.sleep(0.002 if int(message) % 2 else 0)
            order.append(message)
            running.remove(message)

    client = await connect(Handler)
    for number in range(20):
        client.write_message(str(number))
    await until(lambda: len(order) == 20)
    client.close()
    assert order == [str(number) for number in range(20)]


@pytest.mark.gen_test
async def test_cancel_on_disconnect_never_breaks_off_an_event(
    flavour: Flavour, connect: Connect
) -> None:
    reading, go_on = asyncio.Event(), asyncio.Event()

    class Handler(socket_class(flavour)):
        cancel_on_disconnect = True

        async def on_message(self, message: Any) -> None:
            reading.set()
            await go_on.wait()
            self.session.add(Note(text="whole"))
            await settle(self.session.commit())

    client = await connect(Handler)
    await client.write_message("")
    await reading.wait()
    vanish(client)
    await asyncio.sleep(0.01)
    go_on.set()
    await until(lambda: flavour.texts() == ["whole"])


# -- the handshake -------------------------------------------------------------------


@pytest.mark.gen_test
async def test_client_vanishes_in_the_handshake(
    flavour: Flavour,
    http_server: Any,
    base_url: str,
    app: Any,
    expected_log: list[str],
) -> None:
    """With cancel_on_disconnect its task is cancelled, as that of any request."""
    entered = asyncio.Event()
    expected_log += CANCELLED_LOG

    class Handler(socket_class(flavour)):
        cancel_on_disconnect = True

        async def prepare(self) -> None:
            await settle(self.session.execute(select(1)))
            entered.set()
            await asyncio.sleep(60)

    app.add_handlers(r".*", [("/feed", Handler)])
    async with RawClient(base_url) as client:
        await client.send("GET /feed HTTP/1.1\nHost: x\nUpgrade: websocket\nConnection: upgrade")
        await entered.wait()
        client.vanish()
        await no_connection_out(flavour)


@pytest.mark.parametrize("why", ["origin", "headers", "no upgrade", "version", "prepare"])
@pytest.mark.gen_test
async def test_refused_handshake(
    flavour: Flavour, app: Any, http_client: Any, base_url: str, why: str
) -> None:
    scopes: list[Any] = []

    class Handler(socket_class(flavour)):
        async def prepare(self) -> None:
            await settle(self.session.execute(select(1)))
            scopes.append(current_scope())
            if why == "prepare":
                raise tornado.web.HTTPError(401)

        def open(self, *args: Any) -> None:
            scopes.append("opened")

        def on_close(self) -> None:
            scopes.append("closed")

    app.add_handlers(r".*", [("/feed", Handler)])
    headers = {
        "Upgrade": "websocket",
        "Connection": "upgrade",
        "Sec-WebSocket-Key": "x",
        "Sec-WebSocket-Version": "13",
    }
    if why == "origin":
        headers["Origin"] = "http://elsewhere.example"
    elif why == "headers":
        del headers["Sec-WebSocket-Key"]
    elif why == "no upgrade":
        del headers["Upgrade"]
    elif why == "version":
        headers["Sec-WebSocket-Version"] = "1"
    response = await http_client.fetch(base_url + "/feed", headers=headers, raise_error=False)
    codes = {"origin": 403, "headers": 400, "no upgrade": 400, "version": 426, "prepare": 401}
    assert response.code == codes[why]
    await no_connection_out(flavour)
    assert [scope.closed for scope in scopes] == [True]


@pytest.mark.gen_test
async def test_get_of_ones_own(flavour: Flavour, connect: Connect) -> None:
    """It lasts as long as the socket; its session does not."""
    seen: list[Any] = []

    class Handler(socket_class(flavour)):
        async def get(self, *args: Any, **kwargs: Any) -> None:
            await settle(self.session.execute(select(1)))
            seen.append(self.session)
            await super().get(*args, **kwargs)
            with pytest.raises(ScopeClosed, match="GET /feed"):
                self.session  # noqa: B018
            seen.append("closed")

        async def open(self, *args: Any) -> None:
            await settle(self.session.execute(select(1)))
            seen.append(self.session)

        async def on_message(self, message: Any) -> None:
            await no_connection_out(flavour)  # of get() and of open(); one may be on its way
            await settle(self.session.execute(select(1)))
            seen.append(self.session)
            self.write_message("")

    client = await connect(Handler)
    await ask(client)
    await ask(client)
    client.close()
    await until(lambda: "closed" in seen)
    assert len(set(map(id, seen))) == 5


@pytest.mark.gen_test
async def test_after_commit_of_an_event(flavour: Flavour, connect: Connect) -> None:
    """Called when the event is over; what its rollback took back is not."""
    seen: list[str] = []

    class Handler(socket_class(flavour)):
        async def on_message(self, message: str) -> None:
            self.session.add(Note(text=message))
            self.after_commit(seen.append, message)
            if message == "kept":
                await settle(self.session.commit())
            assert seen == []

    client = await connect(Handler)
    await client.write_message("lost")
    await client.write_message("kept")
    await until(lambda: seen)
    assert seen == ["kept"]
    assert flavour.texts() == ["kept"]
    client.close()


# -- errors ---------------------------------------------------------------------------


@pytest.mark.parametrize("event", ["open", "on_message", "on_ping", "on_pong"])
@pytest.mark.gen_test
async def test_exception_in_an_event(
    flavour: Flavour, connect: Connect, expected_log: list[str], event: str
) -> None:
    """Logged by Tornado, and the socket is closed; nothing is committed, nothing left."""

    async def fail(handler: Any, *args: Any) -> None:
        handler.session.add(Note(text="lost"))
        await settle(handler.session.flush())
        raise ValueError("broken event")

    class Handler(socket_class(flavour)):
        async def on_message(self, message: Any) -> None:
            if event == "on_pong":
                self.ping(b"")

    setattr(Handler, event, fail)

    class Wrapped(Handler):  # so that the events are wrapped
        pass

    # Tornado 6.5 leaves the socket open when a coroutine failed; we do not under the bridge.
    stays_open = tornado.version_info < (6, 6) and event != "open" and flavour.name not in BRIDGED
    if not stays_open:
        expected_log.append("Uncaught exception GET /feed")
    else:
        expected_log.append("Exception in callback")
    client = await connect(Wrapped)
    if event in ("on_message", "on_pong"):
        await client.write_message("")
    elif event == "on_ping":
        client.ping(b"")
    if not stays_open:
        assert await client.read_message() is None
    else:
        await asyncio.sleep(0.05)
        client.close()
    await no_connection_out(flavour)
    assert flavour.texts() == []
    assert flavour.db.status().open_scopes == []


@pytest.mark.parametrize("kind", ["def", "async def"])
@pytest.mark.gen_test
async def test_exception_in_on_close(
    flavour: Flavour,
    connect: Connect,
    caplog: pytest.LogCaptureFixture,
    expected_log: list[str],
    kind: str,
) -> None:
    class Handler(socket_class(flavour)):
        if kind == "def":

            def on_close(self) -> None:
                self.session.add(Note(text="lost"))
                raise RuntimeError("broken on_close")
        else:

            async def on_close(self) -> None:
                self.session.add(Note(text="lost"))
                await settle(self.session.flush())
                raise RuntimeError("broken on_close")

    expected_log.append("Uncaught exception GET /feed")
    client = await connect(Handler)
    client.close()
    await until(lambda: caplog.records)
    await no_connection_out(flavour)
    assert flavour.texts() == []


@pytest.mark.gen_test
async def test_session_in_log_exception(flavour: Flavour, connect: Connect) -> None:
    """The event that failed is over: it is a unit of work of its own."""
    seen: list[Any] = []

    class Handler(socket_class(flavour)):
        def open(self, *args: Any) -> None:
            seen.append(self.session)
            raise ValueError("broken event")

        def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
            seen.append(self.session)
            seen.append(current_scope().label)
            seen.append(str(value))

    client = await connect(Handler)
    assert await client.read_message() is None
    assert seen[0] is not seen[1]
    assert seen[2:] == ["WS /feed log_exception", "broken event"]


@pytest.mark.gen_test
async def test_close_in_open(flavour: Flavour, connect: Connect) -> None:
    seen: list[str] = []

    class Handler(socket_class(flavour)):
        async def open(self, *args: Any) -> None:
            await settle(self.session.execute(select(1)))
            self.close(1000, "go away")

        async def on_close(self) -> None:
            await settle(self.session.execute(select(1)))
            seen.append(current_scope().label)

    client = await connect(Handler)
    assert await client.read_message() is None
    await until(lambda: seen == ["WS /feed on_close"])
    await no_connection_out(flavour)


@pytest.mark.gen_test
async def test_handler_without_a_database(app: Any, flavour: Flavour, connect: Connect) -> None:
    """A handler that never asks for its session needs none, also for an async on_close."""
    app.settings["db"] = None
    closed = asyncio.Event()

    class Handler(socket_class(flavour)):
        def on_message(self, message: Any) -> Any:
            return self.write_message(message)

        async def on_close(self) -> None:
            await asyncio.sleep(0)
            closed.set()

    client = await connect(Handler)
    assert await ask(client, "echo") == "echo"
    client.close()
    await closed.wait()


# -- the bridge -------------------------------------------------------------------------


@only(*BRIDGED)
@pytest.mark.parametrize("kind", ["def", "async def"])
@pytest.mark.gen_test
async def test_lazy_loading_in_every_event(flavour: Flavour, connect: Connect, kind: str) -> None:
    async with flavour.db.begin() as session:
        session.add_all([Note(id=1, text="one"), Reply(note_id=1), Reply(note_id=1)])
    found: list[str] = []

    def load(handler: Any, *args: Any) -> None:
        note = handler.get_or_404(Note, 1)
        found.append(f"{current_scope().label.split()[-1]} {len(note.replies)}")

    async def load_later(handler: Any, *args: Any) -> None:
        await asyncio.sleep(0)
        load(handler)

    class Handler(SessionWebSocketHandler):
        open = on_ping = on_pong = on_close = load if kind == "def" else load_later  # type: ignore[assignment]

        if kind == "def":

            def on_message(self, message: Any) -> None:
                load(self)
                self.ping(b"")
        else:

            async def on_message(self, message: Any) -> None:
                await load_later(self)
                self.ping(b"")

    client = await connect(Handler)
    await client.write_message("")
    await until(lambda: "on_pong 2" in found)
    client.ping(b"")
    await until(lambda: "on_ping 2" in found)
    client.close()
    await until(lambda: "on_close 2" in found)
    assert found[:2] == ["open 2", "on_message 2"]


@only(*BRIDGED)
@pytest.mark.gen_test
async def test_hook_at_the_end_of_the_handshake(flavour: Flavour, connect: Connect) -> None:
    """A query in on_finish, and a get() under the bridge: the stream is detached all the same."""
    seen: list[str] = []

    class Handler(SessionWebSocketHandler):
        async def get(self, *args: Any, **kwargs: Any) -> None:
            self.session.scalar(select(1))
            await super().get(*args, **kwargs)

        def on_finish(self) -> None:
            self.session.scalar(select(1))
            seen.append(current_scope().label)

        def on_message(self, message: Any) -> None:
            self.write_message(f"{self.session.scalar(select(1))}")

    client = await connect(Handler)
    assert [await ask(client) for _ in range(3)] == ["1"] * 3
    client.close()
    await until(lambda: seen == ["GET /feed"])  # on_finish is a task, beside the messages


@only(*BRIDGED)
@pytest.mark.gen_test
async def test_generator_under_the_bridge(flavour: Flavour, connect: Connect) -> None:
    """As in a verb: after its first yield it runs outside, and our error says so."""

    class Handler(SessionWebSocketHandler):
        @gen.coroutine
        def on_message(self, message: Any) -> Any:
            self.session.scalar(select(1))
            yield gen.moment
            with pytest.raises(TornadoSAError, match="async def"):
                self.session.scalar(select(1))
            self.write_message("refused")

    client = await connect(Handler)
    assert await ask(client) == "refused"
    client.close()


@only(*BRIDGED)
@pytest.mark.gen_test
async def test_on_connection_close_of_ones_own(flavour: Flavour, connect: Connect) -> None:
    """It belongs to the handshake, so it has no session; on_close, which it calls, has."""
    seen: list[Any] = []

    class Handler(SessionWebSocketHandler):
        def on_connection_close(self) -> None:
            with pytest.raises((NoActiveScope, ScopeClosed)):
                self.session  # noqa: B018
            super().on_connection_close()

        def on_close(self) -> None:
            seen.append(self.session.scalar(select(1)))

    vanish(await connect(Handler))
    await until(lambda: seen == [1])


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
@only(*BRIDGED, "asyncpg")
@pytest.mark.gen_test
async def test_eager_tasks(flavour: Flavour, connect: Connect) -> None:
    """Under a `get` of one's own, an event's task starts inside the greenlet of the handshake."""
    asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined,unused-ignore]
    closed = asyncio.Event()

    class Handler(socket_class(flavour)):
        async def get(self, *args: Any, **kwargs: Any) -> None:
            await settle(self.session.execute(select(1)))
            await super().get(*args, **kwargs)

        async def on_message(self, message: Any) -> None:
            await settle(self.session.execute(select(1)))
            await asyncio.sleep(0)
            self.write_message(f"{(await settle(self.session.execute(select(1)))).scalar()}")

        async def on_ping(self, data: bytes) -> None:
            await settle(self.session.execute(select(1)))

        async def on_close(self) -> None:
            await settle(self.session.execute(select(1)))
            closed.set()

    client = await connect(Handler)
    for _ in range(3):
        client.ping(b"")
        assert await ask(client) == "1"
    client.close()
    await closed.wait()


# -- many sockets, and what is left -------------------------------------------------------


# The whole drill of 1,000 takes some minutes for all flavours.
SOCKETS = int(os.environ.get("TORNADO_SA_SOCKETS", "50"))


@with_options(
    engine_options={"pool_size": 5, "max_overflow": 0, "pool_timeout": 300},
)
@pytest.mark.gen_test(timeout=600)
async def test_many_sockets_and_a_small_pool(flavour: Flavour, connect: Connect) -> None:
    """Row 18: each of them sends ten messages that query and write; all are answered."""

    class Handler(socket_class(flavour)):
        async def on_message(self, message: Any) -> None:
            found = await settle(self.session.scalar(select(literal(message))))
            self.session.add(Note(text=found))
            await settle(self.session.commit())
            self.write_message(found)

    clients = [await connect(Handler)]
    while len(clients) < SOCKETS:  # in groups: the backlog of a listening socket is 128
        more = min(100, SOCKETS - len(clients))
        clients += await asyncio.gather(*(connect(Handler, "/feed") for _ in range(more)))

    async def talk(number: int, client: Any) -> None:
        for turn in range(10):
            message = f"{number}-{turn}"
            assert await ask(client, message) == message

    pool: Any = flavour.sync_engine.pool
    assert pool.checkedout() == 0
    await asyncio.gather(*(talk(number, client) for number, client in enumerate(clients)))
    await until(lambda: pool.checkedout() == 0)
    assert (await ask(clients[0], "one more"), pool.checkedout()) == ("one more", 0)
    assert len(flavour.texts()) == len(set(flavour.texts())) == 10 * SOCKETS + 1
    for client in clients:
        client.close()


@pytest.mark.parametrize("ends", ["closes", "vanishes", "open raises"])
@pytest.mark.gen_test
async def test_no_reference_cycle(flavour: Flavour, connect: Connect, ends: str) -> None:
    """Handler, sessions and scopes are gone without the garbage collector."""
    watched: list[weakref.ref[Any]] = []
    closed: list[bool] = []
    fails: list[bool] = []

    async def use(handler: Any) -> None:
        handler.session.add(Note(text="lost"))
        await settle(handler.session.flush())
        watched.extend(weakref.ref(kept) for kept in (handler.session, current_scope()))

    class Handler(socket_class(flavour)):
        def initialize(self) -> None:
            if ends != "open raises":  # then Tornado itself leaves a cycle
                watched.append(weakref.ref(self))

        async def open(self, *args: Any) -> None:
            await use(self)
            if fails:
                raise ValueError("broken event")

        async def on_message(self, message: Any) -> None:
            await use(self)
            self.write_message("")

        async def on_close(self) -> None:
            await use(self)
            closed.append(True)

        def log_exception(self, *error: Any) -> None:
            assert fails  # and no log line, which would keep the traceback

    async def session() -> None:
        client = await connect(Handler)
        if fails:
            assert await client.read_message() is None
            return
        await ask(client)
        if ends == "closes":
            client.close()
        else:
            vanish(client)
        await until(lambda: closed)

    await session()  # what SQLAlchemy and the drivers keep from a first time
    await no_connection_out(flavour)
    watched.clear()
    closed.clear()
    fails[:] = [True] if ends == "open raises" else []
    with no_garbage_collector():
        await session()
        await no_connection_out(flavour)
        assert len(watched) == (2 if fails else 7)
        await until(lambda: [ref() for ref in watched if ref() is not None] == [])
    gc.collect()


@pytest.mark.gen_test
async def test_client_error(flavour: Flavour, connect: Connect) -> None:
    """A handler that is refused in prepare() says so to the client."""

    class Handler(socket_class(flavour)):
        async def prepare(self) -> None:
            await self.refuse() if flavour.is_async and not flavour.is_bridged else self.refuse()

        def refuse(self) -> Any:
            return self.get_or_404(Note, 1)

    with pytest.raises(HTTPClientError, match="404"):
        await connect(Handler)
