"""What is left after a request: nothing. Rows 26 and 28, and what an idle request costs."""

from __future__ import annotations

import asyncio
import gc
import time
import tracemalloc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import select
from tornado.httputil import HTTPHeaders, HTTPServerRequest, RequestStartLine
from tornado.web import Application, Finish, HTTPError, RequestHandler

from tests.support import Flavour, Note, settle, until
from tornado_sa import SessionHandler, current_scope


@contextmanager
def no_garbage_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("methods", [frozenset(), frozenset({"GET"})], ids=["", "transactional"])
@pytest.mark.parametrize("ends", ["returns", "HTTPError", "Finish", "finish", "405"])
@pytest.mark.gen_test
async def test_no_reference_cycle(
    flavour: Flavour, serve: Any, ends: str, methods: frozenset[str]
) -> None:
    """Handler, session and scope are gone without the garbage collector."""
    watched: list[weakref.ref[Any]] = []

    class Handler(flavour.Handler):
        transactional_methods = methods

        def initialize(self) -> None:
            watched.append(weakref.ref(self))

        async def get(self) -> None:
            await settle(self.session.get(Note, 1))
            watched.extend(weakref.ref(kept) for kept in (self.session, current_scope()))
            if flavour.is_async and not flavour.is_bridged:
                watched.append(weakref.ref(self.session.sync_session))
            if ends == "HTTPError":
                raise HTTPError(400)
            if ends == "Finish":
                raise Finish
            if ends == "finish":
                self.finish()

    fetch = serve(Handler)
    await fetch()  # what SQLAlchemy and the drivers keep from a first time
    await until(lambda: flavour.checked_out() == 0)
    watched.clear()
    with no_garbage_collector():
        await fetch(method="DELETE" if ends == "405" else "GET")
        await until(lambda: flavour.checked_out() == 0)
        assert len(watched) == (
            1 if ends == "405" else 3 + (flavour.is_async and not flavour.is_bridged)
        )
        await until(lambda: [ref() for ref in watched if ref() is not None] == [])


class FakeConnection:
    """Takes a response and drops it: the cost of sockets is not what is measured here."""

    def set_close_callback(self, callback: Any) -> None: ...

    def write_headers(self, *args: Any) -> Any:
        future: asyncio.Future[None] = asyncio.Future()
        future.set_result(None)
        return future

    def finish(self) -> None: ...


async def handle(app: Application, count: int) -> None:
    """Let ``app`` handle ``count`` requests for "/", without a socket."""
    for _ in range(count):
        request = HTTPServerRequest(
            connection=FakeConnection(),  # type: ignore[arg-type]  # has what a request needs
            headers=HTTPHeaders({"Host": "x"}),
            start_line=RequestStartLine("GET", "/", "HTTP/1.1"),
        )
        app.find_handler(request).finish()
        await asyncio.sleep(0)
        await asyncio.sleep(0)


@pytest.mark.gen_test(timeout=60)
async def test_memory_stays_flat(flavour: Flavour) -> None:
    """In small: 2,000 requests. ``.ci/run`` sends 100,000 to the example server."""

    class Handler(flavour.Handler):
        async def get(self) -> None:
            await settle(self.session.execute(select(1)))

    app = Application([("/", Handler)], db=flavour.db, log_function=lambda handler: None)

    async def batch() -> int:
        await handle(app, 1000)
        await until(lambda: flavour.checked_out() == 0 and len(asyncio.all_tasks()) == 1)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    await batch()
    before = await batch()
    growth: list[int] = []
    # What leaks grows with each batch; a connection more than before, or one whose thread is about
    # to end, does not. Bytes; one forgotten scope in each request would be 300,000.
    while len(growth) < 4 and min(growth, default=100_000) >= 100_000:
        after = await batch()
        growth.append(after - before)
        before = after
    tracemalloc.stop()
    assert min(growth) < 100_000, growth


def test_idle_request_costs_next_to_nothing(io_loop: Any) -> None:
    """The bound is loose, for machines are noisy; ``benchmarks/idle.py`` measures it (9 µs)."""

    class Bare(RequestHandler):
        async def get(self) -> None:
            pass

    class WithSession(SessionHandler):
        async def get(self) -> None:
            pass

    def cpu(handler: type[RequestHandler]) -> float:
        app = Application([("/", handler)], log_function=lambda handler: None)
        start = time.process_time()
        io_loop.run_sync(lambda: handle(app, 1000))
        return time.process_time() - start

    rounds = [(cpu(Bare), cpu(WithSession)) for _ in range(5)]
    bare, ours = (min(column) for column in zip(*rounds, strict=True))
    assert ours < 2 * bare
