"""db.to_thread(): blocking work of a scope in a worker thread. Rows 6 and 22."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, event, select, text
from sqlalchemy.pool import NullPool, QueuePool
from tornado import gen

from tests.support import (
    CANCELLED_LOG,
    Flavour,
    Note,
    RawClient,
    make_database,
    only,
    until,
    with_options,
)
from tornado_sa import (
    ConcurrentAccess,
    ConfigurationError,
    Database,
    NoActiveScope,
    ScopeClosed,
    workers,
)

both = only("sqlite", "psycopg")
postgresql = only("psycopg")


of_two_connections = with_options(
    engine_options={"pool_size": 2, "max_overflow": 0, "pool_timeout": 10}
)


class Gate:
    """Holds a worker until the test opens it."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()
        self.left = threading.Event()

    def pass_through(self) -> None:
        self.entered.set()
        assert self.opened.wait(20)
        self.left.set()


@pytest.fixture
def gate() -> Any:
    gate = Gate()
    yield gate
    gate.opened.set()


# -- the call -------------------------------------------------------------------


@both
@pytest.mark.gen_test
async def test_session_and_context_are_the_requests(flavour: Flavour, serve: Any) -> None:
    language = ContextVar("language", default="en")

    def work(name: str, *, size: int) -> tuple[Any, str, str]:
        flavour.db.session.add(Note(text=f"{name} {size}"))
        flavour.db.session.flush()
        return flavour.db.session(), language.get(), threading.current_thread().name

    class Handler(flavour.Handler):
        async def post(self) -> None:
            language.set("de")
            session, found, thread = await self.db.to_thread(work, "note", size=7)
            assert session is self.session
            assert found == "de"
            assert thread.startswith("tornado_sa worker")
            assert self.session.scalar(select(Note.text)) == "note 7"
            await self.db.to_thread(self.session.commit)

    assert (await serve(Handler)(method="POST")).code == 200
    assert flavour.texts() == ["note 7"]


@both
@pytest.mark.gen_test
async def test_calls_of_one_scope_run_in_order_one_at_a_time(flavour: Flavour, serve: Any) -> None:
    steps: list[int] = []

    def work(number: int) -> int:
        steps.append(number)
        flavour.db.session.scalar(select(1))
        time.sleep(0.002)
        steps.append(number)
        return number

    class Handler(flavour.Handler):
        async def get(self) -> None:
            calls = [self.db.to_thread(work, number) for number in range(10)]
            assert await asyncio.gather(*calls) == list(range(10))

    assert (await serve(Handler)()).code == 200
    assert steps == [number for number in range(10) for _ in range(2)]


@both
@of_two_connections
@pytest.mark.gen_test
async def test_scopes_run_side_by_side(flavour: Flavour, serve: Any) -> None:
    meet = threading.Barrier(2, timeout=20)

    class Handler(flavour.Handler):
        async def get(self) -> None:
            await self.db.to_thread(meet.wait)

    fetch = serve(Handler)
    assert [answer.code for answer in await gen.multi([fetch(), fetch()])] == [200, 200]


@both
@pytest.mark.gen_test
async def test_exception_comes_with_its_traceback(flavour: Flavour) -> None:
    def fail_here() -> None:
        raise StopIteration("also one that a coroutine may not raise")

    def fail_there() -> None:
        raise LookupError("no such thing")

    with flavour.db.scope():
        with pytest.raises(LookupError) as caught:
            await flavour.db.to_thread(fail_there)
        assert "fail_there" in "".join(traceback.format_tb(caught.value.__traceback__))
        with pytest.raises(RuntimeError, match="StopIteration"):
            await flavour.db.to_thread(fail_here)


@both
@pytest.mark.gen_test
async def test_no_scope_and_closed_scope(flavour: Flavour) -> None:
    called: list[int] = []
    coroutine = flavour.db.to_thread(called.append, 1)  # raises nothing: it is a coroutine
    with pytest.raises(NoActiveScope):
        await coroutine
    with flavour.db.scope() as _:
        from tornado_sa import current_scope

        current_scope().end()
        with pytest.raises(ScopeClosed):
            await flavour.db.to_thread(called.append, 2)
    assert called == []


