"""The bridge: plain Session code over an async driver. Rows 7, 12, 21 and 27."""

from __future__ import annotations

import asyncio
import contextvars
import sys
import threading
import time
import traceback
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from greenlet import getcurrent
from sqlalchemy import event, select, text
from sqlalchemy.exc import NoResultFound
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import object_session
from tornado import gen
from tornado.ioloop import IOLoop
from tornado.template import DictLoader
from tornado.web import HTTPError, authenticated, stream_request_body

from tests.support import (
    ASYNC,
    BRIDGED,
    CANCELLED_LOG,
    Document,
    Flavour,
    Note,
    RawClient,
    Reply,
    make_database,
    only,
    until,
)
from tests.test_tasks import SLOW
from tornado_sa import ConcurrentAccess, ScopeClosed, SessionHandler, TornadoSAError
from tornado_sa.bridge import _Carrier, complete, cross

bridged = only(*BRIDGED)

OUTSIDE = "outside the bridge"


@asynccontextmanager
async def longest_gap(limit: float) -> AsyncIterator[None]:
    """Fail if the loop stands still for ``limit`` seconds."""
    gaps: list[float] = []

    async def tick() -> None:
        before = time.monotonic()
        while True:
            await asyncio.sleep(0.001)
            now = time.monotonic()
            gaps.append(now - before)
            before = now

    ticking = asyncio.ensure_future(tick())
    await asyncio.sleep(0)
    yield
    ticking.cancel()
    assert max(gaps) < limit


async def two_replies(flavour: Flavour) -> None:
    async with flavour.db.begin() as session:
        session.add_all([Note(id=1, text="one"), Reply(note_id=1), Reply(note_id=1)])


class Replies:
    """Loads lazily wherever it is asked."""

    def get_current_user(self: Any) -> Any:
        return self.session.scalar(select(Note.text))


# -- where it works ------------------------------------------------------------


@bridged
@pytest.mark.gen_test
async def test_lazy_loading_in_a_verb(flavour: Flavour, serve: Any) -> None:
    """In `def` and in `async def` verbs, also after an await, and in prepare()."""
    await two_replies(flavour)

    class Plain(Replies, SessionHandler):
        def prepare(self) -> Any:
            self.note = self.get_or_404(Note, 1)

        def get(self) -> Any:
            assert self.note is self.session.get(Note, 1)
            self.write(f"{len(self.note.replies)} {self.current_user}")

    class Coroutine(Plain):
        async def prepare(self) -> None:
            await asyncio.sleep(0)
            super().prepare()

        async def get(self) -> None:
            await asyncio.sleep(0.001)
            super().get()

    assert (await serve(Plain, "/plain")("/plain")).body == b"2 one"
    assert (await serve(Coroutine, "/coroutine")("/coroutine")).body == b"2 one"


@bridged
@pytest.mark.parametrize("kind", ["def", "async def"])
@pytest.mark.gen_test
async def test_lazy_loading_in_a_template(flavour: Flavour, serve: Any, kind: str) -> None:
    await two_replies(flavour)
    page = "{{ current_user }}: {% for reply in note.replies %}{{ reply.note.text }} {% end %}"

    class Handler(Replies, SessionHandler):
        def get_template_namespace(self) -> dict[str, Any]:
            return {**super().get_template_namespace(), "note": self.session.get(Note, 1)}

        if kind == "def":

            def get(self) -> None:
                self.render("page.html")
        else:

            async def get(self) -> None:
                await self.render("page.html")

        def create_template_loader(self, template_path: str) -> Any:
            return DictLoader({"page.html": page})

        def get_template_path(self) -> str:
            return ""

    assert (await serve(Handler)()).body == b"one: one one "


@bridged
@pytest.mark.gen_test
async def test_authenticated_verb(flavour: Flavour, serve: Any) -> None:
    """A decorator on the verb runs under the bridge, as the verb does."""
    await two_replies(flavour)

    class Handler(Replies, SessionHandler):
        @authenticated
        async def get(self) -> None:
            self.write(self.current_user)

    assert (await serve(Handler)()).body == b"one"


