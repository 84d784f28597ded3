"""The fair pool: first come, first served; nothing lost, nothing handed out twice."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import selectors
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from statistics import quantiles
from types import FrameType
from typing import Any, ClassVar

import pytest
import sqlalchemy
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import exc, select, text
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, QueuePool
from sqlalchemy.util import await_only, greenlet_spawn

from tests.support import ASYNC, POSTGRESQL, SYNC, Flavour, only, settle, until
from tornado_sa import AsyncDatabase, ConfigurationError, Database
from tornado_sa.engine import async_engine, sync_engine
from tornado_sa.pool import AsyncFairPool, FairPool

# Many short runs. No deadline: a machine under load is slow now and then. A failure is reported as
# it was found: to shrink it takes minutes, which is for whoever looks into it (Phase.shrink).
MACHINE = settings(
    max_examples=120,
    stateful_step_count=40,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)

POOL_FILES = tuple(f"tornado_sa/{name}.py" for name in ("fair_pool", "pool", "turns"))


class Server:
    """What the fake connections below are connected to. Counts them; may fail, may be slow."""

    def __init__(self) -> None:
        self.open: set[Connection] = set()
        self.connecting = 0
        self.down = False
        self.slow = False
        self.gates: dict[Any, asyncio.Future[bool]] = {}  # by the task that waits there

    @property
    def count(self) -> int:
        return len(self.open) + self.connecting

    def answer(self) -> None:
        """Wait for the test to say what happens, where one can wait; fail when down."""
        try:
            task = asyncio.current_task()
        except RuntimeError:
            task = None
        if self.slow and task is not None:
            self.gates[task] = asyncio.get_running_loop().create_future()
            try:
                fails = await_only(self.gates[task])
            finally:
                del self.gates[task]
        else:
            fails = self.down
        if fails:  # raised here: an exception in the future would keep this frame, and itself
            raise OSError("the server is down")

    def connect(self) -> Any:
        self.connecting += 1
        try:
            self.answer()
        finally:
            self.connecting -= 1
        connection = Connection(self)
        self.open.add(connection)
        return connection


class Connection:
    """A DBAPI connection, and its own cursor."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.busy = False  # in the middle of a conversation

    def cursor(self) -> Connection:
        return self

    def execute(self, statement: str) -> None:
        self.busy = True
        self.server.answer()
        self.busy = False

    def rollback(self) -> None:
        pass

    def close(self) -> None:
        pass


class Dialect(DefaultDialect):
    """Closes the fake connections; as slowly as the server is."""

    def do_terminate(self, dbapi_connection: Any) -> None:
        """Close what was invalidated.

        Never slowly before 2.1: there a cancellation in the middle makes SQLAlchemy forget the
        record, for no pool to see (``_ConnectionRecord._checkin_failed``).
        """
        if sqlalchemy.__version__ < "2.1":
            dbapi_connection.server.open.discard(dbapi_connection)
        else:
            self.do_close(dbapi_connection)

    def do_close(self, dbapi_connection: Any) -> None:
        server = dbapi_connection.server
        if dbapi_connection not in server.open:  # detached: none of the pool's business
            return
        try:
            server.answer()
        finally:
            server.open.discard(dbapi_connection)