@both
@pytest.mark.gen_test
async def test_coroutine_functions_are_refused(flavour: Flavour) -> None:
    async def fetch() -> None: ...

    @gen.coroutine
    def fetch_too() -> Any:
        yield gen.moment

    with flavour.db.scope():
        for function in (fetch, fetch_too, lambda: fetch()):
            with pytest.raises(ConfigurationError, match=r"Write `await .*, without db.to_thread"):
                await flavour.db.to_thread(function)


@both
@pytest.mark.gen_test
async def test_units_of_work_inside_a_worker(flavour: Flavour) -> None:
    """A nested scope is one of its own; in a loop of the worker, to_thread runs in place."""

    def outer() -> Any:
        with flavour.db.begin() as session:
            assert session is not mine
            session.add(Note(text="nested"))
        assert flavour.db.session() is mine
        return asyncio.run(flavour.db.to_thread(lambda: threading.current_thread().name))

    with flavour.db.scope() as mine:
        assert (await flavour.db.to_thread(outer)).startswith("tornado_sa worker")
    assert flavour.texts() == ["nested"]


@both
@pytest.mark.gen_test
async def test_no_reference_cycle(flavour: Flavour, serve: Any) -> None:
    watched: list[weakref.ref[Any]] = []

    class Failure(Exception):
        pass

    def fail() -> None:
        error = Failure()
        watched.extend([weakref.ref(flavour.db.session()), weakref.ref(error)])
        try:
            raise error
        finally:
            del error

    class Handler(flavour.Handler):
        async def get(self) -> None:
            with contextlib.suppress(Failure):
                await self.db.to_thread(fail)
            await self.db.to_thread(flavour.db.session)

    fetch = serve(Handler)
    await fetch()
    watched.clear()
    gc.collect()
    gc.disable()
    try:
        assert (await fetch()).code == 200
        await until(lambda: [ref() for ref in watched] == [None, None])
    finally:
        gc.enable()


# -- threads and connections ----------------------------------------------------


def test_as_many_threads_as_connections(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'x.db'}"
    cases: list[tuple[dict[str, Any], int]] = [
        ({}, 15),
        ({"pool_size": 3, "max_overflow": 2}, 5),
        ({"pool_size": 3, "max_overflow": -1}, 100),
        ({"poolclass": QueuePool, "pool_size": 3, "max_overflow": 1}, 4),
        ({"poolclass": NullPool}, 100),
    ]
    for options, size in cases:
        assert Database(url, engine_options=options)._worker_threads() == size
    assert Database(create_engine(url, pool_size=7))._worker_threads() == 17


@both
@of_two_connections
@pytest.mark.gen_test(timeout=30)
async def test_threads_that_wait_for_a_connection_do_not_stop_those_that_have_one(
    flavour: Flavour, serve: Any
) -> None:
    """Or all would wait for pool_timeout and fail: nobody could give a connection back."""

    class Handler(flavour.Handler):
        async def get(self) -> None:
            await self.db.to_thread(self.session.scalar, select(1))
            await asyncio.sleep(0.05)
            await self.db.to_thread(self.session.scalar, select(1))

    fetch = serve(Handler)
    answers = await gen.multi([fetch() for _ in range(8)])
    assert [answer.code for answer in answers] == [200] * 8


@pytest.mark.gen_test
async def test_memory_database_has_no_workers() -> None:
    """Its one connection would be used by the loop and a worker: rows would get lost."""
    db = Database("sqlite://")

    def work(number: int) -> Any:
        assert threading.current_thread() is threading.main_thread()
        db.session.execute(text("INSERT INTO n VALUES (:n)"), {"n": number})
        db.session.commit()
        return db.session.scalar(text("SELECT count(*) FROM n"))

    async def unit(number: int) -> Any:
        with db.scope():
            return await db.to_thread(work, number)

    with db.begin() as session:
        session.execute(text("CREATE TABLE n (n INTEGER)"))
    counts = await asyncio.gather(*(unit(number) for number in range(20)))
    assert counts == list(range(1, 21))
    db.dispose()