@bridged
@pytest.mark.gen_test
async def test_data_received_under_the_bridge(flavour: Flavour, serve: Any) -> None:
    class Handler(SessionHandler):
        def data_received(self, chunk: bytes) -> None:
            self.session.add(Note(text=str(len(chunk))))
            self.session.flush()

        def post(self) -> None:
            self.session.commit()

    response = await serve(stream_request_body(Handler))(method="POST", body=b"x" * 100_000)
    assert response.code == 200
    assert sum(map(int, flavour.texts())) == 100_000


@bridged
@pytest.mark.gen_test
async def test_one_second_query(flavour: Flavour, serve: Any) -> None:
    """The loop goes on meanwhile."""

    class Handler(SessionHandler):
        def get(self) -> None:
            self.session.execute(text(SLOW[flavour.dialect]))

        async def post(self) -> None:
            self.session.execute(text(SLOW[flavour.dialect]))

    fetch = serve(Handler)
    async with longest_gap(0.5):  # 50 ms on a quiet machine: benchmarks/loop.py
        first, second = await asyncio.gather(fetch(), fetch(method="POST"))
    assert (first.code, second.code) == (200, 200)


@bridged
@pytest.mark.gen_test
async def test_timeout_of_a_query(flavour: Flavour, serve: Any) -> None:
    """asyncio.timeout() and wait_for() break a query off, and the session goes on."""

    def query(session: Any) -> None:
        session.execute(text(SLOW[flavour.dialect]))

    class Handler(SessionHandler):
        async def get(self) -> None:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):  # noqa: ASYNC100  (the bridge awaits in there)
                    self.session.execute(text(SLOW[flavour.dialect]))
            self.session.rollback()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(flavour.db.run_sync(query), 0.05)
            self.session.rollback()
            self.write(str(self.session.scalar(select(1))))

    assert (await serve(Handler)()).body == b"1"


@bridged
@pytest.mark.parametrize("kind", ["def", "async def"])
@pytest.mark.gen_test
async def test_cancelled_in_a_query(
    flavour: Flavour, serve: Any, expected_log: list[str], kind: str
) -> None:
    tasks: list[Any] = []

    def query(handler: Any) -> None:
        handler.session.add(Note(text="lost"))
        handler.session.flush()
        tasks.append(asyncio.current_task())
        handler.session.execute(text(SLOW[flavour.dialect]))

    class Handler(SessionHandler):
        if kind == "def":
            get = query
        else:

            async def get(self) -> None:
                query(self)

    expected_log += CANCELLED_LOG
    answer = asyncio.ensure_future(serve(Handler)())
    await until(lambda: tasks)
    await asyncio.sleep(0.02)
    tasks[0].cancel()
    assert (await answer).code == 500
    await until(lambda: flavour.checked_out() == 0)
    assert flavour.texts() == []


@bridged
@pytest.mark.parametrize("kind", ["def", "async def"])
@pytest.mark.gen_test
async def test_client_vanishes_in_a_query(
    flavour: Flavour, serve: Any, base_url: str, expected_log: list[str], kind: str
) -> None:
    entered: list[bool] = []

    def query(handler: Any) -> None:
        handler.session.add(Note(text="lost"))
        handler.session.flush()
        entered.append(True)
        handler.session.execute(text(SLOW[flavour.dialect]))

    class Handler(SessionHandler):
        cancel_on_disconnect = True
        if kind == "def":
            get = query
        else:

            async def get(self) -> None:
                query(self)

    expected_log += CANCELLED_LOG
    serve(Handler)
    async with RawClient(base_url) as client:
        await client.send("GET / HTTP/1.1\nHost: x")
        await until(lambda: entered)
        client.vanish()
        # aiosqlite cannot break a statement off: its connection is free once the thread is
        await until(
            lambda: flavour.checked_out() == 0, seconds=5 if "sqlite" in flavour.name else 1
        )
    assert flavour.texts() == []


# -- errors --------------------------------------------------------------------


