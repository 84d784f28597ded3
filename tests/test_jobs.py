"""Work that no request asked for: periodic callbacks, spawned ones, cron threads, scripts."""

from __future__ import annotations

import asyncio
import threading
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import pytest
from tornado.ioloop import IOLoop, PeriodicCallback

from tests.support import SYNC, Flavour, Note, only, settle, until, with_options
from tornado_sa import ConfigurationError, NoActiveScope, ScopeClosed, current_scope, scope


def make_job(flavour: Flavour, work: Any, **label: Any) -> Any:
    """A function of the kind that fits the database, each call of which is a unit of work."""
    if flavour.is_async:

        async def job() -> None:
            await settle(work(flavour.db.session))
    else:

        def job() -> None:
            work(flavour.db.session)

    return flavour.db.begin(**label)(job)


@pytest.mark.gen_test
async def test_periodic_callback(flavour: Flavour, expected_log: list[str]) -> None:
    """Each call commits or rolls back by itself; one that fails does not stop the others."""
    labels: list[str] = []
    sessions: list[Any] = []

    def work(session: Any) -> None:
        labels.append(current_scope().label)
        sessions.append(session())
        session.add(Note(text=f"call {len(labels)}"))
        if len(labels) == 2:
            raise ValueError("the second call fails")

    job = make_job(flavour, work)
    periodic = PeriodicCallback(job, 5)
    periodic.start()
    await until(lambda: len(labels) >= 3)
    periodic.stop()
    expected_log.append("Exception in callback")
    await until(lambda: not flavour.db.status().open_scopes)
    await until(lambda: len(flavour.texts()) >= 2)
    assert flavour.texts()[:2] == ["call 1", "call 3"]
    assert labels[0] == "tests.test_jobs.make_job.<locals>.job"
    assert len(set(map(id, sessions[:3]))) == 3


@pytest.mark.gen_test
async def test_spawned_in_a_request(flavour: Flavour, serve: Any) -> None:
    """It outlives the request, with a session of its own."""

    def work(session: Any) -> None:
        session.add(Note(text=current_scope().label))

    job = make_job(flavour, work, label="follow-up")

    class Handler(flavour.Handler):
        async def get(self) -> None:
            IOLoop.current().spawn_callback(later)

    async def later() -> None:
        await asyncio.sleep(0.02)
        with pytest.raises(ScopeClosed, match="GET /spawns"):
            flavour.session()
        await settle(job())

    await serve(Handler)("/spawns")
    await until(lambda: flavour.texts() == ["follow-up"])


@only(*SYNC)
def test_cron_thread(flavour: Flavour) -> None:
    """A thread of one's own has no scope but those that it opens."""
    seen: list[Any] = []

    def run() -> None:
        try:
            flavour.db.session()
        except NoActiveScope as error:
            seen.append(type(error))
        for _ in range(3):
            job()

    job = make_job(flavour, lambda session: session.add(Note(text="by a thread")))
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [NoActiveScope] * 2
    assert flavour.texts() == ["by a thread"] * 6
    assert scope.current.get() is None


@with_options(hold_warning=0.05)
@pytest.mark.gen_test
async def test_label_in_errors_and_in_the_log(flavour: Flavour, expected_log: list[str]) -> None:
    kept: list[Any] = []

    async def hold(session: Any) -> None:
        await settle(session.connection())
        await asyncio.sleep(0.1)
        kept.append(current_scope())

    @flavour.db.scope("nightly report")
    async def job() -> None:
        await hold(flavour.db.session)

    await job()
    expected_log.append("nightly report held a connection for 0.1 s")
    with pytest.raises(ScopeClosed, match="'nightly report' is over"):
        kept[0].check()


@pytest.mark.gen_test
async def test_callables_of_every_kind(flavour: Flavour) -> None:
    """Partials and objects, as PeriodicCallback is often given them, with a label that says so."""
    labels: list[str] = []

    class Job:
        async def __call__(self) -> None:
            labels.append(current_scope().label)

    async def work(number: int) -> None:
        labels.append(f"{current_scope().label} {number}")

    for job in (Job(), partial(work, 7)):
        await flavour.db.scope()(job)()
    assert labels == [
        "tests.test_jobs.test_callables_of_every_kind.<locals>.Job",
        "tests.test_jobs.test_callables_of_every_kind.<locals>.work 7",
    ]


@only("sqlite", "aiosqlite")
def test_what_cannot_be_decorated(flavour: Flavour) -> None:
    def generate(number: int) -> Any:
        yield number

    async def work(*_: Any) -> None: ...

    with pytest.raises(ConfigurationError, match="generate is a generator"):
        flavour.db.scope()(partial(generate, 1))
    with pytest.raises(ConfigurationError, match="Write @classmethod first"):
        flavour.db.scope()(classmethod(work))
    with pytest.raises(ConfigurationError, match="with `async def`"):
        flavour.db.scope()(lambda: work())()


@pytest.mark.gen_test
async def test_label_in_an_exit_stack(flavour: Flavour) -> None:
    async with AsyncExitStack() as stack:
        block = flavour.db.scope()
        if flavour.is_async:
            await stack.enter_async_context(block)
        else:
            stack.enter_context(block)
        assert current_scope().label.startswith("tests.test_jobs:")