@both
@pytest.mark.gen_test
async def test_the_session_is_the_workers(flavour: Flavour, serve: Any, gate: Gate) -> None:
    """A sibling task of the request cannot get at it meanwhile; other requests are not bothered."""

    class Handler(flavour.Handler):
        async def get(self) -> None:
            if self.request.path == "/other":
                self.session.scalar(select(1))
                return
            assert self.session is flavour.db.session()
            call = asyncio.create_task(self.db.to_thread(gate.pass_through))
            await until(gate.entered.is_set)
            for get in (lambda: self.session, flavour.db.session):
                with pytest.raises(ConcurrentAccess) as caught:
                    get()
                for piece in ("'GET /one'", "pass_through", "MainThread", "with db.scope()"):
                    assert piece in str(caught.value)
            assert (await fetch("/other")).code == 200
            gate.opened.set()
            await call
            assert self.session.scalar(select(1)) == 1
            assert workers.lines == {}

    fetch = serve(Handler)
    assert (await fetch("/one")).code == 200


# -- cancellation ---------------------------------------------------------------


@postgresql
@pytest.mark.gen_test
async def test_wait_for_times_out_when_the_worker_has_let_go(flavour: Flavour, serve: Any) -> None:
    """Row 22."""
    events: list[str] = []

    def work() -> None:
        flavour.db.session.add(Note(text="lost"))
        flavour.db.session.flush()
        flavour.db.session.execute(text("SELECT pg_sleep(0.5)"))
        events.append("worker done")

    class Handler(flavour.Handler):
        async def get(self) -> None:
            try:
                await asyncio.wait_for(self.db.to_thread(work), 0.05)
            except TimeoutError:
                events.append("timeout")
            assert self.session.scalar(select(Note.text)) == "lost"  # not committed, not broken
            raise TimeoutError

        def post(self) -> None:
            self.write(str(self.session.scalars(select(Note.text)).all()))

        def log_exception(self, *args: Any) -> None: ...

    fetch = serve(Handler)
    assert (await fetch()).code == 500
    assert events == ["worker done", "timeout"]
    assert flavour.checked_out() == 0
    assert flavour.texts() == []
    assert (await fetch(method="POST")).body == b"[]"


@both
@pytest.mark.gen_test
async def test_cancelled_many_times_while_the_worker_runs(flavour: Flavour, gate: Gate) -> None:
    async def unit() -> None:
        with flavour.db.scope():
            await flavour.db.to_thread(gate.pass_through)

    task = asyncio.create_task(unit())
    await until(gate.entered.is_set)
    for number in range(1, 4):
        task.cancel()
        await asyncio.sleep(0.01)
        assert task.cancelling() == number
        assert not task.done()
    gate.opened.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelling() == 3
    assert gate.left.is_set()


@both
@pytest.mark.gen_test
async def test_timeout_and_task_group(flavour: Flavour, gate: Gate) -> None:
    """Whatever cancels knows that it was the one, and the task goes on."""
    task = asyncio.current_task()
    assert task is not None
    with flavour.db.scope() as session:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                asyncio.get_running_loop().call_later(0.1, gate.opened.set)
                await flavour.db.to_thread(gate.pass_through)
        assert gate.left.is_set()
        gate.opened.clear()
        gate.left.clear()
        with pytest.raises(ExceptionGroup) as caught:
            async with asyncio.TaskGroup() as group:
                group.create_task(flavour.db.to_thread(gate.pass_through))
                asyncio.get_running_loop().call_later(0.1, gate.opened.set)
                await asyncio.sleep(0.02)
                raise LookupError
        assert caught.group_contains(LookupError)
        assert gate.left.is_set()
        assert task.cancelling() == 0
        assert session.scalar(select(1)) == 1


