"""Transactions: the response comes after the COMMIT, and says what became of it."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest
from sqlalchemy import func, select, text, update
from sqlalchemy.exc import IntegrityError
from tornado import gen
from tornado.log import app_log
from tornado.template import DictLoader
from tornado.web import Finish, HTTPError, RequestHandler

from tests.support import (
    CANCELLED_LOG,
    POSTGRESQL,
    Flavour,
    Note,
    RawClient,
    Reply,
    only,
    settle,
    until,
)
from tornado_sa import (
    BaseHandler,
    ConfigurationError,
    SessionHandler,
    read_only,
    transactional,
)

UNCAUGHT = "Uncaught exception"


def at_end(handler: Any, how: str) -> None:
    """End a verb in one of the ways there are."""
    if how == "finish":
        handler.finish("stored")
    elif how == "render":
        # Tornado keeps one loader for each path, by default that of this file.
        handler.get_template_path = lambda: "test_transactions"
        handler.settings["template_loader"] = DictLoader({"stored.html": "stored"})
        handler.render("stored.html")
    elif how == "redirect":
        handler.redirect("/stored")
    elif how == "Finish":
        handler.write("stored")
        raise Finish
    elif how == "Finish with chunk":
        raise Finish("stored")
    else:
        handler.write("stored")


WAYS = ["return", "finish", "render", "redirect", "Finish", "Finish with chunk"]


# -- COMMIT before the first byte -----------------------------------------------------


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.gen_test
async def test_commits_before_the_response(flavour: Flavour, serve: Any, how: str) -> None:
    class Handler(flavour.Handler):
        @transactional
        async def post(self) -> None:
            self.session.add(Note(text="kept"))
            self.set_cookie("seen", "1")
            at_end(self, how)

    response = await serve(Handler)(method="POST", follow_redirects=False)
    assert response.code == (302 if how == "redirect" else 200)
    assert response.body == (b"" if how == "redirect" else b"stored")
    assert response.headers["Set-Cookie"].startswith("seen=1")
    assert flavour.texts() == ["kept"]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.gen_test
async def test_failed_commit_leaves_nothing_of_the_success(
    flavour: Flavour, serve: Any, expected_log: list[str], how: str
) -> None:
    """Row 2: no header, no cookie, no body, no status, no row; and the connection is clean."""
    expected_log.append(UNCAUGHT)

    class Handler(flavour.Handler):
        def prepare(self) -> Any:
            self.set_header("X-Prepared", "1")
            self.set_cookie("prepared", "1")
            return super().prepare()

        @transactional
        async def post(self) -> None:
            self.session.add_all([Note(text="lost"), Reply(note_id=-1)])
            self.set_status(201, "Stored")
            self.set_header("X-Stored", "1")
            self.set_cookie("stored", "1")
            at_end(self, how)

        async def get(self) -> None:
            self.write(str(await settle(self.session.scalar(select(func.count(Note.id))))))

    fetch = serve(Handler)
    response = await fetch(method="POST", follow_redirects=False)
    assert response.code == 500
    assert b"stored" not in response.body.lower()
    assert "X-Stored" not in response.headers
    assert "Location" not in response.headers
    assert [c.split("=")[0] for c in response.headers.get_list("Set-Cookie")] == ["prepared"]
    assert flavour.texts() == []
    assert (await fetch()).body == b"0"


@pytest.mark.parametrize("kind", ["def", "async def", "coroutine"])
@pytest.mark.gen_test
async def test_kinds_of_verbs(flavour: Flavour, serve: Any, kind: str) -> None:
    class Handler(flavour.Handler):
        if kind == "def":

            @transactional
            def post(self) -> None:
                self.session.add(Note(text="kept"))
                self.finish({"stored": True})
        elif kind == "async def":

            @transactional()
            async def post(self) -> None:
                self.session.add(Note(text="kept"))
                await asyncio.sleep(0.001)
                await self.finish({"stored": True})
        else:

            @transactional
            @gen.coroutine
            def post(self) -> Any:
                self.session.add(Note(text="kept"))
                yield gen.moment
                self.finish({"stored": True})

    response = await serve(Handler)(method="POST")
    assert (response.code, response.body) == (200, b'{"stored": true}')
    assert response.headers["Content-Type"].startswith("application/json")
    assert flavour.texts() == ["kept"]


@pytest.mark.parametrize("status", [400, 500])
@pytest.mark.gen_test
async def test_error_status_is_rolled_back_and_goes_out_as_it_is(
    flavour: Flavour, serve: Any, status: int
) -> None:
    class Handler(flavour.Handler):
        @transactional
        async def post(self) -> None:
            self.session.add(Note(text="lost"))
            await settle(self.session.flush())
            self.set_status(status, "My reason")
            self.set_header("X-Why", "mine")
            self.write("my body")

        @transactional
        async def put(self) -> None:
            self.session.add(Note(text="lost"))
            await settle(self.session.flush())
            self.send_error(status, reason="My reason")

    fetch = serve(Handler)
    response = await fetch(method="POST")
    assert (response.code, response.reason, response.body) == (status, "My reason", b"my body")
    assert response.headers["X-Why"] == "mine"
    response = await fetch(method="PUT")
    assert (response.code, response.reason) == (status, "My reason")
    assert b"My reason" in response.body
    assert flavour.texts() == []


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.gen_test
async def test_exception_is_rolled_back_and_answered(
    flavour: Flavour, serve: Any, expected_log: list[str], finished: bool
) -> None:
    expected_log.append(UNCAUGHT)

    class Handler(flavour.Handler):
        @transactional
        async def post(self) -> None:
            self.session.add(Note(text="lost"))
            await settle(self.session.flush())
            if finished:
                self.finish("stored")
            raise ValueError("broken verb")

    response = await serve(Handler)(method="POST")
    assert response.code == 500
    assert b"stored" not in response.body
    assert flavour.texts() == []


@pytest.mark.gen_test
async def test_should_commit_decides(flavour: Flavour, serve: Any) -> None:
    class Handler(flavour.Handler):
        def should_commit(self) -> bool:
            return bool(self.get_argument("commit") == "yes")

        @transactional
        async def post(self) -> None:
            self.session.add(Note(text=self.get_argument("commit")))
            self.set_status(409 if self.get_argument("commit") == "yes" else 200)

    fetch = serve(Handler)
    assert (await fetch("/?commit=yes", method="POST")).code == 409
    assert (await fetch("/?commit=no", method="POST")).code == 200
    assert flavour.texts() == ["yes"]


@pytest.mark.gen_test
async def test_transactional_methods_are_inherited(flavour: Flavour, serve: Any) -> None:
    class Base(flavour.Handler):
        transactional_methods = frozenset({"POST"})

    class Handler(Base):
        async def post(self) -> None:
            self.session.add(Note(text="kept"))

        async def put(self) -> None:
            self.session.add(Note(text="committed by hand"))
            await settle(self.session.commit())

    class Without(Handler):
        transactional_methods = frozenset()

        async def post(self) -> None:
            self.session.add(Note(text="by hand too"))
            await settle(self.session.commit())

    fetch = serve(Handler)
    assert (await fetch(method="POST")).code == 200
    assert (await fetch(method="PUT")).code == 200
    assert flavour.texts() == ["kept", "committed by hand"]
    assert Without._sa_transactions == {}


@pytest.mark.gen_test
async def test_joins_what_prepare_began(flavour: Flavour, serve: Any) -> None:
    class Handler(flavour.Handler):
        async def prepare(self) -> None:
            await settle(super().prepare())
            self.session.add(Note(text="of prepare"))
            await settle(self.session.flush())

        @transactional
        async def post(self) -> None:
            self.session.add(Note(text="of the verb"))

    assert (await serve(Handler)(method="POST")).code == 200
    assert flavour.texts() == ["of prepare", "of the verb"]


@pytest.mark.gen_test
async def test_outermost_only(flavour: Flavour, serve: Any) -> None:
    """``super().post()`` and ``self.post()`` in a verb are part of its transaction."""

    class Base(flavour.Handler):
        @transactional
        async def post(self) -> None:
            self.session.add(Note(text="inner"))

    class Handler(Base):
        @transactional
        async def post(self) -> None:
            await super().post()
            assert "inner" not in flavour.texts()
            self.session.add(Note(text="outer"))

        @transactional
        async def put(self) -> None:
            await Base.post(self)
            self.set_status(400)

    fetch = serve(Handler)
    assert (await fetch(method="POST")).code == 200
    assert (await fetch(method="PUT")).code == 400
    assert flavour.texts() == ["inner", "outer"]


@pytest.mark.gen_test
async def test_response_is_over_after_finish(flavour: Flavour, serve: Any) -> None:
    """A later write() or finish() fails as Tornado's do."""
    seen: list[str] = []

    class Handler(flavour.Handler):
        @transactional
        async def post(self) -> None:
            self.finish("stored")
            for late in (self.write, self.finish):
                with pytest.raises(RuntimeError) as raised:
                    late("late")
                seen.append(str(raised.value))
            self.session.add(Note(text="after finish"))

    class Bare(RequestHandler):
        async def post(self) -> None:
            self.finish("stored")
            for late in (self.write, self.finish):
                with pytest.raises(RuntimeError) as raised:
                    late("late")
                seen.append(str(raised.value))

    assert (await serve(Handler)(method="POST")).body == b"stored"
    assert flavour.texts() == ["after finish"]
    await serve(Bare, "/bare")("/bare", method="POST")