class JumpingSelector(selectors.DefaultSelector):
    """Lets the loop's clock jump to the next timer instead of waiting for it."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0 if timeout is not None else 5)
        if not ready and timeout:
            self.now += timeout
        return ready


def jumping_loop() -> asyncio.SelectorEventLoop:
    selector = JumpingSelector()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now  # type: ignore[method-assign]  # no real clock in here
    return loop


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """SQLAlchemy logs an error for what it cannot roll back or close: here that is done to it."""
    import logging

    caplog.set_level(logging.CRITICAL, "sqlalchemy.pool")


# The fake server: everything that can happen, in any order.


class Request:
    """One task that asks for a connection."""

    def __init__(self, machine: AsyncMachine) -> None:
        self.machine = machine
        self.task = machine.loop.create_task(greenlet_spawn(machine.pool.connect))
        self.ended_by: set[type[BaseException]] = {OSError}

    @property
    def waits(self) -> bool:
        return not self.task.done() and self.task not in self.machine.server.gates


class AsyncMachine(RuleBasedStateMachine):
    """Tasks that ask, wait, give up, hold, give back, in any order, on a loop whose clock jumps."""

    made: ClassVar[Counter[str]] = Counter()

    @initialize(
        size=st.integers(1, 3),
        overflow=st.integers(0, 2),
        lifo=st.booleans(),
        ping_after=st.sampled_from([None, 0.0]),
    )
    def begin(self, size: int, overflow: int, lifo: bool, ping_after: float | None) -> None:
        self.loop = jumping_loop()
        self.server = Server()
        self.pool = AsyncFairPool(
            self.server.connect,
            pool_size=size,
            max_overflow=overflow,
            timeout=30.0,
            use_lifo=lifo,
            ping_after=ping_after,
            dialect=Dialect(),
        )
        self.keep, self.limit = size, size + overflow
        self.requests: list[Request] = []  # that have no connection yet, in order of arrival
        self.closings: list[asyncio.Task[None]] = []
        self.held: list[Any] = []

    def run(self, step: Callable[[], object] = lambda: None) -> None:
        """Do ``step`` in the loop, let everything that can go on go on, and look at it."""
        known = list(self.requests)
        before = [request for request in known if request.waits]

        async def go_on() -> None:
            step()
            for _ in range(25):
                await asyncio.sleep(0)

        self.loop.run_until_complete(go_on())
        before += [request for request in self.requests if request not in known]
        waiting = [request for request in self.requests if request.waits]
        for request in [request for request in self.requests if request.task.done()]:
            self.requests.remove(request)
            error: type[BaseException] | None = None
            if request.task.cancelled():  # asked, not caught: a traceback would keep connections
                error = asyncio.CancelledError
            elif (exception := request.task.exception()) is not None:
                error = type(exception)
            else:
                self.held.append(request.task.result())
            self.made[error.__name__ if error else "connected"] += 1
            assert error is None or error in request.ended_by, error
        for closing in [closing for closing in self.closings if closing.done()]:
            self.closings.remove(closing)
            if not closing.cancelled():
                closing.result()
        if waiting:  # all that were served came before the first who still waits
            gave_up = asyncio.CancelledError, exc.TimeoutError
            served = [r for r in before if not r.waits and not r.ended_by.intersection(gave_up)]
            assert all(before.index(r) < before.index(waiting[0]) for r in served)

    @rule(count=st.integers(1, 3))
    def ask(self, count: int) -> None:
        self.run(lambda: self.requests.extend(Request(self) for _ in range(count)))

    @rule(slow=st.booleans(), down=st.booleans())
    def change_server(self, slow: bool, down: bool) -> None:
        self.server.slow, self.server.down = slow, down

    @precondition(lambda self: self.server.gates)
    @rule(data=st.data(), fails=st.booleans())
    def server_answers(self, data: st.DataObject, fails: bool) -> None:
        gate = data.draw(st.sampled_from(list(self.server.gates.values())))
        self.run(lambda: gate.set_result(fails))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.requests))
        request.ended_by.add(asyncio.CancelledError)
        self.run(request.task.cancel)

    @precondition(lambda self: self.closings)
    @rule()
    def cancel_closing(self) -> None:
        self.run(self.closings[0].cancel)

    @precondition(lambda self: self.held)
    @rule(
        data=st.data(),
        how=st.sampled_from(["close", "close", "invalidate", "soft", "detach", "drop", "thread"]),
    )
    def give_back(self, data: st.DataObject, how: str) -> None:
        fairy = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.made[how] += 1

        def close() -> None:
            if how == "soft":
                fairy.invalidate(soft=True)
            elif how == "detach":
                self.server.open.discard(fairy.dbapi_connection)
                fairy.detach()
            fairy.invalidate() if how == "invalidate" else fairy.close()

        if how == "drop":
            dropped = weakref.ref(fairy)
            del fairy, close
            if dropped() is not None:  # in a cycle with the traceback of what was done to its task
                gc.collect()
        elif how == "thread":
            thread = threading.Thread(target=fairy.close)
            thread.start()
            thread.join()
        else:
            self.closings.append(self.loop.create_task(greenlet_spawn(close)))
        self.run()

    @precondition(lambda self: self.held and any(r.waits for r in self.requests))
    @rule(cancel_first=st.booleans())
    def give_back_and_cancel_at_once(self, cancel_first: bool) -> None:
        """The first in line is cancelled just before, or after, it was given a connection."""
        first = next(request for request in self.requests if request.waits)
        first.ended_by.add(asyncio.CancelledError)
        fairy = self.held.pop()

        def both() -> None:
            if cancel_first:
                first.task.cancel()
            fairy.close()
            first.task.cancel()

        self.run(both)

    @rule(seconds=st.sampled_from([10.0, 31.0]), at_once=st.booleans())
    def time_passes(self, seconds: float, at_once: bool) -> None:
        for request in self.requests:
            request.ended_by.add(exc.TimeoutError)
        if at_once and self.held:  # and a connection comes back in the moment the time is up
            fairy = self.held.pop()
            self.loop.call_later(seconds, fairy.close)
        self.loop.run_until_complete(asyncio.sleep(seconds))
        self.run()
        for request in self.requests:
            if seconds < 30:
                request.ended_by.discard(exc.TimeoutError)
            else:
                assert not request.waits

    @precondition(lambda self: self.keep and len(self.requests) > 2)
    @rule()
    def dispose(self) -> None:
        self.made["dispose"] += 1
        self.keep = 0
        self.closings.append(self.loop.create_task(greenlet_spawn(self.pool.dispose)))
        self.run()

    @invariant()
    def everything_is_somewhere(self) -> None:
        connections = [fairy.dbapi_connection for fairy in self.held]
        assert len(set(connections)) == len(connections), "handed out twice"
        assert not any(connection.busy for connection in connections), "handed out unclean"
        assert self.server.count <= self.limit, "more connections than allowed"
        waiting = sum(request.waits for request in self.requests)
        assert self.pool.waiting() == waiting
        busy = len(self.held) + len(self.server.gates)
        assert self.pool.checkedout() == busy, "lost, or counted twice"
        if waiting:
            assert (self.pool.checkedin(), busy) == (0, self.limit), "waits for nothing"
        if not self.closings and not any(task.done() for task in self.closings):
            assert self.pool.checkedin() <= self.limit

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            try:
                self.come_to_rest()
            finally:
                self.loop.close()

    def come_to_rest(self) -> None:
        """Let everything end: nothing is lost, and every place can be used again."""
        self.server.slow = self.server.down = False
        for _ in range(1000):
            for gate in list(self.server.gates.values()):
                gate.set_result(False)
            for fairy in self.held:
                self.closings.append(self.loop.create_task(greenlet_spawn(fairy.close)))
            self.held.clear()
            self.run()
            if not (self.requests or self.held or self.closings):
                break
        assert not self.requests
        assert (self.pool.checkedout(), self.pool.waiting()) == (0, 0)
        assert self.server.count <= self.pool.checkedin() <= max(self.keep, 0)
        for _ in range(self.limit):
            self.ask(1)
        assert len(self.held) == self.limit
        self.everything_is_somewhere()
        for fairy in self.held:
            fairy.close()
        self.pool.dispose()
        assert self.server.count == 0


def test_tasks_in_any_order(quiet: None) -> None:
    AsyncMachine.made.clear()
    run_state_machine_as_test(AsyncMachine, settings=MACHINE)
    happened = {"connected", "CancelledError", "TimeoutError", "OSError", "thread", "dispose"}
    assert happened <= AsyncMachine.made.keys()


class ThreadMachine(RuleBasedStateMachine):
    """Threads that ask, wait, give up, hold and give back; what must happen is known each time."""

    @initialize(size=st.integers(1, 2), overflow=st.integers(0, 1), lifo=st.booleans())
    def begin(self, size: int, overflow: int, lifo: bool) -> None:
        self.server = Server()
        self.pool = FairPool(
            self.server.connect,
            pool_size=size,
            max_overflow=overflow,
            use_lifo=lifo,
            ping_after=0,
            dialect=Dialect(),
        )
        self.limit = size + overflow
        self.line: list[int] = []  # who must be waiting
        self.holders: set[int] = set()  # who must hold a connection
        self.failed: set[int] = set()  # who must have failed
        self.held: dict[int, Any] = {}
        self.errors: dict[int, BaseException] = {}
        self.threads: dict[int, threading.Thread] = {}

    def connect(self, number: int) -> None:
        try:
            self.held[number] = self.pool.connect()
        except BaseException as error:
            self.errors[number] = error

    def one_is_free(self, can_connect: bool = True) -> None:
        """What must happen when a place is free: the first in line gets it."""
        while self.line:
            first = self.line.pop(0)
            if can_connect:
                self.holders.add(first)
                return
            self.failed.add(first)

    @rule()
    def ask(self) -> None:
        number = len(self.threads)
        if len(self.holders) == self.limit:
            self.line.append(number)
        elif self.server.down:
            self.failed.add(number)
        else:
            self.holders.add(number)
        thread = self.threads[number] = threading.Thread(target=self.connect, args=[number])
        thread.start()
        self.wait_until_so()

    @precondition(lambda self: len(self.holders) == self.limit)
    @rule()
    def ask_with_little_time(self) -> None:
        number = len(self.threads)
        self.failed.add(number)
        self.pool._timeout, usual = 0.002, self.pool._timeout
        thread = self.threads[number] = threading.Thread(target=self.connect, args=[number])
        thread.start()
        thread.join()
        self.pool._timeout = usual
        assert "none came back within 0.002 s" in str(self.errors[number])

    @precondition(lambda self: len(self.holders) == self.limit)
    @rule()
    def ask_on_the_loop(self) -> None:
        async def ask() -> None:
            with pytest.raises(exc.TimeoutError, match="on the event loop's thread"):
                self.pool.connect()

        asyncio.run(ask())

    @rule(down=st.booleans())
    def change_server(self, down: bool) -> None:
        self.server.down = down

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), how=st.sampled_from(["close", "close", "invalidate", "drop"]))
    def give_back(self, data: st.DataObject, how: str) -> None:
        number = data.draw(st.sampled_from(sorted(self.holders)))
        self.holders.remove(number)
        fairy = self.held.pop(number)
        self.one_is_free(can_connect=how != "invalidate" or not self.server.down)
        if how == "invalidate":
            fairy.invalidate()
        elif how == "close":
            fairy.close()
        dropped = weakref.ref(fairy)
        del fairy
        if how == "drop" and dropped() is not None:
            gc.collect()
        self.wait_until_so()

    @precondition(lambda self: len(self.line) > 2)
    @rule()
    def dispose(self) -> None:
        self.pool.dispose()

    def wait_until_so(self) -> None:
        for _ in range(10000):
            figures = self.pool.waiting(), self.pool.checkedout()
            found = set(self.held), set(self.errors), figures
            if found == (self.holders, self.failed, (len(self.line), len(self.holders))):
                break
            time.sleep(0.0005)
        else:
            pytest.fail(f"{found} instead of {self.holders}, {self.failed}, line {self.line}")
        connections = [fairy.dbapi_connection for fairy in self.held.values()]
        assert len(set(connections)) == len(connections), "handed out twice"
        assert self.server.count <= self.limit, "more connections than allowed"

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.server.down = False
        while self.holders:
            number = self.holders.pop()
            self.one_is_free()
            self.held.pop(number).close()
            self.wait_until_so()
        assert not self.line
        for thread in self.threads.values():
            thread.join()
        fairies = [self.pool.connect() for _ in range(self.limit)]
        for fairy in fairies:
            fairy.close()
        self.pool.dispose()
        assert self.server.count == 0


def test_threads_in_any_order(quiet: None) -> None:
    run_state_machine_as_test(ThreadMachine, settings=MACHINE)


@pytest.mark.parametrize("kind", [FairPool, AsyncFairPool])
def test_garbage_collector_returns_a_connection_in_the_middle(kind: Any) -> None:
    """Whatever line of the pool is at work when that happens: the request gets it."""

    def returns_at(line: int) -> bool:
        """Ask while another's connection comes back at ``line``; False if that is never run."""
        pool = kind(Server().connect, pool_size=1, max_overflow=0, timeout=0.0)
        others = [pool.connect()]
        count = 0

        def trace(frame: FrameType, event: str, _argument: object) -> Any:
            nonlocal count
            if not frame.f_code.co_filename.endswith(POOL_FILES):
                return None
            if event == "line" and others:
                count += 1
                if count == line:
                    sys.settrace(None)
                    others.pop().close()
                    sys.settrace(trace)
            return trace

        async def ask() -> Any:
            return await greenlet_spawn(pool.connect)

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            mine = asyncio.run(ask()) if kind is AsyncFairPool else pool.connect()
        except exc.TimeoutError:
            mine = None
        finally:
            sys.settrace(before)
        returned = not others
        if mine is not None:
            mine.close()
        while others:
            others.pop().close()
        assert (pool.checkedout(), pool.waiting(), pool.checkedin()) == (0, 0, 1)
        got.append(mine is not None)
        return returned

    got: list[bool] = []
    line = 1
    while returns_at(line):
        line += 1
    assert line > 15
    # It came back before the request had given up, up to some line; and from there on after.
    assert got == sorted(got, reverse=True)
    assert got.count(True) > 12