@bridged
@pytest.mark.parametrize("where", ["prepare", "def", "async def", "generator"])
@pytest.mark.gen_test
async def test_error_page_that_uses_the_session(
    flavour: Flavour, serve: Any, expected_log: list[str], where: str
) -> None:
    """An error is answered under the bridge, so the page may look up the current user."""
    await two_replies(flavour)

    class Handler(Replies, SessionHandler):
        def prepare(self) -> None:
            if where == "prepare":
                raise HTTPError(418)

        def write_error(self, status_code: int, **kwargs: Any) -> None:
            self.finish(f"{status_code} {self.current_user} {kwargs['exc_info'][0].__name__}")

        def get(self) -> Any:
            self.session.add(Note(text="lost"))
            self.session.flush()
            raise ValueError("plain")

        async def post(self) -> None:
            await asyncio.sleep(0)
            raise ValueError("coroutine")

        @gen.coroutine
        def delete(self) -> Any:
            yield gen.moment
            raise ValueError("generator")

    verbs = {"prepare": "GET", "def": "GET", "async def": "POST", "generator": "DELETE"}
    if where != "prepare":
        expected_log.append("Uncaught exception")
    response = await serve(Handler)(method=verbs[where])
    assert response.body == (b"418 one HTTPError" if where == "prepare" else b"500 one ValueError")
    await until(lambda: flavour.checked_out() == 0)
    assert flavour.texts() == ["one"]


@bridged
@pytest.mark.gen_test
async def test_error_page_outside_the_bridge(
    flavour: Flavour, serve: Any, expected_log: list[str]
) -> None:
    """A 405 is answered by Tornado before any code of the handler: a page without the session."""

    class Handler(Replies, SessionHandler):
        def write_error(self, status_code: int, **kwargs: Any) -> None:
            with pytest.raises(TornadoSAError, match=OUTSIDE):
                _ = self.current_user
            self.finish(f"{status_code}")

    assert (await serve(Handler)(method="DELETE")).body == b"405"


@bridged
@pytest.mark.parametrize("where", ["generator", "task", "callback", "thread"])
@pytest.mark.gen_test
async def test_plain_session_outside_the_bridge(flavour: Flavour, serve: Any, where: str) -> None:
    """One clear error, no connection, nothing that was never awaited, and the verb goes on."""
    await two_replies(flavour)
    said: list[str] = []

    def ask(handler: Any, note: Any) -> None:
        uses: list[Callable[[], Any]] = [
            lambda: handler.session.scalar(select(Note.text)),
            lambda: flavour.db.sync_session.get(Note, 2),
            lambda: note.replies,
            lambda: handler.session.commit(),
        ]
        for use in uses:
            with pytest.raises(TornadoSAError, match=OUTSIDE) as error:
                use()
            said.append(str(error.value))

    class Handler(SessionHandler):
        async def get(self) -> None:
            note = self.session.get(Note, 1)
            done = asyncio.Event()

            def callback() -> None:
                ask(self, note)
                done.set()

            async def task() -> None:
                callback()

            if where == "task":
                await asyncio.create_task(task(), name="mine")
            elif where == "thread":
                await asyncio.to_thread(callback)
            else:
                IOLoop.current().call_later(0.001, callback)
            await done.wait()
            assert note is not None and len(note.replies) == 2

        @gen.coroutine
        def post(self) -> Any:
            note = self.session.get(Note, 1)
            yield gen.moment
            ask(self, note)

    method = "POST" if where == "generator" else "GET"
    assert (await serve(Handler)("/where", method=method)).code == 200
    place = {"task": "in task 'mine'", "thread": "in thread 'asyncio_"}.get(where, "in a callback")
    assert all(f"{place}" in line and f"{method} /where" in line for line in said)
    assert len(said) == 4
    assert all("async def" in line and "db.run_sync" in line for line in said)


@bridged
@pytest.mark.gen_test
async def test_with_on_an_async_database_outside_the_bridge(flavour: Flavour) -> None:
    with pytest.raises(TornadoSAError, match="Write `async with`"):
        with flavour.db.scope():
            pass


# -- children ------------------------------------------------------------------


