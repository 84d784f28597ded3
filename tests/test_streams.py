"""Streamed uploads, and requests that never get to on_finish. Rows 13, 14 and 16."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import func, select
from tornado import gen
from tornado.web import stream_request_body

from tests.support import Flavour, Note, RawClient, proxy, settle, until
from tornado_sa import ScopeClosed

UPLOAD = "POST /upload HTTP/1.1\nHost: x\nContent-Length: 300000"


async def coroutine_received(handler: Any, chunk: bytes) -> None:
    await settle(proxy(handler).execute(select(1)))
    handler.sessions.append(proxy(handler)())


def returned_received(handler: Any, chunk: bytes) -> Any:
    return coroutine_received(handler, chunk)


@gen.coroutine
def generator_received(handler: Any, chunk: bytes) -> Any:
    yield gen.moment
    handler.sessions.append(proxy(handler)())


def plain_received(handler: Any, chunk: bytes) -> None:
    handler.sessions.append(proxy(handler)())


@pytest.mark.parametrize(
    "received", [plain_received, coroutine_received, returned_received, generator_received]
)
@pytest.mark.gen_test
async def test_one_session_for_the_whole_upload(
    flavour: Flavour, serve: Any, received: Any
) -> None:
    """data_received is called from the connection's task, which knows nothing of prepare()."""

    class Handler(flavour.Handler):
        data_received = received

        def prepare(self) -> None:
            self.sessions = [proxy(self)()]

        async def post(self) -> None:
            self.sessions += [self.session, proxy(self)()]
            self.write(f"{len(set(map(id, self.sessions)))} {len(self.sessions) > 6}")

    fetch = serve(stream_request_body(Handler))
    response = await fetch(method="POST", body=b"x" * 300_000)
    assert response.body == b"1 True"


@pytest.mark.gen_test
async def test_scope_does_not_leak_to_the_next_request_of_the_connection(
    flavour: Flavour, serve: Any, base_url: str
) -> None:
    """The connection's task lives on; its context must not keep the scope of an upload."""
    from tornado_sa import scope

    class Upload(flavour.Handler):
        async def data_received(self, chunk: bytes) -> None:
            await settle(self.session.execute(select(1)))

        async def post(self) -> None: ...

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.set_header("Before", repr(scope.current.get()))

    serve(stream_request_body(Upload))
    async with RawClient(base_url) as client:
        for _ in range(2):
            await client.send(UPLOAD, b"x" * 300_000)
            head = await client.reader.readuntil(b"\r\n\r\n")
            assert b"Before: None" in head


@pytest.mark.parametrize("override", ["none", "calls super", "forgets super"])
@pytest.mark.gen_test
async def test_upload_whose_client_vanishes(
    flavour: Flavour, serve: Any, base_url: str, override: str
) -> None:
    """Tornado never calls on_finish here."""
    received: list[int] = []

    class Handler(flavour.Handler):
        async def data_received(self, chunk: bytes) -> None:
            self.session.add(Note(text="half"))
            await settle(self.session.flush())
            received.append(len(chunk))

        async def post(self) -> None:
            raise AssertionError("never called")

    if override != "none":

        def on_connection_close(self: Any) -> None:
            assert proxy(self)() is self.session
            if override == "calls super":
                super(Handler, self).on_connection_close()

        made = type("Handler", (Handler,), {"on_connection_close": on_connection_close})
        Handler = made  # type: ignore[assignment]  # a class made by a call

    serve(stream_request_body(Handler))
    async with RawClient(base_url) as client:
        await client.send(UPLOAD, b"x" * 100_000)
        await until(lambda: received)
        assert flavour.checked_out() == 1
        client.vanish()
        await until(lambda: flavour.checked_out() == 0, seconds=1)  # 100 ms on a quiet machine
    assert flavour.texts() == []


@pytest.mark.gen_test
async def test_detach(flavour: Flavour, serve: Any, base_url: str) -> None:
    class Handler(flavour.Handler):
        async def get(self) -> None:
            await settle(self.session.execute(select(1)))
            stream = self.detach()
            await stream.write(b"HTTP/1.1 299 Mine\r\n\r\n")
            stream.close()

    serve(Handler)
    async with RawClient(base_url) as client:
        await client.send("GET / HTTP/1.1\nHost: x")
        assert await client.status() == 299
    await until(lambda: flavour.checked_out() == 0)


@pytest.mark.gen_test
async def test_response_that_is_finished_later(flavour: Flavour, serve: Any) -> None:
    """``_auto_finish = False``: the unit of work is over when the verb is."""
    outcome: list[str] = []

    class Handler(flavour.Handler):
        async def get(self) -> None:
            self._auto_finish = False
            await settle(self.session.execute(select(1)))
            asyncio.get_running_loop().call_later(0.02, self.later)

        def later(self) -> None:
            with pytest.raises(ScopeClosed):
                _ = self.session
            outcome.append("closed")
            self.finish("later")

    assert (await serve(Handler)()).body == b"later"
    assert outcome == ["closed"]


@pytest.mark.gen_test
async def test_error_inside_write_error(
    flavour: Flavour, serve: Any, expected_log: list[str]
) -> None:
    class Handler(flavour.Handler):
        async def get(self) -> None:
            await settle(self.session.execute(select(1)))
            raise ValueError("first")

        def write_error(self, status_code: int, **kwargs: Any) -> None:
            raise ValueError("second")

    expected_log += ["Uncaught exception GET /", "Uncaught exception in write_error"]
    assert (await serve(Handler)()).code == 500


@pytest.mark.gen_test
@pytest.mark.parametrize("method", ["__init__", "set_default_headers", "initialize"])
async def test_construction_that_raises_after_using_the_session(
    flavour: Flavour, serve: Any, base_url: str, expected_log: list[str], method: str
) -> None:
    """Tornado calls nothing after that."""

    def use_and_raise(self: Any, *args: Any, **kwargs: Any) -> None:
        if args:
            flavour.Handler.__init__(self, *args, **kwargs)
        self.session.add(Note(text="lost"))
        if not flavour.is_async:
            self.session.flush()
        raise ValueError("while it is made")

    Handler = type("Handler", (flavour.Handler,), {method: use_and_raise})

    serve(Handler)
    expected_log.append("Uncaught exception")
    async with RawClient(base_url) as client:
        await client.send("GET / HTTP/1.1\nHost: x")
        assert await client.reader.read() == b""
    await until(lambda: not flavour.db.status().open_scopes)
    assert await flavour.in_scope(lambda s: s.scalar(select(func.count(Note.id)))) == 0