def test_waiter_of_a_closed_loop_is_passed_over() -> None:
    pool = AsyncFairPool(Server().connect, pool_size=1, max_overflow=0)
    loops = asyncio.new_event_loop(), asyncio.new_event_loop()
    fairy = loops[0].run_until_complete(greenlet_spawn(pool.connect))
    lost: Any = loops[0].create_task(greenlet_spawn(pool.connect))
    loops[0].run_until_complete(asyncio.sleep(0))
    assert pool.waiting() == 1
    loops[0].close()
    fairy.close()
    assert (pool.waiting(), pool.checkedout(), pool.checkedin()) == (0, 0, 1)
    mine = loops[1].run_until_complete(greenlet_spawn(pool.connect))
    assert (pool.checkedout(), pool.checkedin()) == (1, 0)
    loops[1].run_until_complete(greenlet_spawn(mine.close))
    loops[1].close()
    assert (pool.checkedout(), pool.checkedin()) == (0, 1)
    lost._log_destroy_pending = False  # that it never ends is the point here


def test_each_waits_as_long_as_the_timeout_says() -> None:
    """One alarm is set for all; it is set anew for the next in line."""
    loop = jumping_loop()
    pool = AsyncFairPool(Server().connect, pool_size=1, max_overflow=0, timeout=1.0)
    given_up: list[tuple[float, float]] = []  # when it came, how long it waited

    async def client(comes: float) -> Any:
        await asyncio.sleep(comes)
        start = loop.time()
        try:
            return await greenlet_spawn(pool.connect)
        except exc.TimeoutError:
            given_up.append((comes, loop.time() - start))

    async def main() -> None:
        first = await greenlet_spawn(pool.connect)
        clients = [asyncio.create_task(client(comes)) for comes in (0.0, 0.1, 0.4, 0.8, 2.5)]
        await asyncio.sleep(1.2)
        first.close()
        second = await clients[2]
        assert await asyncio.gather(*clients[:2], *clients[3:]) == [None] * 4
        await greenlet_spawn(second.close)

    loop.run_until_complete(main())
    loop.close()
    assert [comes for comes, _ in given_up] == [0.0, 0.1, 0.8, 2.5]
    assert [waited for _, waited in given_up] == pytest.approx([1.0] * 4, abs=1e-3)
    assert (pool.checkedout(), pool.waiting()) == (0, 0)
    pool.dispose()