@pytest.mark.gen_test
async def test_flush_is_refused(flavour: Flavour, serve: Any, expected_log: list[str]) -> None:
    expected_log.append(UNCAUGHT)
    seen: list[str] = []

    class Handler(flavour.Handler):
        @transactional
        async def post(self) -> None:
            self.session.add(Note(text="lost"))
            self.write("a part")
            try:
                self.flush()
            except ConfigurationError as error:
                seen.append(str(error))
                raise

    assert (await serve(Handler)("/notes", method="POST")).code == 500
    assert seen[0].startswith("POST /notes: flush() would send a part of the response before")
    assert flavour.texts() == []


@pytest.mark.gen_test
async def test_verb_without_a_session(flavour: Flavour, serve: Any) -> None:
    class Handler(flavour.Handler):
        @transactional(retries=2)
        def post(self) -> None:
            self.write("nothing to store")

    assert (await serve(Handler)(method="POST")).body == b"nothing to store"


# -- isolation level ------------------------------------------------------------------


@only(*POSTGRESQL)
@pytest.mark.gen_test
async def test_isolation_level(flavour: Flavour, serve: Any) -> None:
    """A transaction that has only read is ended for it, and its objects stay readable."""
    level = text("SHOW transaction_isolation")

    class Handler(flavour.Handler):
        async def prepare(self) -> None:
            await settle(super().prepare())
            self.note = await settle(self.session.get(Note, 1))
            self.before = await settle(self.session.scalar(level))

        @transactional(isolation_level="SERIALIZABLE")
        async def post(self) -> None:
            self.write(f"{self.before}, {await settle(self.session.scalar(level))}")
            self.note.text = f"{self.note.text} anew"

    await flavour.in_scope(lambda session: session.add(Note(id=1, text="old")), commit=True)
    assert (await serve(Handler)(method="POST")).body == b"read committed, serializable"
    assert flavour.texts() == ["old anew"]