@bridged
@pytest.mark.gen_test
async def test_children_use_run_sync_or_a_scope_of_their_own(flavour: Flavour, serve: Any) -> None:
    await two_replies(flavour)

    def names(session: Any, prefix: str, *, end: str) -> str:
        assert flavour.db.sync_session() is session
        note = session.scalars(select(Note)).one()
        return f"{prefix}{note.text}{len(note.replies)}{end}"

    async def own() -> str:
        async with flavour.db.scope() as session:
            return str(await session.run_sync(names_of))

    def names_of(session: Any) -> str:
        return names(session, "o", end=".")

    async def child() -> str:
        return str(await flavour.db.run_sync(names, "c", end="!"))

    class Handler(SessionHandler):
        async def get(self) -> None:
            one = await asyncio.create_task(child())
            two = await asyncio.gather(own(), own())
            here = await flavour.db.run_sync(names, "h", end="?")  # several awaits in one step
            assert self.session.scalar(select(1)) == 1
            self.write(" ".join([one, *two, here]))

    assert (await serve(Handler)()).body == b"cone2! oone2. oone2. hone2?"


@bridged
@pytest.mark.gen_test
async def test_with_blocks_under_the_bridge(flavour: Flavour, serve: Any) -> None:
    """Code written for a Database: `with db.begin()` commits, an exception rolls back."""

    class Handler(SessionHandler):
        def post(self) -> None:
            with self.db.begin() as session:
                assert session is not self.session and session is flavour.db.sync_session()
                session.add(Note(text="kept"))
            assert flavour.db.sync_session() is self.session
            with pytest.raises(ZeroDivisionError), self.db.begin() as session:
                session.add(Note(text="lost"))
                session.flush()
                raise ZeroDivisionError
            with self.db.scope() as session:
                assert session.scalar(select(Note.text)) == "kept"
                assert flavour.checked_out() == 1
            assert flavour.checked_out() == 0

    assert (await serve(Handler)(method="POST")).code == 200
    assert flavour.texts() == ["kept"]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
@bridged
@pytest.mark.gen_test
async def test_eager_tasks(flavour: Flavour, serve: Any) -> None:
    """The first step of an eager task runs inside its creator, but not under its bridge."""
    await two_replies(flavour)
    eager: Any = vars(asyncio)["eager_task_factory"]  # unknown to type checkers of Python 3.11
    asyncio.get_running_loop().set_task_factory(eager)

    def count(session: Any) -> int:
        return len([reply.note.text for reply in session.scalars(select(Reply))])

    async def child() -> int:
        with pytest.raises(TornadoSAError, match=OUTSIDE):
            flavour.db.sync_session.scalar(select(1))
        async with flavour.db.scope() as session:
            return int(await session.run_sync(count))

    async def sharing() -> int:
        return int(await flavour.db.run_sync(count))

    async def on_its_own() -> int:
        session = flavour.db.sessionmaker()
        found = len((await session.execute(select(Reply))).all())
        await session.close()
        return found

    class Handler(SessionHandler):
        def post(self) -> None:
            tasks.extend(asyncio.create_task(work()) for work in (child, on_its_own))
            assert count(self.session) == 2

        async def get(self) -> None:
            children = [asyncio.create_task(child()) for _ in range(3)]
            assert count(self.session) == 2  # while they are under way
            self.write(str(await asyncio.gather(*children, child())))
            assert await asyncio.create_task(sharing()) == 2

    tasks: list[Any] = []
    fetch = serve(Handler)
    assert (await fetch()).body == b"[2, 2, 2, 2]"
    assert (await fetch(method="POST")).code == 200
    assert await asyncio.gather(*tasks) == [2, 2]