def test_pool_is_gone_without_the_garbage_collector() -> None:
    async def main() -> weakref.ref[AsyncFairPool]:
        pool = AsyncFairPool(Server().connect, pool_size=1, max_overflow=0, timeout=0.01)
        fairy = await greenlet_spawn(pool.connect)
        with pytest.raises(exc.TimeoutError):
            await greenlet_spawn(pool.connect)
        waiter = asyncio.create_task(greenlet_spawn(pool.connect))
        await asyncio.sleep(0)
        fairy.close()
        (await waiter).close()
        pool.dispose()
        return weakref.ref(pool)

    assert asyncio.run(main())() is None


def latencies(kind: Any) -> list[float]:
    """Seconds of a clock that jumps, from asking to giving back: 64 clients, 20 connections."""
    loop = jumping_loop()
    pool = kind(Server().connect, pool_size=20, max_overflow=0)
    work = random.Random(1)
    spent = []

    async def client() -> None:
        for _ in range(60):
            start = loop.time()
            fairy = await greenlet_spawn(pool.connect)
            await asyncio.sleep(work.uniform(0.005, 0.015))
            fairy.close()
            spent.append(loop.time() - start)
            if work.random() < 0.5:  # else the next request comes before a waiter has woken up
                await asyncio.sleep(0)

    async def clients() -> None:
        await asyncio.gather(*(client() for _ in range(64)))

    loop.run_until_complete(clients())
    loop.close()
    return spent