@pytest.mark.gen_test
async def test_isolation_level_after_work(
    flavour: Flavour, serve: Any, expected_log: list[str]
) -> None:
    expected_log.append("cannot begin while work waits for a COMMIT: 1 new Note")

    class Handler(flavour.Handler):
        def prepare(self) -> Any:
            self.session.add(Note(text="lost"))
            return super().prepare()

        def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
            app_log.error("%s", value)

        @transactional(isolation_level="SERIALIZABLE")
        async def post(self) -> None:
            raise AssertionError("not called")

    assert (await serve(Handler)(method="POST")).code == 500
    assert flavour.texts() == []


# -- retries --------------------------------------------------------------------------


@only(*POSTGRESQL)
@pytest.mark.gen_test(timeout=60)
async def test_concurrent_increments(flavour: Flavour, serve: Any, caplog: Any) -> None:
    """8 clients under SERIALIZABLE: no lost update, one body each, headers of prepare() kept."""
    await flavour.in_scope(lambda session: session.add(Note(id=1, text="0")), commit=True)

    class Handler(flavour.Handler):
        def prepare(self) -> Any:
            self.set_header("X-Prepared", "1")
            return super().prepare()

        @transactional(retries=50, isolation_level="SERIALIZABLE")
        async def post(self) -> None:
            note = await settle(self.session.get(Note, 1))
            self.write(f"[{note.text}]")
            await asyncio.sleep(0.001)
            note.text = str(int(note.text) + int(self.request.body))
            self.add_header("X-Verb", "1")
            self.set_cookie("verb", "1")

    fetch = serve(Handler)

    async def client() -> list[Any]:
        return [await fetch(method="POST", body="1") for _ in range(5)]

    responses = [r for done in await asyncio.gather(*(client() for _ in range(8))) for r in done]
    assert [response.code for response in responses] == [200] * 40
    assert sorted(int(r.body.strip(b"[]")) for r in responses) == list(range(40))
    for name in ("X-Prepared", "X-Verb", "Set-Cookie"):
        assert all(len(r.headers.get_list(name)) == 1 for r in responses)
    assert flavour.texts() == ["40"]
    retries = [r for r in caplog.records if r.levelname == "WARNING"]
    assert retries, "nothing collided"
    assert all("POST /: try " in r.getMessage() for r in retries)
    caplog.clear()