@bridged
@pytest.mark.parametrize("debug", [True, False])
@pytest.mark.gen_test
async def test_two_tasks_use_the_plain_session_at_once(
    flavour: Flavour, serve: Any, debug: bool, expected_log: list[str]
) -> None:
    """The verb itself and a child of it."""
    url = flavour.db.engine.url.render_as_string(hide_password=False)
    db = make_database(flavour.name, url, debug=debug)
    outcome: list[Any] = []

    async def child() -> None:
        try:
            outcome.append(await db.run_sync(lambda session: session.scalar(select(1))))
        except Exception as error:
            outcome.append(error)

    class Handler(SessionHandler):
        database = db

        async def get(self) -> None:
            self.session.scalar(select(1))
            other = asyncio.create_task(child(), name="child")
            task: Any = asyncio.current_task()
            task.set_name("verb")
            self.session.execute(text(SLOW[flavour.dialect]))
            await other

    assert (await serve(Handler)()).code == 200
    if debug:
        assert isinstance(outcome[0], ConcurrentAccess)
        assert "'child'" in str(outcome[0]) and "'verb'" in str(outcome[0])
    else:
        assert outcome[0] == 1 or isinstance(outcome[0], Exception)
    await until(lambda: db.engine.pool.checkedout() == 0)
    await db.dispose()


# -- hooks ---------------------------------------------------------------------


@bridged
@pytest.mark.parametrize("ends", ["by itself", "finish", "405"])
@pytest.mark.gen_test
async def test_on_finish_that_uses_the_session(
    flavour: Flavour, serve: Any, expected_log: list[str], ends: str
) -> None:
    """Its result is dropped by Tornado; dispose() waits for it, and the scope ends after it."""
    seen: list[Any] = []
    if ends != "405":
        expected_log.append("leaves work uncommitted: 1 new Note")

    class Handler(SessionHandler):
        def get(self) -> None:
            self.session.add(Note(text="lost"))
            if ends == "finish":
                self.finish("early")
                with pytest.raises(ScopeClosed):
                    _ = self.session

        def on_finish(self) -> None:
            with flavour.db.begin() as session:
                session.add(Note(text="logged"))
            seen.append(self.session.scalar(select(Note.text)))

    response = await serve(Handler)(method="DELETE" if ends == "405" else "GET")
    assert response.code == (405 if ends == "405" else 200)
    await until(lambda: seen)
    await until(lambda: flavour.checked_out() == 0)
    assert flavour.texts() == ["logged"]


@bridged
@pytest.mark.gen_test
async def test_hook_that_fails(flavour: Flavour, serve: Any, expected_log: list[str]) -> None:
    class Handler(SessionHandler):
        def get(self) -> None:
            self.session.scalar(select(1))

        def on_finish(self) -> None:
            self.session.scalar(select(1))
            raise ValueError("in on_finish")

    expected_log.append("Uncaught exception GET /")
    assert (await serve(Handler)()).code == 200
    await until(lambda: flavour.db.status().open_scopes == [])


@bridged
@pytest.mark.parametrize("cancels", [True, False])
@pytest.mark.gen_test
async def test_on_connection_close_that_uses_the_session(
    flavour: Flavour, serve: Any, base_url: str, expected_log: list[str], cancels: bool
) -> None:
    entered, go_on = asyncio.Event(), asyncio.Event()
    seen: list[Any] = []

    class Handler(SessionHandler):
        cancel_on_disconnect = cancels

        async def get(self) -> None:
            self.session.scalar(select(1))
            entered.set()
            await go_on.wait()

        def on_connection_close(self) -> None:
            with flavour.db.begin() as session:
                session.add(Note(text="gone"))
            seen.append(self.session.scalar(select(Note.text)))

    expected_log += CANCELLED_LOG if cancels else []
    serve(Handler)
    async with RawClient(base_url) as client:
        await client.send("GET / HTTP/1.1\nHost: x")
        await entered.wait()
        client.vanish()
        await until(lambda: seen == ["gone"])
    go_on.set()
    await until(lambda: flavour.checked_out() == 0)


@bridged
@pytest.mark.gen_test
async def test_dispose_waits_for_hooks(flavour: Flavour, serve: Any) -> None:
    class Handler(SessionHandler):
        def get(self) -> None:
            pass

        def on_finish(self) -> None:
            with flavour.db.begin() as session:
                session.execute(text(SLOW[flavour.dialect]))
                session.add(Note(text="logged"))

    assert (await serve(Handler)()).code == 200
    await flavour.db.dispose()
    assert flavour.texts() == ["logged"]


