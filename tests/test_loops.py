"""Several event loops, and several applications, in one process."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import asyncpg
import pytest
from sqlalchemy import func, literal, select
from tornado.httpclient import AsyncHTTPClient
from tornado.httpserver import HTTPServer
from tornado.testing import bind_unused_port
from tornado.web import Application

from tests.support import (
    ASYNC,
    BRIDGED,
    SYNC,
    Flavour,
    Note,
    only,
    settle,
    until,
    with_options,
)
from tornado_sa import AsyncDatabase, Database, SessionHandler, TornadoSAError

ANY_ASYNC = [*ASYNC, *BRIDGED, "aiomysql"]


@pytest.fixture
def no_warning_of_sockets(recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    """asyncio warns of each socket that a closed loop has left behind, when it is collected."""
    yield
    gc.collect()
    assert {warning.category for warning in recwarn} <= {ResourceWarning}


async def use(db: AsyncDatabase, tasks: int = 5) -> list[Any]:
    """Query in several tasks at once, so that they wait for each other."""

    async def ask(number: int) -> Any:
        async with db.scope() as session:
            return await session.scalar(select(literal(number)))

    return await asyncio.gather(*(ask(number) for number in range(tasks)))


@only(*ANY_ASYNC)
@with_options(engine_options={"pool_size": 2, "max_overflow": 0})
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_one_loop_after_another(flavour: Flavour, no_warning_of_sockets: None) -> None:
    """As scripts and tests do it with asyncio.run(), also without a dispose() in between."""
    for _ in range(3):
        assert asyncio.run(use(flavour.db)) == [0, 1, 2, 3, 4]
        assert flavour.checked_out() == 0
    asyncio.run(flavour.db.dispose())


@only("asyncpg")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_who_was_connecting_when_its_loop_was_closed(
    flavour: Flavour, no_warning_of_sockets: None
) -> None:
    """It gives nothing back to the pool, which has moved on to the next loop."""
    connects: list[bool] = []

    async def connect() -> Any:
        connects.append(True)
        if len(connects) == 1:
            await asyncio.Event().wait()
        url = flavour.db.engine.url.set(drivername="postgresql")
        return await asyncpg.connect(url.render_as_string(hide_password=False))

    db = AsyncDatabase(flavour.db.engine.url, engine_options={"async_creator": connect})
    loop = asyncio.new_event_loop()
    connecting = db.engine.connect().start()
    task = loop.create_task(connecting)
    loop.run_until_complete(until(lambda: connects))
    loop.close()

    async def in_the_next_loop() -> None:
        assert connects == [True]
        assert not task.done()
        await use(db)
        connecting.close()  # as the garbage collector does it
        pool: Any = db.engine.pool
        assert pool.checkedout() == 0
        await db.dispose()

    asyncio.run(in_the_next_loop())
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # that is the point here


LEFT_BEHIND = """
import asyncio, os, sys
from sqlalchemy import literal, select
from tornado_sa import AsyncDatabase

db = AsyncDatabase(sys.argv[1], engine_options={"pool_size": 2, "max_overflow": 0})

async def hold():
    async with db.scope("held") as session:
        await session.execute(select(1))
        held.append(session)
        await asyncio.sleep(60)

async def meet():
    tasks.extend(asyncio.create_task(hold()) for _ in range(3))
    while len(held) < 2 or db.status().waiting != 1:
        await asyncio.sleep(0.01)

async def ask(number):
    async with db.scope() as session:
        return await session.scalar(select(literal(number)))

async def go_on():
    print(await asyncio.gather(*map(ask, range(5))))
    for scope in db.status().open_scopes:
        await asyncio.gather(*scope.end())
    print(await asyncio.gather(*map(ask, range(5))))
    status = db.status()
    print(status.checked_out, status.waiting, status.open_scopes)
    await db.dispose()