def test_nobody_starves_under_load() -> None:
    stock, ours = latencies(AsyncAdaptedQueuePool), latencies(AsyncFairPool)
    assert len(ours) == len(stock) == 64 * 60
    p99_stock, p99 = (quantiles(spent, n=100)[98] for spent in (stock, ours))
    assert max(ours) < 2 * quantiles(ours, n=2)[0]
    # A quarter of it with SQLAlchemy 2.1. With 2.0 on Python 3.11 a newcomer loses one turn of the
    # loop on its way, and cannot overtake under this load.
    assert p99 <= p99_stock * 1.01


def engine_of(flavour: Flavour, ping_after: float | None = 30.0, **options: Any) -> Any:
    """An engine of its own to the database of ``flavour``."""
    url = flavour.db.engine.url
    if flavour.is_async:
        return async_engine(url, options, ping_after)
    return sync_engine(url, options, ping_after)


def pool_of(engine: Any) -> Any:
    return engine.pool


async def ask(engine: Any, statement: str = "SELECT 1") -> Any:
    """One short use of a connection."""
    if hasattr(engine, "sync_engine"):
        async with engine.connect() as connection:
            return await connection.scalar(text(statement))
    with engine.connect() as connection:
        return connection.scalar(text(statement))


# The same on real databases.