@pytest.mark.gen_test
async def test_a_greenlet_keeps_nothing_of_its_journeys() -> None:
    """Nor of its first one, for which it is made: more at once than there are kept."""

    class Load:
        pass

    together = asyncio.Event()
    loads = [Load() for _ in range(150)]
    alive = weakref.WeakSet(loads)

    def wait(load: Load) -> Load:
        complete(together.wait())
        return load

    for _ in range(2):
        crossing = [asyncio.ensure_future(cross(wait, load)) for load in loads]
        await asyncio.sleep(0)
        together.set()
        await asyncio.gather(*crossing)
    del crossing, loads
    await asyncio.sleep(0)  # the loop's own references
    assert len(alive) == 0


@only(*ASYNC)
@pytest.mark.gen_test
async def test_an_async_session_crosses_in_greenlets_that_are_used_again(flavour: Flavour) -> None:
    """Whatever its method; but one of the user's own class is as the user wrote it."""

    class Counting(AsyncSession):
        gets = 0

        async def get(self, *args: Any, **kwargs: Any) -> Any:
            Counting.gets += 1
            return await super().get(*args, **kwargs)

    db = make_database(flavour.name, flavour.db.engine.url, session_options={"class_": Counting})
    carriers: set[object] = set()

    @event.listens_for(db.engine.sync_engine, "before_cursor_execute")
    def look(*_: object) -> None:
        carriers.add(getcurrent())

    async with db.scope() as session:
        assert isinstance(session, Counting)
        note = Note(text="first")
        session.add(note)
        await session.flush()
        await session.refresh(note)
        await session.execute(select(Note))
        await session.scalar(select(Note))
        await (await session.connection()).execute(select(Note))  # SQLAlchemy's own greenlet
        theirs = {one for one in carriers if type(one) is not _Carrier}
        assert (len(theirs), len(carriers)) == (1, 2)
        assert await session.get(Note, note.id, populate_existing=True) is note
        assert Counting.gets == 1
        with pytest.raises(NoResultFound):
            await session.get_one(Note, -1)
        await session.commit()
    await db.dispose()


# -- as an ordinary verb -------------------------------------------------------


@bridged
@pytest.mark.gen_test
async def test_inner_calls_go_straight_through(flavour: Flavour, serve: Any) -> None:
    """self.get() and super().get() return what they return, also in a @gen.coroutine."""

    class Base(SessionHandler):
        def get(self) -> Any:
            return self.session.scalar(select(1))

    class Handler(Base):
        def put(self) -> None:
            assert super().get() == self.get() == 1
            self.write("straight")

        def get(self) -> Any:
            return super().get()

        @gen.coroutine
        def post(self) -> Any:
            yield gen.moment
            with pytest.raises(TornadoSAError, match=OUTSIDE):
                self.get()
            self.write("straight")

    fetch = serve(Handler)
    assert (await fetch(method="PUT")).body == b"straight"
    assert (await fetch(method="POST")).body == b"straight"


@bridged
@pytest.mark.gen_test
async def test_context_task_and_thread(flavour: Flavour, serve: Any) -> None:
    """One task, one thread and one context from prepare() to the end of the verb."""
    variable = contextvars.ContextVar("variable", default="unset")
    seen: list[Any] = []

    def look() -> None:
        seen.append((asyncio.current_task(), threading.get_ident()))

    class Handler(SessionHandler):
        def prepare(self) -> None:
            variable.set("prepare")
            look()

        async def get(self) -> None:
            assert variable.get() == "prepare"
            look()
            self.session.scalar(select(1))
            variable.set("before")
            await asyncio.sleep(0)
            self.session.scalar(select(1))
            assert variable.get() == "before"
            assert await asyncio.create_task(self.child()) == "before"
            look()

        async def child(self) -> str:
            return variable.get()

    assert (await serve(Handler)()).code == 200
    assert len(seen) == 3 and len(set(seen)) == 1