@only("aiomysql", "bridged_aiomysql", "asyncpg", "bridged_psycopg")
@pytest.mark.gen_test(timeout=20)
async def test_deadlock_is_retried(flavour: Flavour, serve: Any, expected_log: list[str]) -> None:
    """Two requests lock two rows in opposite order: the server ends one, and it runs again."""
    expected_log.append("try 1 of 3 failed")
    together = asyncio.Barrier(2)
    tries: list[str] = []

    class Handler(flavour.Handler):
        @transactional(retries=2)
        async def post(self, first: str, second: str) -> None:
            tries.append(first)
            for number in (first, second):
                change = update(Note).where(Note.id == int(number)).values(text=Note.text + first)
                await settle(self.session.execute(change))
                if len(tries) <= 2 and number == first:
                    await together.wait()

    def add(session: Any) -> None:
        session.add_all([Note(id=1, text=""), Note(id=2, text="")])

    await flavour.in_scope(add, commit=True)
    fetch = serve(Handler, r"/(\d)/(\d)")
    answers = await asyncio.gather(*(fetch(path, method="POST") for path in ("/1/2", "/2/1")))
    assert [answer.code for answer in answers] == [200, 200]
    assert len(tries) == 3
    assert [sorted(text) for text in flavour.texts()] == [["1", "2"], ["1", "2"]]


@only(*POSTGRESQL)
@pytest.mark.parametrize("retries", [0, 2])
@pytest.mark.gen_test
async def test_last_retry_is_answered_with_503(
    flavour: Flavour, serve: Any, expected_log: list[str], retries: int
) -> None:
    tries: list[int] = []
    fails = text("DO $$ BEGIN RAISE EXCEPTION 'no luck' USING ERRCODE = '40001'; END $$")

    class Handler(flavour.Handler):
        @transactional(retries=retries)
        async def post(self) -> None:
            tries.append(len(tries))
            self.set_cookie("verb", "1")
            self.session.add(Note(text="lost"))
            await settle(self.session.execute(fails))

    expected_log += [f"POST /: try {n} of {retries + 1} failed" for n in range(1, retries + 1)]
    expected_log.append("POST /: 503 Service Unavailable")
    response = await serve(Handler)(method="POST")
    assert (response.code, response.headers["Retry-After"]) == (503, "1")
    assert "Set-Cookie" not in response.headers
    assert len(tries) == retries + 1
    assert flavour.texts() == []


