"""Tasks, threads and cancellation inside a request. Rows 6, 7, 8, 24 and 25."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from sqlalchemy import event, select, text
from tornado import gen
from tornado.ioloop import IOLoop

from tests.support import (
    CANCELLED_LOG,
    Flavour,
    Note,
    RawClient,
    make_database,
    only,
    settle,
    until,
)
from tornado_sa import ConcurrentAccess, NoActiveScope, ScopeClosed

async_only = only("aiosqlite", "asyncpg", "psycopg_async")

# About a second each, and long enough to be in the middle of.
SLOW = {
    "postgresql": "SELECT pg_sleep(1)",
    "sqlite": "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r LIMIT 3000000)"
    " SELECT count(*) FROM r",
}


@pytest.mark.gen_test
async def test_what_inherits_the_scope_and_what_does_not(flavour: Flavour, serve: Any) -> None:
    """gather, create_task and asyncio.to_thread do; run_in_executor does not."""

    async def child() -> Any:
        await asyncio.sleep(0)
        return flavour.session()

    def in_executor() -> str:
        with pytest.raises(NoActiveScope, match="run_in_executor"):
            flavour.session()
        return "no scope"

    class Handler(flavour.Handler):
        async def get(self) -> None:
            assert list(await asyncio.gather(child(), child())) == [self.session, self.session]
            assert await asyncio.create_task(child()) is self.session
            assert await asyncio.to_thread(flavour.session) is self.session
            both: Any = await gen.multi([child(), child()])
            assert both == [self.session, self.session]
            assert await IOLoop.current().run_in_executor(None, in_executor) == "no scope"

    assert (await serve(Handler)()).code == 200


@pytest.mark.parametrize("how", ["create_task", "spawn_callback", "call_later"])
@pytest.mark.gen_test
async def test_task_that_outlives_its_request(flavour: Flavour, serve: Any, how: str) -> None:
    outcome: list[Any] = []

    async def background() -> None:
        await until(lambda: not flavour.db.status().open_scopes)
        with pytest.raises(ScopeClosed, match="GET /task"):
            flavour.session()
        outcome.append(await flavour.in_scope(lambda session: session.scalar(select(1))))

    def start() -> None:
        tasks.append(asyncio.ensure_future(background()))

    tasks: list[Any] = []

    class Handler(flavour.Handler):
        async def get(self) -> None:
            await settle(self.session.execute(select(1)))
            if how == "create_task":
                start()
            elif how == "spawn_callback":
                IOLoop.current().spawn_callback(background)
            else:
                IOLoop.current().call_later(0.01, start)

    assert (await serve(Handler)("/task")).code == 200
    await until(lambda: outcome == [1])


@async_only
@pytest.mark.parametrize("began", ["in a transaction", "connecting"])
@pytest.mark.gen_test
async def test_session_still_in_use_when_the_scope_ends(
    flavour: Flavour, serve: Any, expected_log: list[str], began: str
) -> None:
    """A forgotten task loses its connection; the pool does not."""
    failed: list[Exception] = []

    async def child(session: Any) -> None:
        try:
            await session.execute(text(SLOW[flavour.dialect]))
        except Exception as error:
            failed.append(error)
        with pytest.raises(Exception, match=r"closed|aborted|in progress"):
            for _ in range(100):  # psycopg's session lives until its rollback is through
                await session.execute(select(1))

    class Handler(flavour.Handler):
        async def get(self) -> None:
            if began == "in a transaction":
                await self.session.execute(select(1))
            forgotten.append(asyncio.create_task(child(self.session), name="forgotten"))
            await asyncio.sleep(0.05 if began == "in a transaction" else 0)

    forgotten: list[Any] = []
    expected_log.append("GET /gather ended while its session was in use by task 'forgotten'")
    assert (await serve(Handler)("/gather")).code == 200
    await forgotten[0]
    assert len(failed) == 1
    await until(lambda: flavour.checked_out() == 0)


@async_only
@pytest.mark.parametrize("debug", [True, False])
@pytest.mark.gen_test
async def test_two_tasks_use_one_session_at_once(flavour: Flavour, debug: bool) -> None:
    url = flavour.db.engine.url.render_as_string(hide_password=False)
    db = make_database(flavour.name, url, debug=debug)

    async def query(session: Any) -> None:
        await session.execute(text(SLOW[flavour.dialect]))

    async with db.scope() as session:
        first = asyncio.create_task(query(session), name="first")
        second = asyncio.create_task(query(session), name="second")
        outcome = await asyncio.gather(first, second, return_exceptions=True)
    if debug:
        assert outcome[0] is None
        assert isinstance(outcome[1], ConcurrentAccess)
        assert "'second'" in str(outcome[1]) and "'first'" in str(outcome[1])
    elif flavour.name == "asyncpg":
        assert any(isinstance(error, Exception) for error in outcome)
    assert db.engine.pool.checkedout() == 0
    await db.dispose()


@pytest.mark.parametrize("where", ["prepare", "verb"])
@pytest.mark.gen_test
async def test_cancelled_handler(
    flavour: Flavour, serve: Any, expected_log: list[str], where: str
) -> None:
    """Rolled back, closed and answered, on Tornado 6.5 too."""
    tasks: list[Any] = []

    async def wait(handler: Any) -> None:
        handler.session.add(Note(text="lost"))
        await settle(handler.session.flush())
        tasks.append(asyncio.current_task())
        await asyncio.Event().wait()

    class Handler(flavour.Handler):
        async def prepare(self) -> None:
            if where == "prepare":
                await wait(self)

        async def get(self) -> None:
            await wait(self)

    expected_log += CANCELLED_LOG
    fetch = serve(Handler)
    answer = asyncio.ensure_future(fetch())
    await until(lambda: tasks)
    tasks[0].cancel()
    assert (await answer).code == 500
    await until(lambda: flavour.checked_out() == 0)
    assert flavour.texts() == []


@pytest.mark.parametrize("cancels", [True, False])
@pytest.mark.gen_test
async def test_client_vanishes_while_the_verb_waits(
    flavour: Flavour, serve: Any, base_url: str, expected_log: list[str], cancels: bool
) -> None:
    entered, go_on = asyncio.Event(), asyncio.Event()
    outcome: list[str] = []

    class Handler(flavour.Handler):
        cancel_on_disconnect = cancels

        def on_connection_close(self) -> None:  # never calls super()
            outcome.append("gone")

        async def post(self) -> None:
            self.session.add(Note(text="whole"))
            await settle(self.session.flush())
            entered.set()
            await go_on.wait()
            await settle(self.session.commit())
            outcome.append("committed")

    expected_log += CANCELLED_LOG if cancels else []
    serve(Handler)
    async with RawClient(base_url) as client:
        await client.send("POST / HTTP/1.1\nHost: x\nContent-Length: 0")
        await entered.wait()
        client.vanish()
        await until(lambda: outcome)
        if cancels:
            await until(lambda: flavour.checked_out() == 0, seconds=1)
    go_on.set()
    if cancels:
        assert flavour.texts() == []
    else:
        await until(lambda: outcome == ["gone", "committed"])
        assert flavour.texts() == ["whole"]


@pytest.mark.gen_test
async def test_two_databases_in_one_request_one_fails_to_close(
    flavour: Flavour, serve: Any, expected_log: list[str]
) -> None:
    url = flavour.sync_engine.url.render_as_string(hide_password=False)
    other = make_database(flavour.name, url)
    other_engine = other.engine.sync_engine if flavour.is_async else other.engine

    @event.listens_for(other_engine, "rollback")
    def fail(_connection: Any) -> None:
        raise OSError("the rollback failed")

    class Handler(flavour.Handler):
        async def get(self) -> None:
            await settle(self.session.execute(select(1)))
            await settle(other.session.execute(select(1)))  # opened last, so closed first

    expected_log.append("Closing the session of GET / failed: OSError: the rollback failed")
    assert (await serve(Handler)()).code == 200
    await until(lambda: flavour.checked_out() == other_engine.pool.checkedout() == 0)
    assert other.status().open_scopes == []
    await settle(other.dispose())


@only("aiosqlite", "asyncpg", "psycopg_async")
# Under load, asyncpg's discarded connection has been seen to be collected before it was closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("way", "reads"), [("connection", False), ("connection", True), ("stream", False)]
)
@pytest.mark.gen_test
async def test_connection_in_use_behind_the_sessions_back(
    flavour: Flavour, serve: Any, expected_log: list[str], way: str, reads: bool
) -> None:
    """A busy connection is never handed out again: asyncpg's would fail in other requests."""
    tasks: list[Any] = []

    async def forgotten(session: Any) -> None:
        with contextlib.suppress(Exception):
            if way == "connection":
                await (await session.connection()).execute(text(SLOW[flavour.dialect]))
            else:
                async for _row in await session.stream(text(SLOW[flavour.dialect])):
                    await asyncio.sleep(0)

    class Handler(flavour.Handler):
        read_only_methods = frozenset({"GET", "POST"} if reads else ())

        async def get(self) -> None:
            await self.session.execute(select(1))
            tasks.append(asyncio.create_task(forgotten(self.session)))
            await asyncio.sleep(0.05)

        async def post(self) -> None:
            self.write(str(await self.session.scalar(select(1))))

    fetch = serve(Handler)
    if flavour.name == "asyncpg" and way == "connection":
        expected_log.append("Closing the session of GET / failed: InterfaceError")
    elif way == "stream":
        expected_log.append("GET / ended while its session was in use by task")
    assert (await fetch()).code == 200
    for _ in range(3):
        assert (await fetch(method="POST")).code == 200
    await asyncio.gather(*tasks)
    await until(lambda: flavour.checked_out() == 0)


@only("aiosqlite", "asyncpg", "psycopg_async")
@pytest.mark.gen_test
async def test_finish_inside_a_transaction_of_the_sessions_own(
    flavour: Flavour, serve: Any, expected_log: list[str]
) -> None:
    """The COMMIT comes too late for the response, which is logged; but it comes."""
    expected_log.append("leaves work uncommitted: 1 new Note")

    class Handler(flavour.Handler):
        async def post(self) -> None:
            async with self.session.begin():
                self.session.add(Note(text="late"))
                self.finish("early")

    assert (await serve(Handler)(method="POST")).body == b"early"
    await until(lambda: flavour.checked_out() == 0)