def test_pools_of_databases(tmp_path: Path) -> None:
    file = tmp_path / "a.db"
    assert type(Database(f"sqlite:///{file}").engine.pool) is FairPool
    assert type(AsyncDatabase(f"sqlite+aiosqlite:///{file}").engine.pool) is AsyncFairPool
    assert type(Database("postgresql+psycopg://h/d").engine.pool) is FairPool
    assert type(AsyncDatabase("postgresql+psycopg://h/d").engine.pool) is AsyncFairPool


@only(*SYNC, *ASYNC)
@pytest.mark.gen_test
@pytest.mark.parametrize(
    "options",
    [
        {"pool_size": 0},
        {"poolclass": NullPool},
        {"poolclass": None},
        {"pool_pre_ping": True},
        {"pool_recycle": 1},
        {"pool_use_lifo": True},
        {"max_overflow": -1, "pool_size": 1},
        {"pool_timeout": None},
        {"ping_after": None},
    ],
    ids=str,
)
async def test_engine_options(flavour: Flavour, options: dict[str, Any]) -> None:
    engine = engine_of(flavour, **options)
    for _ in range(2):
        assert await asyncio.gather(*(ask(engine) for _ in range(4))) == [1] * 4
    if "poolclass" not in options:
        assert pool_of(engine).checkedout() == 0
        assert pool_of(engine).size() == options.get("pool_size", 5)
        again = pool_of(engine).recreate()
        for name in "_limit", "_keep", "_lifo", "_timeout", "_ping_after", "_recycle", "_pre_ping":
            assert getattr(again, name) == getattr(pool_of(engine), name)
    await settle(engine.dispose())


@pytest.mark.parametrize(
    ("ping_after", "options", "says"),
    [
        (-1, {}, "ping_after must be a number of seconds, 0 or more, or None"),
        (True, {}, "ping_after must be"),
        ("30", {}, "ping_after must be .* not '30'"),
        (float("nan"), {}, "ping_after must be"),
        (30, {"ping_after": -1}, "ping_after must be"),
        (30, {"pool_size": -1}, "pool_size must be a whole number, 0 or more"),
        (30, {"pool_size": 2.5}, "pool_size must be"),
        (30, {"max_overflow": -2}, "max_overflow must be a whole number, -1 or more"),
        (30, {"pool_timeout": -1}, "pool_timeout must be"),
        (30, {"poolclass": QueuePool, "ping_after": 3}, "ping_after"),
    ],
)
def test_wrong_settings(ping_after: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        sync_engine("sqlite:///a.db", options, ping_after)
    if "poolclass" not in options:
        with pytest.raises(ConfigurationError, match=says):
            async_engine("sqlite+aiosqlite:///a.db", options, ping_after)


@only(*ASYNC)
@pytest.mark.gen_test
async def test_timeout_says_how_things_stand(flavour: Flavour) -> None:
    engine = engine_of(flavour, pool_size=1, max_overflow=1, pool_timeout=0.05)
    async with engine.connect(), engine.connect():
        says = (
            r"limit of size 1 overflow 1 reached \(2 connections out, 1 requests waiting\):"
            r" none came back within 0\.05 s"
        )
        with pytest.raises(exc.TimeoutError, match=says) as caught:
            await ask(engine)
    assert caught.value.code == "3o7r"
    assert await ask(engine) == 1
    await engine.dispose()


@only(*SYNC)
@pytest.mark.gen_test
async def test_loop_never_waits_for_the_pool(flavour: Flavour) -> None:
    engine = engine_of(flavour, pool_size=1, max_overflow=0)
    with engine.connect():
        start = time.monotonic()
        with pytest.raises(exc.TimeoutError, match="AsyncDatabase, or do the work") as caught:
            await ask(engine)
        assert time.monotonic() - start < 3  # and not 30
        assert caught.value.code == "3o7r"
        assert pool_of(engine).waiting() == 0
    assert await ask(engine) == 1
    engine.dispose()


@only(*SYNC)
@pytest.mark.gen_test
async def test_threads_are_served_in_order(flavour: Flavour) -> None:
    engine = engine_of(flavour, pool_size=1, max_overflow=0)
    served: list[int] = []

    def use(number: int) -> None:
        with engine.connect() as connection:
            connection.execute(select(1))
            served.append(number)

    threads = [threading.Thread(target=use, args=[number]) for number in range(8)]
    with engine.connect():
        for count, thread in enumerate(threads):
            thread.start()
            await until(lambda count=count: pool_of(engine).waiting() == count + 1)
    for thread in threads:
        thread.join()
    assert served == list(range(8))
    engine.dispose()


@only(*SYNC)
def test_thread_waits_no_longer_than_the_timeout(flavour: Flavour) -> None:
    engine = engine_of(flavour, pool_size=1, max_overflow=0, pool_timeout=0.05)
    with engine.connect(), pytest.raises(exc.TimeoutError, match=r"within 0\.05 s"):
        engine.connect()
    engine.connect().close()
    engine.dispose()


@only(*ASYNC)
@pytest.mark.gen_test(timeout=30)
async def test_tasks_cancelled_at_random_points(flavour: Flavour, quiet: None) -> None:
    engine = engine_of(flavour, pool_size=3, max_overflow=0, ping_after=0.0)
    chance = random.Random(7)

    async def use() -> None:
        async with engine.connect() as connection:
            await connection.execute(select(1))
            await asyncio.sleep(chance.uniform(0, 0.003))

    for _ in range(3):
        tasks = [asyncio.create_task(use()) for _ in range(64)]
        for task in tasks:
            asyncio.get_running_loop().call_later(chance.uniform(0, 0.15), task.cancel)
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(end) for end in ended} <= {type(None), asyncio.CancelledError}
        await until(lambda: (pool_of(engine).checkedout(), pool_of(engine).waiting()) == (0, 0))
    async with engine.connect() as one, engine.connect() as two, engine.connect() as three:
        for connection in one, two, three:  # every place can be used
            assert await connection.scalar(select(1)) == 1
        assert pool_of(engine).checkedout() == 3
    await engine.dispose()