def test_shutdown_of_the_runner_waits_for_the_worker(tmp_path: Path, gate: Gate) -> None:
    db = Database(f"sqlite:///{tmp_path / 'x.db'}")

    async def unit() -> None:
        with db.scope() as session:
            session.execute(select(1))
            await db.to_thread(gate.pass_through)

    async def main() -> None:
        kept.append(asyncio.create_task(unit()))
        await until(gate.entered.is_set)
        threading.Timer(0.05, gate.opened.set).start()

    kept: list[Any] = []
    asyncio.run(main())
    assert gate.left.is_set()
    assert kept[0].cancelled()
    assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    db.dispose()


def test_loop_that_is_gone_before_the_worker(tmp_path: Path, gate: Gate) -> None:
    """Nobody is told, nothing is logged, and the session is closed all the same."""
    db = Database(f"sqlite:///{tmp_path / 'x.db'}")

    async def unit() -> None:
        with db.scope() as session:
            session.execute(select(1))
            await db.to_thread(gate.pass_through)

    loop = asyncio.new_event_loop()
    coroutine = unit()

    async def start() -> None:
        coroutine.send(None)

    loop.run_until_complete(start())
    loop.close()
    gate.entered.wait(20)
    coroutine.close()
    assert db.engine.pool.checkedout() == 1  # type: ignore[attr-defined]
    gate.opened.set()
    db.dispose(timeout=20)
    assert db.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


@both
@pytest.mark.gen_test
async def test_failure_after_a_cancellation_is_logged(
    flavour: Flavour, serve: Any, gate: Gate, expected_log: list[str]
) -> None:
    def fail() -> None:
        gate.pass_through()
        raise LookupError("no such thing")

    class Handler(flavour.Handler):
        async def get(self) -> None:
            call = asyncio.create_task(self.db.to_thread(fail))
            await until(gate.entered.is_set)
            call.cancel()
            gate.opened.set()
            await asyncio.wait([call])
            assert call.cancelled()

    expected_log.append("GET /path: cancelled, then test_failure_after_a_cancellation_is_logged")
    assert (await serve(Handler)("/path")).code == 200


@both
@pytest.mark.gen_test
async def test_cancelled_while_it_waits_for_its_turn(flavour: Flavour, gate: Gate) -> None:
    made: list[str] = []
    with flavour.db.scope():
        first = asyncio.create_task(flavour.db.to_thread(gate.pass_through))
        second = asyncio.create_task(flavour.db.to_thread(made.append, "second"))
        third = asyncio.create_task(flavour.db.to_thread(made.append, "third"))
        await until(gate.entered.is_set)
        second.cancel()
        await asyncio.wait([second])  # at once: the first one is not through
        assert second.cancelled()
        gate.opened.set()
        await first
        await third
    assert made == ["third"]


@both
@of_two_connections
@pytest.mark.gen_test
async def test_cancelled_while_it_waits_for_a_thread(flavour: Flavour, gate: Gate) -> None:
    made: list[str] = []

    async def occupy() -> None:
        with flavour.db.scope():
            await flavour.db.to_thread(gate.pass_through)

    others = [asyncio.create_task(occupy()), asyncio.create_task(occupy())]
    await until(gate.entered.is_set)
    with flavour.db.scope() as session:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(flavour.db.to_thread(made.append, "first"), 0.02)
        assert flavour.db.session() is session  # no worker has it, or ever will
        session.scalar(select(1))
        # With a connection of its own, it need not wait for those that may wait for one.
        await flavour.db.to_thread(made.append, "second")
        session.rollback()
        ended = asyncio.create_task(flavour.db.to_thread(made.append, "third"))
        await asyncio.sleep(0)
    gate.opened.set()
    with pytest.raises(ScopeClosed):
        await ended
    await asyncio.gather(*others)
    assert made == ["second"]


