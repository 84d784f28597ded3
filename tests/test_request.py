"""One request, one scope, one session; nothing uncommitted survives. Rows 1, 3, 4, 5, 9, 10, 11."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import pytest
from sqlalchemy import event, select
from tornado import gen
from tornado.web import ErrorHandler, Finish, HTTPError

from tests.support import (
    CANCELLED_LOG,
    Flavour,
    Note,
    Reply,
    make_database,
    only,
    proxy,
    settle,
    until,
)
from tornado_sa import ScopeClosed, current_scope


@pytest.mark.gen_test
async def test_what_is_committed_stays(flavour: Flavour, serve: Any) -> None:
    class Handler(flavour.Handler):
        async def post(self) -> None:
            self.session.add(Note(text="kept"))
            await settle(self.session.commit())

    response = await serve(Handler)(method="POST")
    assert response.code == 200
    assert flavour.texts() == ["kept"]


@pytest.mark.parametrize(
    ("error", "code"),
    [(ValueError("no"), 500), (HTTPError(400), 400), (Finish(), 200), (None, 200)],
)
@pytest.mark.parametrize("flushed", [True, False])
@pytest.mark.gen_test
async def test_what_is_not_committed_is_rolled_back(
    flavour: Flavour,
    serve: Any,
    expected_log: list[str],
    error: Exception | None,
    code: int,
    flushed: bool,
) -> None:
    class Handler(flavour.Handler):
        async def post(self) -> None:
            self.session.add(Note(text="lost"))
            if flushed:
                await settle(self.session.flush())
            if error is not None:
                raise error

    if code == 500:
        expected_log.append("Uncaught exception POST /")
    elif code == 200:
        expected_log.append("leaves work uncommitted: 1 new Note")
    response = await serve(Handler)(method="POST")
    assert response.code == code
    await until(lambda: flavour.checked_out() == 0)
    assert flavour.texts() == []


@pytest.mark.gen_test
async def test_failed_commit_leaves_a_clean_connection(
    flavour: Flavour, serve: Any, expected_log: list[str]
) -> None:
    """On SQLite, close() alone would put the connection back with the orphan row in it."""

    class Handler(flavour.Handler):
        async def post(self) -> None:
            self.session.add(Reply(note_id=404))
            await settle(self.session.commit())

        async def get(self) -> None:
            self.write(str(len((await settle(self.session.scalars(select(Reply)))).all())))

    expected_log.append("Uncaught exception POST /")
    fetch = serve(Handler)
    assert (await fetch(method="POST")).code == 500
    await until(lambda: flavour.checked_out() == 0)
    assert (await fetch()).body == b"0"


@pytest.mark.gen_test
async def test_helpers_share_the_session_and_see_flushed_rows(
    flavour: Flavour, serve: Any, expected_log: list[str]
) -> None:
    expected_log.append("leaves work uncommitted: 1 new Note")

    async def deep_down() -> list[str]:
        return list((await settle(flavour.session.scalars(select(Note.text)))).all())

    class Handler(flavour.Handler):
        async def get(self) -> None:
            assert flavour.session() is self.session
            assert flavour.db.status().open_scopes == [current_scope()]
            self.session.add(Note(text="flushed"))
            await settle(self.session.flush())
            self.write({"texts": await deep_down(), "label": current_scope().label})

    response = await serve(Handler)("/notes/7?q=1")
    assert response.body == b'{"texts": ["flushed"], "label": "GET /notes/7"}'


@pytest.mark.gen_test
async def test_concurrent_requests_never_share(flavour: Flavour, serve: Any) -> None:
    seen: list[int] = []
    together = asyncio.Barrier(4)

    class Handler(flavour.Handler):
        async def get(self) -> None:
            mine = self.session
            await together.wait()
            assert flavour.session() is mine is self.session
            seen.append(id(mine))

    fetch = serve(Handler)
    await asyncio.gather(*(fetch() for _ in range(4)))
    assert len(set(seen)) == 4


def plain_prepare(handler: Any, call_super: bool) -> None:
    if call_super:
        super(handler.Handler, handler).prepare()
    handler.found.append(proxy(handler)())


async def async_prepare(handler: Any, call_super: bool) -> None:
    if call_super:
        await super(handler.Handler, handler).prepare()
    await asyncio.sleep(0)
    handler.found.append(proxy(handler)())


async def async_prepare_not_awaiting(handler: Any, call_super: bool) -> None:
    await asyncio.sleep(0)
    if call_super:
        super(handler.Handler, handler).prepare()
    handler.found.append(proxy(handler)())


@gen.coroutine
def generator_prepare(handler: Any, call_super: bool) -> Any:
    if call_super:
        yield super(handler.Handler, handler).prepare()
    yield gen.moment
    handler.found.append(proxy(handler)())


def returning_prepare(handler: Any, call_super: bool) -> Any:
    return async_prepare(handler, call_super)


PREPARES = [
    plain_prepare,
    async_prepare,
    async_prepare_not_awaiting,
    generator_prepare,
    returning_prepare,
]


def plain_verb(handler: Any) -> None:
    handler.found.append(proxy(handler)())


async def async_verb(handler: Any) -> None:
    await asyncio.sleep(0)
    handler.found.append(proxy(handler)())


@gen.coroutine
def generator_verb(handler: Any) -> Any:
    yield gen.moment
    handler.found.append(proxy(handler)())


@pytest.mark.parametrize("calls_super", [True, False])
@pytest.mark.parametrize("prepare_", PREPARES)
@pytest.mark.parametrize("verb", [plain_verb, async_verb, generator_verb])
@only("sqlite", "asyncpg")
@pytest.mark.gen_test
async def test_every_kind_of_prepare_and_verb(
    flavour: Flavour, serve: Any, prepare_: Any, verb: Any, calls_super: bool
) -> None:
    """The own function is of the kind under test, so that it is wrapped as that kind."""
    found: list[Any] = []
    finished: list[bool] = []

    def on_finish(self: Any) -> None:  # never calls super()
        found.append(proxy(self)())
        finished.append(True)

    def one_argument(function: Any) -> Any:
        if asyncio.iscoroutinefunction(function):

            async def prepare(self: Any) -> None:
                await function(self, calls_super)

            return prepare
        return lambda self: function(self, calls_super)

    body = {"found": found, "prepare": one_argument(prepare_), "get": verb, "on_finish": on_finish}
    Handler = type("Handler", (flavour.Handler,), body)
    Handler.Handler = Handler  # type: ignore[attr-defined]  # for super() in the body

    assert (await serve(Handler)()).code == 200
    await until(lambda: finished)
    assert len(found) == 3
    assert found[0] is found[1] is found[2]


@pytest.mark.gen_test
async def test_verb_that_goes_on_after_super(flavour: Flavour, serve: Any) -> None:
    """The verb of the base class does not answer for the one that called it."""

    class Parent(flavour.Handler):
        async def get(self) -> None:
            await settle(self.session.execute(select(1)))
            self.write("parent ")

    class Child(Parent):
        async def get(self) -> None:
            await super().get()
            await settle(self.session.execute(select(1)))
            self.write("child")

    assert (await serve(Child)()).body == b"parent child"


@only("aiosqlite", "asyncpg", "psycopg_async", "bridged_asyncpg")
@pytest.mark.gen_test
async def test_the_end_of_a_verb_takes_no_task(flavour: Flavour, serve: Any) -> None:
    """The session is closed after the response, in the task of the request."""
    tasks: list[str] = []

    def factory(loop: Any, coroutine: Any, name: str = "", **options: Any) -> Any:
        tasks.append(name)
        return asyncio.Task(coroutine, loop=loop, name=name, **options)

    class Handler(flavour.Handler):
        async def get(self) -> None:
            await settle(self.session.execute(select(1)))
            self.write("an answer")
            asyncio.get_running_loop().set_task_factory(factory)

    try:
        assert (await serve(Handler)()).body == b"an answer"
        await until(lambda: not flavour.db.status().open_scopes and not flavour.checked_out())
    finally:
        asyncio.get_running_loop().set_task_factory(None)
    assert not [name for name in tasks if name and name.startswith("close ")]


@pytest.mark.gen_test
async def test_verb_that_goes_on_after_finish(flavour: Flavour, serve: Any) -> None:
    """Its connection does not wait for it."""
    over = asyncio.Event()
    free_meanwhile: list[bool] = []

    class Handler(flavour.Handler):
        async def get(self) -> None:
            await settle(self.session.execute(select(1)))
            self.finish("an answer")
            await until(lambda: not flavour.checked_out())
            free_meanwhile.append(not over.is_set())
            await over.wait()

    assert (await serve(Handler)()).body == b"an answer"
    await until(lambda: free_meanwhile)
    over.set()
    assert free_meanwhile == [True]


@only("asyncpg", "psycopg_async")
@pytest.mark.gen_test
async def test_dispose_right_after_finish(flavour: Flavour, serve: Any) -> None:
    """It waits for a session whose closing has not begun yet."""
    pool = flavour.db.engine.pool
    left: list[int] = []

    class Handler(flavour.Handler):
        async def get(self) -> None:
            await self.session.execute(select(1))
            self.finish("an answer")
            await flavour.db.dispose()
            left.append(pool.checkedout())

    assert (await serve(Handler)()).body == b"an answer"
    await until(lambda: left)
    assert left == [0]


@only("asyncpg", "psycopg_async", "bridged_asyncpg", "bridged_psycopg")
@pytest.mark.gen_test
async def test_sessions_are_closed_in_reverse(flavour: Flavour, serve: Any) -> None:
    """The one that was opened last is the first to go."""
    second = make_database(flavour.name, flavour.sync_engine.url.render_as_string(False))
    ending: list[str] = []
    databases = {"first": flavour.db, "second": second}
    for name, database in databases.items():
        engine = database.engine.sync_engine
        event.listen(engine, "rollback", lambda *_, name=name: ending.append(name))

    class Handler(flavour.Handler):
        async def get(self) -> None:
            await settle(self.session.execute(select(1)))
            session = second.sync_session if flavour.is_bridged else second.session
            await settle(session.execute(select(1)))

    assert (await serve(Handler)()).code == 200
    await until(lambda: len(ending) == 2)
    await second.dispose()
    assert ending == ["second", "first"]


@only("asyncpg", "psycopg_async", "bridged_asyncpg", "bridged_psycopg")
@pytest.mark.gen_test
async def test_cancelled_in_the_middle_of_the_end(
    flavour: Flavour, serve: Any, expected_log: list[str]
) -> None:
    """The session that is being closed loses its connection, the others are closed as ever."""
    second = make_database(flavour.name, flavour.sync_engine.url.render_as_string(False))
    ended: list[bool] = []

    class Handler(flavour.Handler):
        async def get(self) -> None:
            await settle(self.session.execute(select(1)))
            session = second.sync_session if flavour.is_bridged else second.session
            await settle(session.execute(select(1)))
            self.write("an answer")

        def on_finish(self) -> None:
            asyncio.current_task().cancel()  # type: ignore[union-attr]
            ended.append(True)

    expected_log += CANCELLED_LOG
    assert (await serve(Handler)()).body == b"an answer"
    await until(lambda: ended and not second.engine.pool.checkedout() and not flavour.checked_out())
    assert not second.status().open_scopes
    assert not flavour.db.status().open_scopes
    await second.dispose()


@only("asyncpg", "psycopg_async")
@pytest.mark.gen_test
async def test_dispose_waits_for_the_end_of_a_verb(flavour: Flavour, serve: Any) -> None:
    """Each database waits for its own session, though one task closes them all."""
    second = make_database(flavour.name, flavour.sync_engine.url.render_as_string(False))
    pool = second.engine.pool
    left: list[int] = []

    async def dispose() -> None:
        await second.dispose()
        left.append(pool.checkedout())

    class Handler(flavour.Handler):
        async def get(self) -> None:
            await second.session.execute(select(1))
            await self.session.execute(select(1))

        def on_finish(self) -> None:
            self.disposing = asyncio.create_task(dispose())

    assert (await serve(Handler)()).code == 200
    await until(lambda: left)
    assert left == [0]


@pytest.mark.gen_test
async def test_on_finish_that_forgets_super(flavour: Flavour, serve: Any) -> None:
    class Handler(flavour.Handler):
        def on_finish(self) -> None:
            pass

        async def get(self) -> None:
            await settle(self.session.execute(select(1)))

    assert (await serve(Handler)()).code == 200


@pytest.mark.gen_test
async def test_on_finish_that_raises(flavour: Flavour, serve: Any, expected_log: list[str]) -> None:
    class Handler(flavour.Handler):
        def on_finish(self) -> None:
            raise ValueError("in on_finish")

        async def get(self) -> None:
            await settle(self.session.execute(select(1)))

    expected_log.append("Uncaught exception GET /")
    assert (await serve(Handler)()).code == 200


@pytest.mark.gen_test
async def test_prepare_that_answers(flavour: Flavour, serve: Any) -> None:
    class Handler(flavour.Handler):
        async def prepare(self) -> None:
            await settle(self.session.execute(select(1)))
            self.set_status(403)
            self.finish("no")

    assert (await serve(Handler)()).code == 403


@pytest.mark.gen_test
async def test_work_after_an_early_finish(flavour: Flavour, serve: Any) -> None:
    errors: list[ScopeClosed] = []

    class Handler(flavour.Handler):
        async def get(self) -> None:
            await settle(self.session.execute(select(1)))
            self.finish("early")
            for use in (lambda: self.session, flavour.session):
                with pytest.raises(ScopeClosed, match=r"GET /early.*db\.scope") as caught:
                    use()
                errors.append(caught.value)

    assert (await serve(Handler)("/early")).body == b"early"
    await until(lambda: len(errors) == 2)


@pytest.mark.gen_test
async def test_a_kept_session_is_dead_after_the_request(flavour: Flavour, serve: Any) -> None:
    kept: list[Any] = []

    class Handler(flavour.Handler):
        async def get(self) -> None:
            kept.append(self.session)
            await settle(self.session.execute(select(1)))

    await serve(Handler)()
    await until(lambda: flavour.checked_out() == 0)
    with pytest.raises(Exception, match="permanently closed"):
        await settle(kept[0].execute(select(1)))


@pytest.mark.parametrize("way", ["task", "callback"])
@pytest.mark.gen_test
async def test_finish_called_from_elsewhere(
    flavour: Flavour, serve: Any, expected_log: list[str], way: str
) -> None:
    """It ends the scope of the handler that is finished, not the one of whoever calls."""
    waiting: list[Any] = []
    outcome: list[str] = []

    class Waiting(flavour.Handler):
        async def get(self) -> None:
            await settle(self.session.execute(select(1)))
            self._auto_finish = False
            waiting.append((self, asyncio.current_task()))
            await asyncio.Event().wait()

    class Finishing(flavour.Handler):
        async def get(self) -> None:
            mine = self.session
            await settle(mine.execute(select(1)))
            other, task = waiting[0]

            def finish() -> None:
                other.finish("by another")
                task.cancel()

            if way == "task":
                await asyncio.create_task(asyncio.to_thread(lambda: None))
                finish()
            else:
                asyncio.get_running_loop().call_soon(finish)
                await asyncio.sleep(0.01)
            assert flavour.session() is mine is self.session
            await settle(mine.execute(select(1)))
            with pytest.raises(ScopeClosed):
                _ = other.session
            outcome.append("mine is alive")

    expected_log += CANCELLED_LOG
    fetch = serve(Waiting, "/waiting")
    finishing = serve(Finishing, "/finishing")
    first = asyncio.ensure_future(fetch("/waiting"))
    await until(lambda: waiting)
    assert (await finishing("/finishing")).code == 200
    assert (await first).body == b"by another"
    assert outcome == ["mine is alive"]


@pytest.mark.gen_test
async def test_on_finish_without_prepare(
    flavour: Flavour, serve: Any, app: Any, expected_log: list[str]
) -> None:
    """405, a rejected XSRF check and a malformed body: nothing of other requests is touched."""
    together = asyncio.Event()
    entered = asyncio.Event()

    class Bystander(flavour.Handler):
        async def get(self) -> None:
            self.session.add(Note(text="bystander"))
            await settle(self.session.flush())
            entered.set()
            await together.wait()
            await settle(self.session.commit())

    class Handler(flavour.Handler):
        async def post(self) -> None:
            raise AssertionError("never called")

    fetch = serve(Bystander, "/bystander")
    bystander = asyncio.ensure_future(fetch("/bystander"))
    await entered.wait()
    fetch = serve(Handler)
    assert (await fetch()).code == 405
    expected_log += ["no final boundary", "_xsrf"]
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    assert (await fetch(method="POST", headers=form, body="--x nonsense")).code == 400
    app.settings["xsrf_cookies"] = True
    assert (await fetch(method="POST")).code == 403
    together.set()
    assert (await bystander).code == 200
    assert flavour.texts() == ["bystander"]


@pytest.mark.gen_test
async def test_error_page_of_a_405_may_use_the_session(flavour: Flavour, serve: Any) -> None:
    class Handler(flavour.Handler):
        def write_error(self, status_code: int, **kwargs: Any) -> None:
            self.finish(f"{type(self.session).__name__} {status_code}")

    response = await serve(Handler)()
    assert response.body.endswith(b"Session 405")


@pytest.mark.gen_test
async def test_current_user_stays_lazy(flavour: Flavour, serve: Any) -> None:
    asked: list[str] = []

    class Handler(flavour.Handler):
        def get_current_user(self) -> Any:
            asked.append(current_scope().label)
            return "somebody"

        async def get(self) -> None:
            if self.get_query_argument("user", None):
                self.write(self.current_user)

    fetch = serve(Handler)
    assert (await fetch()).body == b""
    assert asked == []
    assert (await fetch("/?user=1")).body == b"somebody"
    assert asked == ["GET /"]


@pytest.mark.gen_test
async def test_get_one_first_or_404(flavour: Flavour, serve: Any, expected_log: list[str]) -> None:
    class Handler(flavour.Handler):
        async def get(self) -> None:
            wanted = self.get_query_argument("text")
            statement = select(Note).where(Note.text == wanted)
            note = await settle(getattr(self, self.get_query_argument("by"))(statement))
            assert (await settle(self.get_or_404(Note, note.id))) is note
            self.write(note.text)

        async def delete(self) -> None:
            await settle(self.get_or_404(Note, 404))

    def add(session: Any) -> None:
        session.add_all([Note(text="one"), Note(text="two"), Note(text="two")])

    await flavour.in_scope(add, commit=True)
    fetch = serve(Handler)
    assert (await fetch("/?by=one_or_404&text=one")).body == b"one"
    assert (await fetch("/?by=first_or_404&text=two")).body == b"two"
    assert (await fetch("/?by=one_or_404&text=none")).code == 404
    assert (await fetch("/?by=first_or_404&text=none")).code == 404
    assert (await fetch(method="DELETE")).code == 404
    expected_log.append("Uncaught exception GET /")  # several rows are a mistake, not a 404
    assert (await fetch("/?by=one_or_404&text=two")).code == 500


@pytest.mark.gen_test
async def test_column_that_is_not_unique(
    flavour: Flavour, serve: Any, expected_log: list[str]
) -> None:
    class Handler(flavour.Handler):
        async def get(self) -> None:
            await settle(self.one_or_404(select(Note.text)))

    await flavour.in_scope(
        lambda session: session.add_all([Note(text="same"), Note(text="same")]), commit=True
    )
    expected_log.append("Uncaught exception GET /")
    assert (await serve(Handler)()).code == 500


@pytest.mark.gen_test
async def test_db_session_before_prepare_and_without_it(
    flavour: Flavour, serve: Any, app: Any, expected_log: list[str]
) -> None:
    class Handler(flavour.Handler):
        def get_current_user(self) -> Any:
            return type(flavour.session()).__name__

        def write_error(self, status_code: int, **kwargs: Any) -> None:
            assert flavour.session() is self.session
            self.finish(f"{status_code} {self.current_user}")

    fetch = serve(Handler)
    assert (await fetch()).body.startswith(b"405 ")
    app.settings.update(xsrf_cookies=True, cookie_secret="x")
    expected_log.append("_xsrf")
    assert (await fetch(method="POST")).body.startswith(b"403 ")


@pytest.mark.gen_test
async def test_decorator_that_copies_our_mark(flavour: Flavour, serve: Any) -> None:
    """functools.wraps copies __dict__, and with it what a wrapper is known by."""

    class Parent(flavour.Handler):
        def prepare(self) -> None:
            pass

    class Child(Parent):
        def prepare(self) -> None:  # calls nobody
            pass

        functools.update_wrapper(prepare, Parent.prepare)

        async def get(self) -> None:
            await settle(self.session.execute(select(1)))
            stream = self.detach()
            await stream.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            stream.close()

    assert (await serve(Child)()).code == 200
    await until(lambda: flavour.checked_out() == 0)


@only("sqlite", "asyncpg")
@pytest.mark.gen_test
async def test_handler_of_tornado_before_ours(flavour: Flavour, serve: Any, app: Any) -> None:
    """ErrorHandler.prepare hides ours, and is wrapped all the same."""

    class Handler(ErrorHandler, flavour.Handler):
        def write_error(self, status_code: int, **kwargs: Any) -> None:
            assert flavour.session() is self.session
            self.finish("mine")

    app.add_handlers(r".*", [("/gone", Handler, {"status_code": 410})])
    response = await serve(flavour.Handler)("/gone")
    assert (response.code, response.body) == (410, b"mine")