@bridged
@pytest.mark.gen_test
async def test_traceback(flavour: Flavour, serve: Any) -> None:
    """An exception shows the lines of the verb and of what it called, innermost last."""
    shown: list[list[str]] = []

    def helper(session: Any) -> None:
        session.execute(text("SELECT nonsense"))

    class Handler(SessionHandler):
        async def get(self) -> None:
            await asyncio.sleep(0)
            helper(self.session)

        def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
            shown.append([frame.name for frame in traceback.extract_tb(tb)])

    assert (await serve(Handler)()).code == 500
    assert "get" in shown[0] and "helper" in shown[0][shown[0].index("get") :]


@bridged
@pytest.mark.gen_test
async def test_verb_that_is_thrown_away(flavour: Flavour) -> None:
    """GeneratorExit closes the coroutine; what it does then, it does without I/O."""
    from tornado_sa.bridge import complete, cross

    happened: list[Any] = []

    async def verb() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            with pytest.raises(TornadoSAError, match=OUTSIDE):
                flavour.db.sync_session.scalar(select(1))
            happened.append("closed")

    async with flavour.db.scope():
        crossing = cross(complete, verb())
        crossing.send(None)
        crossing.close()
    assert happened == ["closed"]


@bridged
@pytest.mark.gen_test
async def test_a_request_without_a_query_has_no_session(flavour: Flavour, serve: Any) -> None:
    class Handler(SessionHandler):
        def get(self) -> None:
            assert flavour.db.status().open_scopes == []

    assert (await serve(Handler)()).code == 200


@bridged
@pytest.mark.gen_test
async def test_holding_a_connection_over_an_await(flavour: Flavour, serve: Any) -> None:
    """Row 21: a pool of 2, 16 requests at once; all are answered, and soon."""
    url = flavour.db.engine.url.render_as_string(hide_password=False)
    options = {"pool_size": 2, "max_overflow": 0}
    db = make_database(flavour.name, url, engine_options=options)

    class Handler(SessionHandler):
        database = db

        async def get(self) -> None:
            self.session.scalar(select(1))
            await asyncio.sleep(0.05)
            self.write(str(self.session.scalar(select(1))))

    fetch = serve(Handler)
    began = time.monotonic()
    async with longest_gap(0.5):
        answers = await asyncio.gather(*(fetch() for _ in range(16)))
    assert [answer.body for answer in answers] == [b"1"] * 16
    assert time.monotonic() - began < 10  # 0.4 s of waiting; a pool on the loop took 420 s
    await until(lambda: db.engine.pool.checkedout() == 0)
    await db.dispose()


@only("aiosqlite", "asyncpg", "psycopg_async")
@pytest.mark.gen_test
async def test_lazy_load_in_an_async_session_handler(flavour: Flavour, serve: Any) -> None:
    """There it is our error too, which says what to write instead; run_sync bridges."""
    await two_replies(flavour)

    class Handler(flavour.Handler):
        async def get(self) -> None:
            note = await self.get_or_404(Note, 1)
            with pytest.raises(TornadoSAError, match="selectinload"):
                _ = note.replies
            count = await flavour.db.run_sync(lambda session: len(note.replies))
            assert object_session(note) is self.session.sync_session
            self.write(str(count))

    assert (await serve(Handler)()).body == b"2"


@bridged
@pytest.mark.gen_test
async def test_stale_data_and_404_under_the_bridge(
    flavour: Flavour, serve: Any, expected_log: list[str]
) -> None:
    async with flavour.db.begin() as session:
        session.add(Document(id=1, text="old"))

    class Handler(SessionHandler):
        async def post(self) -> None:
            document = self.get_or_404(Document, 1)
            async with flavour.db.begin() as session:
                (await session.get(Document, 1)).text = "newer"
            document.text = "mine"
            self.session.commit()

        def get(self) -> None:
            self.get_or_404(Document, 2)

    if "sqlite" in flavour.name:  # one writer at a time
        return
    expected_log.append("POST /: 409 Conflict")
    fetch = serve(Handler)
    assert (await fetch(method="POST")).code == 409
    assert (await fetch()).code == 404