# -- scopes that end while a worker runs ------------------------------------------


@pytest.mark.parametrize("how", ["finish", "another task", "disconnect"])
@both
@pytest.mark.gen_test
async def test_request_that_ends_while_its_worker_runs(
    flavour: Flavour, serve: Any, base_url: str, expected_log: list[str], gate: Gate, how: str
) -> None:
    """The worker gets no session any more, and closes the one it had when it lets go of it."""
    outcome: list[Any] = []
    calls: list[Any] = []
    checkins: list[str] = []

    def work(session: Any) -> None:
        session.add(Note(text="lost"))
        session.flush()
        gate.pass_through()
        outcome.append(session.scalar(select(Note.text)))  # the session as it was
        with pytest.raises(ScopeClosed):
            flavour.db.session()

    class Handler(flavour.Handler):
        cancel_on_disconnect = how == "disconnect"

        async def get(self) -> None:
            if self.request.path == "/next":
                self.write(str(self.session.scalars(select(Note.text)).all()))
                return
            call = asyncio.create_task(self.db.to_thread(work, self.session))
            waiting = asyncio.create_task(self.db.to_thread(outcome.append, "never"))
            calls.extend([call, waiting])
            await until(gate.entered.is_set)
            if how == "finish":
                self.finish()
                with pytest.raises(ScopeClosed):
                    _ = self.session
            elif how == "another task":
                asyncio.get_running_loop().call_soon(self.finish)
                await asyncio.sleep(0.01)
            else:
                await asyncio.Event().wait()

    event.listen(
        flavour.sync_engine, "checkin", lambda *_: checkins.append(threading.current_thread().name)
    )
    fetch = serve(Handler)
    if how == "disconnect":
        expected_log += CANCELLED_LOG
        async with RawClient(base_url) as client:
            await client.send("GET / HTTP/1.1\nHost: x")
            await until(gate.entered.is_set)
            client.vanish()
            await asyncio.sleep(0.05)
    else:
        assert (await fetch()).code == 200
        assert flavour.db.status().open_scopes == []
    assert flavour.checked_out() == 1
    assert outcome == checkins == []
    gate.opened.set()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert outcome == ["lost"]
    assert isinstance(results[1], ScopeClosed)
    await until(lambda: flavour.checked_out() == 0)
    assert [name.startswith("tornado_sa worker") for name in checkins] == [True]
    assert flavour.texts() == []
    assert (await fetch("/next")).body == b"[]"


@both
@pytest.mark.gen_test
async def test_block_that_is_left_while_its_worker_runs(flavour: Flavour, gate: Gate) -> None:
    with flavour.db.scope() as session:
        session.add(Note(text="lost"))
        session.flush()
        call = asyncio.create_task(flavour.db.to_thread(gate.pass_through))
        await until(gate.entered.is_set)
    assert flavour.checked_out() == 1
    gate.opened.set()
    await call
    assert flavour.checked_out() == 0  # closed before the task was told
    assert flavour.texts() == []


@both
@pytest.mark.gen_test
async def test_all_sessions_of_a_scope_are_the_workers(flavour: Flavour, gate: Gate) -> None:
    """Also those of other databases: the function may use them all."""
    url = flavour.db.engine.url.render_as_string(hide_password=False)
    other = make_database(flavour.name, url)

    def work() -> None:
        other.session.scalar(select(1))
        gate.pass_through()

    with flavour.db.scope():
        call = asyncio.create_task(flavour.db.to_thread(work))
        theirs = asyncio.create_task(other.to_thread(gate.left.is_set))
        await until(gate.entered.is_set)
        with pytest.raises(ConcurrentAccess):
            other.session()
        gate.opened.set()
        assert await theirs  # one after the other
        gate.entered.clear()
        gate.opened.clear()
        call = asyncio.create_task(flavour.db.to_thread(work))
        await until(gate.entered.is_set)
    assert other.engine.pool.checkedout() == 1
    gate.opened.set()
    await call
    assert other.engine.pool.checkedout() == 0
    other.dispose()