@only("asyncpg", "psycopg_async")
@pytest.mark.gen_test
async def test_server_kills_connections_while_others_wait(flavour: Flavour, quiet: None) -> None:
    engine = engine_of(flavour, pool_size=2, max_overflow=0)
    one, two = await engine.connect(), await engine.connect()
    for connection in one, two:
        pid = await connection.scalar(text("SELECT pg_backend_pid()"))
        with flavour.admin.connect() as admin:
            admin.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
    waiters = [asyncio.create_task(ask(engine)) for _ in range(6)]
    await until(lambda: pool_of(engine).waiting() == 6)
    with pytest.raises(exc.DBAPIError):  # one finds out by using it, the other in giving it back
        await one.execute(select(1))
    for connection in one, two:
        with suppress(exc.DBAPIError):
            await connection.close()
    assert await asyncio.gather(*waiters) == [1] * 6
    assert (pool_of(engine).checkedout(), pool_of(engine).waiting()) == (0, 0)
    await engine.dispose()


@pytest.mark.gen_test
async def test_dispose_while_some_hold_and_some_wait(flavour: Flavour) -> None:
    """The new pool is there at once; who waits at the old one gets what it waits for."""
    engine = engine_of(flavour, pool_size=1, max_overflow=0)
    old = pool_of(engine)
    held = await settle(engine.connect())
    if flavour.is_async:
        waiters = [asyncio.create_task(ask(engine)) for _ in range(2)]
    else:
        threads_got: list[Any] = []

        def use() -> None:
            with engine.connect() as connection:
                threads_got.append(connection.scalar(select(1)))

        threads = [threading.Thread(target=use) for _ in range(2)]
        for thread in threads:
            thread.start()
    await until(lambda: old.waiting() == 2)
    await settle(engine.dispose())
    assert pool_of(engine) is not old
    assert await ask(engine) == 1
    await settle(held.close())
    if flavour.is_async:
        assert await asyncio.gather(*waiters) == [1, 1]
    else:
        for thread in threads:
            thread.join()
        assert threads_got == [1, 1]
    assert (old.checkedout(), old.checkedin(), old.overflow()) == (0, 0, -1)
    await settle(engine.dispose())


FORK = """
    import asyncio, os, sys
    from sqlalchemy import text
    from tornado_sa.engine import async_engine, sync_engine

    url, is_async = sys.argv[1], sys.argv[2] == "async"
    engine = (async_engine if is_async else sync_engine)(url, {"pool_size": 1, "max_overflow": 0})
    sync = engine.sync_engine if is_async else engine
    pid = text("SELECT pg_backend_pid()")

    async def backend():
        if is_async:
            async with engine.connect() as connection:
                return await connection.scalar(pid)
        with engine.connect() as connection:
            return connection.scalar(pid)

    loop = asyncio.new_event_loop()
    first = loop.run_until_complete(backend())
    child = os.fork()
    if child == 0:
        kept = sync.pool
        sync.dispose(close=False)
        assert sync.pool.status().startswith("Pool size: 1  Connections in pool: 0")
        theirs = asyncio.new_event_loop().run_until_complete(backend())
        os._exit(0 if theirs != first else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert loop.run_until_complete(backend()) == first
    loop.run_until_complete(engine.dispose()) if is_async else engine.dispose()
    print("ok")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork there")
@only(*POSTGRESQL)
def test_child_after_fork_has_a_pool_of_its_own(flavour: Flavour) -> None:
    url = flavour.db.engine.url.render_as_string(hide_password=False)
    arguments = [url, "async" if flavour.is_async else "sync"]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORK), *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        cwd=Path(__file__).parents[1],
    )
    assert done.stdout == "ok\n", done.stderr


# Idle connections are checked before use.


@pytest.fixture
def pings() -> Iterator[Callable[[Any], list[Any]]]:
    """``pings(engine)``: a list that grows with each ping that the engine's driver is asked for."""

    def count(engine: Any) -> list[Any]:
        seen: list[Any] = []
        ping = engine.dialect.do_ping

        def counting(connection: Any) -> Any:
            seen.append(connection)
            return ping(connection)

        engine.dialect.do_ping = counting
        return seen

    yield count