tasks, held = [], []
loop = asyncio.new_event_loop()
loop.run_until_complete(meet())
loop.close()
asyncio.run(go_on())
sys.stdout.flush()
os._exit(0)  # without Python's complaints about what was left in the middle
"""


@only("aiosqlite", "asyncpg", "psycopg_async", "aiomysql")
def test_loop_that_is_closed_under_open_sessions(flavour: Flavour) -> None:
    """What it held is given up: the next loop has all connections of the pool."""
    url = flavour.sync_engine.url.render_as_string(hide_password=False)
    command = [sys.executable, "-c", LEFT_BEHIND, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.stdout == f"{[0, 1, 2, 3, 4]}\n" * 2 + "0 0 []\n", done.stderr
    assert done.returncode == 0


@only(*ANY_ASYNC)
@pytest.mark.gen_test
async def test_two_loops_at_once(flavour: Flavour) -> None:
    """The second is told so, before it could do harm; the first goes on."""
    await use(flavour.db)
    refused = await asyncio.to_thread(lambda: asyncio.run(error_of(use(flavour.db, 1))))
    assert isinstance(refused, TornadoSAError)
    assert "Make an AsyncDatabase for each loop that runs at the same time" in str(refused)
    refused = await asyncio.to_thread(lambda: asyncio.run(error_of(flavour.db.dispose())))
    assert isinstance(refused, TornadoSAError)
    assert await use(flavour.db) == [0, 1, 2, 3, 4]

    await flavour.db.dispose()
    assert await asyncio.to_thread(lambda: asyncio.run(use_and_dispose(flavour.db))) == [0]
    assert await use(flavour.db) == [0, 1, 2, 3, 4]


async def error_of(work: Any) -> BaseException | None:
    try:
        await work
    except TornadoSAError as error:
        return error
    return None


async def use_and_dispose(db: AsyncDatabase) -> Any:
    try:
        return await use(db, 1)
    finally:
        await db.dispose()


def test_memory_in_one_loop_after_another() -> None:
    """What is stored stays, and tasks may wait for each other in each loop."""
    db = AsyncDatabase("sqlite+aiosqlite://")

    async def store() -> Any:
        async with db.begin() as session:
            await (await session.connection()).run_sync(Note.metadata.create_all)
            session.add(Note(text="kept"))

    async def count() -> Any:
        await use(db, 10)
        async with db.scope() as session:
            return await session.scalar(select(func.count(Note.id)))

    asyncio.run(store())
    assert [asyncio.run(count()) for _ in range(3)] == [1, 1, 1]
    asyncio.run(db.dispose())


def test_dispose_does_not_wait_for_the_tasks_of_a_closed_loop() -> None:
    db = AsyncDatabase("sqlite+aiosqlite://")

    async def leave_behind() -> None:
        async with db.begin() as session:
            await session.execute(select(1))
            db.after_commit(asyncio.sleep, 60)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave_behind())
    (task,) = db._tasks
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # that is the point here
    loop.close()
    asyncio.run(db.dispose(timeout=30))
    task.get_coro().close()  # or Python warns of it


@only(*SYNC)
def test_a_database_in_several_loops_at_once(flavour: Flavour) -> None:
    """A `Database` knows no loop: two servers in two threads share it."""
    db = flavour.db

    class Handler(SessionHandler):
        async def post(self) -> None:
            self.session.add(Note(text="loop"))
            await db.to_thread(self.session.commit)

        def get(self) -> None:
            self.write(f"{self.session.scalar(select(func.count(Note.id)))}")

    answers: list[bytes] = []

    async def serve(turn: threading.Barrier) -> None:
        server = HTTPServer(Application([("/", Handler)], db=db))
        sock, port = bind_unused_port()
        server.add_socket(sock)
        client = AsyncHTTPClient(force_instance=True)
        await asyncio.to_thread(turn.wait)
        for _ in range(10):
            await client.fetch(f"http://127.0.0.1:{port}/", method="POST", body="")
        await asyncio.to_thread(turn.wait)
        answers.append((await client.fetch(f"http://127.0.0.1:{port}/")).body)
        client.close()
        server.stop()
        await server.close_all_connections()

    turn = threading.Barrier(2, timeout=30)
    threads = [threading.Thread(target=lambda: asyncio.run(serve(turn))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [b"20", b"20"]


@pytest.mark.gen_test
async def test_two_applications_in_one_loop(
    flavour: Flavour, http_client: Any, tmp_path: Any
) -> None:
    """Each has its own database, with the same handler class; and they may share one."""
    kind = Database if not flavour.is_async else AsyncDatabase
    driver = "sqlite+aiosqlite" if flavour.is_async else "sqlite"
    other: Any = kind(f"{driver}:///{tmp_path / 'other.db'}")

    class Handler(flavour.Handler):
        async def get(self) -> None:
            assert (await settle(self.session.execute(select(1)))).scalar() == 1
            engine = self.session.get_bind()
            self.write(engine.url.render_as_string())

    servers, bodies = [], []
    for db in (flavour.db, other, flavour.db):
        server = HTTPServer(Application([("/", Handler)], db=db))
        sock, port = bind_unused_port()
        server.add_socket(sock)
        servers.append((server, f"http://127.0.0.1:{port}/"))
    for answer in await asyncio.gather(*(http_client.fetch(url) for _, url in servers)):
        bodies.append(answer.body.decode())
    for server, _ in servers:
        server.stop()
        await server.close_all_connections()
    assert [str(tmp_path / "other.db") in body for body in bodies] == [False, True, False]
    assert bodies[0] == bodies[2]
    await settle(other.dispose())