@both
@pytest.mark.gen_test
async def test_session_that_a_worker_fails_to_close(
    flavour: Flavour, gate: Gate, expected_log: list[str]
) -> None:
    @event.listens_for(flavour.sync_engine, "rollback")
    def fail(_connection: Any) -> None:
        raise OSError("the rollback failed")

    expected_log.append("Closing the session of job failed: OSError: the rollback failed")
    with flavour.db.scope("job") as session:
        session.scalar(select(1))
        call = asyncio.create_task(flavour.db.to_thread(gate.pass_through))
        await until(gate.entered.is_set)
    gate.opened.set()
    await call


# -- a busy connection is never handed out ------------------------------------------


class Watch:
    """Notes which connections a statement runs on, and every misuse of such a connection."""

    def __init__(self, engine: Any) -> None:
        self.running: dict[int, str] = {}
        self.misused: list[str] = []
        self.most = 0
        event.listen(engine, "before_cursor_execute", self.before)
        event.listen(engine, "after_cursor_execute", self.after)
        event.listen(engine, "handle_error", lambda c: self.running.clear())
        event.listen(engine, "checkout", lambda raw, *_: self.unused(raw, "checkout"))
        event.listen(engine, "checkin", lambda raw, *_: self.unused(raw, "checkin"))
        event.listen(engine, "reset", lambda raw, *_: self.unused(raw, "reset"))
        for name in ("commit", "rollback"):
            event.listen(engine, name, self.ends(name))

    def before(self, connection: Any, *_: Any) -> None:
        self.unused(connection.connection.dbapi_connection, "statement")
        thread = threading.current_thread().name
        self.running[id(connection.connection.dbapi_connection)] = thread
        self.most = max(self.most, len(self.running))

    def after(self, connection: Any, *_: Any) -> None:
        del self.running[id(connection.connection.dbapi_connection)]

    def ends(self, name: str) -> Callable[[Any], None]:
        return lambda connection: self.unused(connection.connection.dbapi_connection, name)

    def unused(self, raw: Any, what: str) -> None:
        if id(raw) in self.running:
            self.misused.append(f"{what} in {threading.current_thread().name}, while used in")
            self.misused.append(self.running[id(raw)])


@postgresql
@of_two_connections
@pytest.mark.gen_test(timeout=60)
async def test_busy_connection_is_never_handed_out(
    flavour: Flavour,
    serve: Any,
    base_url: str,
    expected_log: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """200 requests over two connections; a third is cancelled, finished early or abandoned."""
    watch = Watch(flavour.sync_engine)
    chance = random.Random(22)
    ended: dict[str, int] = {}
    forgotten: list[Any] = []

    def work(seconds: float) -> Any:
        return flavour.db.session.scalar(text(f"SELECT 1 FROM pg_sleep({seconds})"))

    class Handler(flavour.Handler):
        cancel_on_disconnect = True

        async def get(self) -> None:
            how = self.get_argument("how")
            seconds = chance.uniform(0.01, 0.05)
            ended[how] = ended.get(how, 0) + 1
            if how == "timeout":
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.db.to_thread(work, seconds), seconds * 0.7)
            elif how == "early":
                forgotten.append(asyncio.create_task(self.db.to_thread(work, seconds)))
                await asyncio.sleep(chance.uniform(0, 0.03))
                return
            assert await self.db.to_thread(work, seconds) == 1
            self.write("1")

    def clean(answer: Any) -> bool:
        return bool(answer.code == 200 and answer.body in (b"1", b""))

    async def client(fetch: Any) -> bool:
        how = chance.choice(["wait", "wait", "timeout", "early", "vanish"])
        if how != "vanish":
            return clean(await fetch(f"/?how={how}"))
        async with RawClient(base_url) as raw:
            await raw.send("GET /?how=vanish HTTP/1.1\nHost: x")
            await asyncio.sleep(chance.uniform(0, 0.05))
        return True

    async def clients(fetch: Any) -> list[bool]:
        return [await client(fetch) for _ in range(20)]

    fetch = serve(Handler)
    outcome = await asyncio.gather(*(clients(fetch) for _ in range(10)))
    assert all(all(clean) for clean in outcome)
    for error in await asyncio.gather(*forgotten, return_exceptions=True):
        assert error == 1 or isinstance(error, ScopeClosed), error
    await until(lambda: flavour.checked_out() == 0)
    logged = [record.getMessage() for record in caplog.records]
    expected_log += [line for line in logged if any(piece in line for piece in CANCELLED_LOG)]
    assert watch.misused == []
    assert watch.most == 2  # or nothing ran side by side, and the test would prove nothing
    assert set(ended) == {"wait", "timeout", "early", "vanish"}
    assert workers.lines == {}