@pytest.mark.gen_test
async def test_busy_pool_pays_nothing(flavour: Flavour, pings: Any) -> None:
    engine = engine_of(flavour)
    seen = pings(engine)
    for _ in range(100):
        await ask(engine)
    assert seen == []
    await settle(engine.dispose())


@only(*ASYNC)
@pytest.mark.gen_test
async def test_connection_handed_from_user_to_user_is_not_checked(
    flavour: Flavour, pings: Any
) -> None:
    engine = engine_of(flavour, ping_after=0.0, pool_size=1, max_overflow=0)
    seen = pings(engine)
    await asyncio.gather(*(ask(engine) for _ in range(50)))
    assert seen == []
    await ask(engine)
    assert len(seen) == 1
    await engine.dispose()


@pytest.mark.parametrize(("ping_after", "expected"), [(0.02, 1), (60, 0), (None, 0)])
@pytest.mark.gen_test
async def test_idle_connection_is_checked_once(
    flavour: Flavour, pings: Any, ping_after: float | None, expected: int
) -> None:
    engine = engine_of(flavour, ping_after=ping_after)
    seen = pings(engine)
    await ask(engine)
    await asyncio.sleep(0.05)
    await ask(engine)
    assert len(seen) == expected
    await settle(engine.dispose())


@only(*ASYNC)
@pytest.mark.gen_test
async def test_pre_ping_is_not_done_twice(flavour: Flavour, pings: Any) -> None:
    engine = engine_of(flavour, ping_after=0.0, pool_pre_ping=True)
    seen = pings(engine)
    for _ in range(3):
        await ask(engine)
    assert len(seen) == 2
    await engine.dispose()


def test_statements_of_a_unit_and_a_ping(tmp_path: Path) -> None:
    """What SQLite itself sees: not one statement more, and one after a pause."""
    engine = sync_engine(f"sqlite:///{tmp_path / 'a.db'}", {}, ping_after=0.02)
    seen: list[str] = []
    with engine.connect() as connection:
        raw: Any = connection.connection.driver_connection
        raw.set_trace_callback(seen.append)
    for _ in range(2):
        with engine.connect() as connection:
            connection.execute(text("SELECT 2"))
    busy = seen.copy()
    time.sleep(0.05)
    with engine.connect() as connection:
        connection.execute(text("SELECT 2"))
    assert [line for line in busy if line.startswith("SELECT")] == ["SELECT 2"] * 2
    assert [line for line in seen[len(busy) :] if line.startswith("SELECT")] == [
        "SELECT 1",
        "SELECT 2",
    ]
    engine.dispose()


def is_alive(flavour: Flavour, pid: int) -> Any:
    """True while the server knows the backend; a transaction of its own, to see it go."""
    with flavour.admin.connect() as admin:
        query = text("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid")
        return admin.scalar(query, {"pid": pid})


@only(*POSTGRESQL)
@pytest.mark.gen_test(timeout=20)
async def test_connection_that_died_while_idle_is_replaced(flavour: Flavour) -> None:
    """No error, and not a line in the log; without the check there is one."""
    for ping_after, works in (0.0, True), (None, False):
        engine = engine_of(flavour, ping_after=ping_after, pool_size=1, max_overflow=0)
        pid = await ask(engine, "SELECT pg_backend_pid()")
        with flavour.admin.connect() as admin:
            admin.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
        await until(lambda: not is_alive(flavour, pid))  # noqa: B023  (called before the next)
        if works:
            assert await ask(engine, "SELECT pg_backend_pid()") != pid
        else:
            with pytest.raises(exc.DBAPIError):
                await ask(engine)
        assert pool_of(engine).checkedout() == 0
        await settle(engine.dispose())