@only(*POSTGRESQL)
@pytest.mark.gen_test
async def test_objects_loaded_before_the_verb_stay_readable(
    flavour: Flavour, serve: Any, expected_log: list[str]
) -> None:
    expected_log.append("POST /: try 1 of 2 failed")
    fails = text("DO $$ BEGIN RAISE EXCEPTION 'no luck' USING ERRCODE = '40P01'; END $$")
    tries: list[str] = []

    class Handler(flavour.Handler):
        async def prepare(self) -> None:
            await settle(super().prepare())
            self.note = await settle(self.session.get(Note, 1))

        @transactional(retries=1)
        async def post(self) -> None:
            tries.append(self.note.text)
            self.note.text += "!"
            if len(tries) == 1:
                await settle(self.session.execute(fails))

    await flavour.in_scope(lambda session: session.add(Note(id=1, text="old")), commit=True)
    assert (await serve(Handler)(method="POST")).code == 200
    assert tries == ["old", "old"]
    assert flavour.texts() == ["old!"]


@only(*POSTGRESQL)
@pytest.mark.gen_test
async def test_no_retry_where_work_of_prepare_would_be_lost(
    flavour: Flavour, serve: Any, expected_log: list[str]
) -> None:
    expected_log.append("POST /: 503 Service Unavailable")
    fails = text("DO $$ BEGIN RAISE EXCEPTION 'no luck' USING ERRCODE = '40001'; END $$")
    tries: list[int] = []

    class Handler(flavour.Handler):
        def prepare(self) -> Any:
            self.session.add(Note(text="of prepare"))
            return super().prepare()

        @transactional(retries=3)
        async def post(self) -> None:
            tries.append(1)
            await settle(self.session.execute(fails))

    assert (await serve(Handler)(method="POST")).code == 503
    assert tries == [1]


@only("sqlite", "aiosqlite", "bridged_aiosqlite")
@pytest.mark.gen_test(timeout=30)
async def test_locked_sqlite_file_is_retried(
    flavour: Flavour, serve: Any, expected_log: list[str]
) -> None:
    expected_log.append("POST /: try 1 of 6 failed")
    locks = flavour.admin.connect()
    locks.execute(update(Note).values(text="locked"))
    tries: list[int] = []

    class Handler(flavour.Handler):
        @transactional(retries=5)
        async def post(self) -> None:
            await settle(self.session.execute(text("PRAGMA busy_timeout=1")))
            tries.append(1)
            if len(tries) == 2:
                locks.rollback()
            self.session.add(Note(text="kept"))

    assert (await serve(Handler)(method="POST")).code == 200
    locks.close()
    assert flavour.texts() == ["kept"]