# -- dispose and fork -----------------------------------------------------------


@both
@pytest.mark.gen_test
async def test_dispose_waits_for_workers(
    flavour: Flavour, gate: Gate, expected_log: list[str]
) -> None:
    async def unit() -> Any:
        with flavour.db.scope("job") as session:
            session.scalar(select(1))
            return await flavour.db.to_thread(work)

    def work() -> str:
        gate.pass_through()
        return "done"

    task = asyncio.create_task(unit())
    await until(gate.entered.is_set)
    threading.Timer(0.05, gate.opened.set).start()
    expected_log.append("disposed of while still in use by: job (")  # it waits for this loop
    flavour.db.dispose(timeout=20)
    assert gate.left.is_set()
    assert await task == "done"
    assert await unit() == "done"  # with a fresh pool and fresh threads


@both
@pytest.mark.gen_test
async def test_dispose_waits_no_longer_than_it_may(
    flavour: Flavour, gate: Gate, expected_log: list[str]
) -> None:
    async def unit() -> None:
        with flavour.db.scope("job") as session:
            session.scalar(select(1))
            await flavour.db.to_thread(gate.pass_through)

    task = asyncio.create_task(unit())
    await until(gate.entered.is_set)
    expected_log.append("disposed of while still at work: Gate.pass_through of job (")
    expected_log.append("disposed of while still in use by: job (")
    flavour.db.dispose(timeout=0.05)
    assert not gate.left.is_set()
    gate.opened.set()
    await task
    await unit()


@pytest.mark.skipif(sys.platform == "win32", reason="no fork there")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@postgresql
@pytest.mark.gen_test
async def test_fork_while_a_worker_runs(flavour: Flavour, gate: Gate) -> None:
    """The child has no worker, and starts its own; the parent's goes on with its connection."""

    def backend() -> Any:
        return flavour.db.session.scalar(text("SELECT pg_backend_pid()"))

    async def unit() -> Any:
        with flavour.db.scope():
            return await flavour.db.to_thread(backend)

    def work() -> Any:
        pid = backend()
        flavour.db.session.add(Note(text="whole"))
        flavour.db.session.flush()
        gate.pass_through()
        flavour.db.session.commit()
        return pid

    await asyncio.gather(unit(), unit())  # an idle thread, which the child must not count on
    with flavour.db.scope():
        call = asyncio.create_task(flavour.db.to_thread(work))
        await until(gate.entered.is_set)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                asyncio.events._set_running_loop(None)
                flavour.db.session()  # no ConcurrentAccess: the worker is not in this process
                os.write(write, str(asyncio.run(asyncio.wait_for(unit(), 10))).encode())
            finally:
                os._exit(0)
        await asyncio.to_thread(os.waitpid, child, 0)
        os.close(write)
        theirs = int(os.read(read, 100))
        os.close(read)
        gate.opened.set()
        mine = await call
    assert theirs != mine
    assert flavour.texts() == ["whole"]