# -- misuse ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retries": -1}, "retries=-1"),
        ({"retries": "3"}, "retries='3'"),
        ({"isolation_level": 3}, "isolation_level=3"),
        ({"isolation_level": "autocommit"}, "isolation_level='autocommit'"),
    ],
)
def test_wrong_options(options: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        transactional(**options)


def test_options_by_position() -> None:
    with pytest.raises(ConfigurationError, match="by name"):
        transactional(3)  # type: ignore[call-overload]  # the mistake at hand


@pytest.mark.parametrize("methods", ["POST", frozenset({"post"}), {"FETCH"}])
def test_wrong_transactional_methods(methods: Any) -> None:
    with pytest.raises(ConfigurationError, match="upper case"):
        type("Handler", (SessionHandler,), {"transactional_methods": methods})


def test_not_on_a_verb() -> None:
    with pytest.raises(ConfigurationError, match=r"Handler\.helper\(\) is no verb"):

        class Handler(SessionHandler):
            @transactional
            def helper(self) -> None: ...


def test_transactional_and_read_only() -> None:
    """A decorator counts for more than a name on the class; both of one kind are refused."""

    class Base(SessionHandler):
        transactional_methods = frozenset({"GET", "POST"})

    class Reads(Base):
        @read_only
        def get(self) -> None: ...

    assert set(Reads._sa_transactions) == {"POST"}
    assert set(Reads._sa_reading) == {"GET"}
    with pytest.raises(ConfigurationError, match="Named: POST cannot be transactional and read"):
        type("Named", (Base,), {"read_only_methods": frozenset({"POST"})})
    with pytest.raises(ConfigurationError, match="Marked: GET cannot be transactional and read"):

        class Marked(SessionHandler):
            @transactional
            @read_only
            def get(self) -> None: ...


@only("sqlite")
@pytest.mark.gen_test
async def test_not_in_a_foreign_handler(
    flavour: Flavour, serve: Any, expected_log: list[str]
) -> None:
    """Where nobody would commit, it is refused before anything is done."""
    expected_log += [UNCAUGHT] * 2

    class Handler(RequestHandler):
        @transactional
        def get(self) -> None:
            raise AssertionError("not called")

        @transactional
        async def post(self) -> None:
            raise AssertionError("not called")

        def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
            assert isinstance(value, ConfigurationError)
            super().log_exception(typ, value, tb)

    fetch = serve(Handler)
    assert (await fetch()).code == 500
    assert (await fetch(method="POST")).code == 500


@pytest.mark.gen_test
async def test_mixin_and_plain_verbs(flavour: Flavour, serve: Any) -> None:
    """A decorated verb of a plain mixin counts, and BaseHandler mixed in by hand works."""

    class Verbs:
        @transactional
        async def post(self: Any) -> None:
            self.session.add(Note(text="kept"))

    bases: Any = (Verbs, flavour.Handler)
    if flavour.Handler is SessionHandler:
        bases = (Verbs, BaseHandler, RequestHandler)
    Handler: Any = type("Handler", bases, {})
    assert (await serve(Handler)(method="POST")).code == 200
    assert flavour.texts() == ["kept"]


@pytest.mark.gen_test
async def test_http_error_in_the_verb(flavour: Flavour, serve: Any) -> None:
    class Handler(flavour.Handler):
        @transactional
        async def post(self) -> None:
            self.session.add(Note(text="lost"))
            raise HTTPError(404)

    assert (await serve(Handler)(method="POST")).code == 404
    assert flavour.texts() == []


@pytest.mark.gen_test
async def test_error_page_may_use_the_session(
    flavour: Flavour, serve: Any, expected_log: list[str]
) -> None:
    expected_log.append(UNCAUGHT)

    class Handler(flavour.Handler):
        def write_error(self, status_code: int, **kwargs: Any) -> None:
            error = kwargs["exc_info"][1]
            assert isinstance(error, IntegrityError)
            self.finish(f"sorry, {self.session.is_active}")

        @transactional
        async def post(self) -> None:
            self.session.add(Reply(note_id=-1))

    response = await serve(Handler)(method="POST")
    assert (response.code, response.body) == (500, b"sorry, True")


@pytest.mark.gen_test
async def test_error_page_may_show_what_was_loaded(
    flavour: Flavour, serve: Any, expected_log: list[str]
) -> None:
    """On an AsyncSession too, where nothing could be loaded again."""
    expected_log.append(UNCAUGHT)

    class Handler(flavour.Handler):
        async def prepare(self) -> None:
            await settle(super().prepare())
            self.note = await settle(self.session.get(Note, 1))

        def write_error(self, status_code: int, **kwargs: Any) -> None:
            self.finish(f"sorry, {self.note.text}")

        @transactional
        async def post(self) -> None:
            self.session.add(Reply(note_id=-1))

    await flavour.in_scope(lambda session: session.add(Note(id=1, text="Ada")), commit=True)
    response = await serve(Handler)(method="POST")
    assert (response.code, response.body) == (500, b"sorry, Ada")


# -- a client that goes away ----------------------------------------------------------


@pytest.mark.parametrize("cancels", [False, True])
@pytest.mark.gen_test
async def test_client_goes_away_while_the_verb_waits(
    flavour: Flavour, serve: Any, base_url: str, expected_log: list[str], cancels: bool
) -> None:
    """The verb runs to its end and commits; with cancel_on_disconnect it is rolled back."""
    waits, goes_on = asyncio.Event(), asyncio.Event()

    class Handler(flavour.Handler):
        cancel_on_disconnect = cancels

        @transactional
        async def post(self) -> None:
            self.session.add(Note(text="whole"))
            await settle(self.session.flush())
            self.finish("stored")
            waits.set()
            await goes_on.wait()

    serve(Handler)
    if cancels:
        expected_log += CANCELLED_LOG
    async with RawClient(base_url) as client:
        await client.send("POST / HTTP/1.1\nHost: x\nContent-Length: 0")
        await waits.wait()
        client.vanish()
        if not cancels:
            await asyncio.sleep(0.02)
            goes_on.set()
        await until(lambda: flavour.checked_out() == 0)
    assert flavour.texts() == ([] if cancels else ["whole"])


@pytest.mark.gen_test
async def test_cancelled_verb_leaves_nothing_of_its_success(
    flavour: Flavour, serve: Any, expected_log: list[str]
) -> None:
    expected_log += CANCELLED_LOG

    class Handler(flavour.Handler):
        @transactional
        async def post(self) -> None:
            self.session.add(Note(text="lost"))
            await settle(self.session.flush())
            self.set_cookie("stored", "1")
            self.finish("stored")
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(0)

    response = await serve(Handler)(method="POST")
    assert response.code == 500
    assert b"stored" not in response.body
    assert "Set-Cookie" not in response.headers
    await until(lambda: flavour.checked_out() == 0)
    assert flavour.texts() == []


SLOW_COMMIT = """
CREATE OR REPLACE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql
AS $$ BEGIN PERFORM pg_sleep(0.2); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON note DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW EXECUTE FUNCTION slow()
"""


@only("asyncpg", "psycopg_async", "bridged_asyncpg", "bridged_psycopg")
@pytest.mark.gen_test
async def test_client_goes_away_during_the_commit(
    flavour: Flavour, serve: Any, base_url: str
) -> None:
    """A COMMIT is not cancelled: nobody could tell its outcome."""
    over = asyncio.Event()

    class Handler(flavour.Handler):
        cancel_on_disconnect = True

        @transactional
        async def post(self) -> None:
            self.session.add(Note(text="whole"))
            await settle(self.session.flush())

        def on_finish(self) -> None:
            over.set()

    serve(Handler)
    with flavour.admin.begin() as connection:
        connection.execute(text(SLOW_COMMIT))
    try:
        async with RawClient(base_url) as client:
            await client.send("POST / HTTP/1.1\nHost: x\nContent-Length: 0")
            await asyncio.sleep(0.1)  # half of the COMMIT
            assert flavour.texts() == []
            client.vanish()
            await asyncio.wait_for(over.wait(), 5)
        assert flavour.texts() == ["whole"]
    finally:
        with flavour.admin.begin() as connection:
            connection.execute(text("DROP TRIGGER slow ON note"))


# -- many at once ---------------------------------------------------------------------

# TORNADO_SA_REQUESTS=10000 for the whole truth.
REQUESTS = int(os.environ.get("TORNADO_SA_REQUESTS", "300"))


@pytest.mark.gen_test(timeout=600)
async def test_no_wrong_answer(flavour: Flavour, serve: Any) -> None:
    """A third fails at COMMIT, 32 at once. Who reads right after a 2xx finds the row."""

    class Handler(flavour.Handler):
        @transactional
        async def post(self, number: str) -> None:
            self.session.add(Note(id=int(number), text=number))
            if int(number) % 3 == 0:
                self.session.add(Reply(note_id=-1))
            at_end(self, WAYS[int(number) % len(WAYS)])

        async def get(self, number: str) -> None:
            note = await settle(self.session.get(Note, int(number)))
            self.write(note.text if note else "none")

        def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
            assert isinstance(value, IntegrityError)

    fetch = serve(Handler, r"/(\d+)")
    numbers = iter(range(1, REQUESTS + 1))
    wrong: list[Any] = []

    async def client() -> None:
        for number in numbers:
            stored = await fetch(f"/{number}", method="POST", follow_redirects=False)
            found = (await fetch(f"/{number}")).body.decode()
            expected = (500, "none") if number % 3 == 0 else (stored.code, str(number))
            if (stored.code, found) != expected or stored.code not in (200, 302, 500):
                wrong.append((number, stored.code, found))

    await asyncio.gather(*(client() for _ in range(32)))
    assert wrong == []
    assert len(flavour.texts()) == REQUESTS - REQUESTS // 3
