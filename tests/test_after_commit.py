"""after_commit: what is done once a COMMIT has made it true."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import insert, select
from tornado.web import RequestHandler

from tests.support import Flavour, Note, Reply, only, settle, until, with_options
from tornado_sa import (
    BaseHandler,
    Database,
    NoActiveScope,
    ScopeClosed,
    transactional,
)


async def begin(flavour: Flavour, function: Any) -> None:
    """Run ``function(session)`` in ``db.begin()``."""
    await flavour.in_scope(function, commit=True)


@pytest.mark.parametrize("kind", ["def", "async def"])
@pytest.mark.gen_test
async def test_after_the_commit_and_the_response(flavour: Flavour, serve: Any, kind: str) -> None:
    """And outside the scope of the request: it takes one of its own."""
    seen: list[Any] = []
    handlers: list[Any] = []

    def look(word: str, *, more: str) -> None:
        handler = handlers.pop()
        seen.append((word, more, handler._finished, flavour.texts()))
        with pytest.raises(NoActiveScope):
            flavour.session()

    async def look_and_write(word: str, *, more: str) -> None:
        look(word, more=more)
        await asyncio.sleep(0.001)
        await begin(flavour, lambda session: session.add(Note(text="of the callback")))

    class Handler(flavour.Handler):
        @transactional
        async def post(self) -> None:
            handlers.append(self)
            self.session.add(Note(text="kept"))
            self.after_commit(look if kind == "def" else look_and_write, "word", more="m")
            self.write("stored")

    assert (await serve(Handler)(method="POST")).body == b"stored"
    await until(lambda: seen)
    assert seen == [("word", "m", True, ["kept"])]
    if kind == "async def":
        await until(lambda: flavour.texts() == ["kept", "of the callback"])


@pytest.mark.parametrize("why", ["exception", "status", "failed commit", "rollback"])
@pytest.mark.gen_test
async def test_dropped_on_rollback(
    flavour: Flavour, serve: Any, expected_log: list[str], why: str
) -> None:
    seen: list[str] = []
    if why in ("exception", "failed commit"):
        expected_log.append("Uncaught exception")

    class Handler(flavour.Handler):
        @transactional
        async def post(self) -> None:
            self.session.add(Note(text="lost"))
            self.after_commit(seen.append, "made")
            if why == "exception":
                raise ValueError
            elif why == "status":
                self.set_status(400)
            elif why == "failed commit":
                self.session.add(Reply(note_id=-1))
            else:
                await settle(self.session.flush())
                await settle(self.session.rollback())

    await serve(Handler)(method="POST")
    await asyncio.sleep(0.02)
    assert seen == []
    assert flavour.texts() == []


@pytest.mark.gen_test
async def test_savepoint_takes_its_own_with_it(flavour: Flavour) -> None:
    """Calls that were asked for in a savepoint that is rolled back, and only those, are dropped."""
    seen: list[str] = []

    def work(session: Any) -> Any:
        plain = getattr(session, "sync_session", session)
        flavour.db.after_commit(seen.append, "outer")

        def inner(session: Any) -> None:
            with session.begin_nested() as savepoint:
                flavour.db.after_commit(seen.append, "rolled back")
                with session.begin_nested():
                    flavour.db.after_commit(seen.append, "released, then rolled back")
                savepoint.rollback()
            with session.begin_nested():
                flavour.db.after_commit(seen.append, "released")
            assert seen == []

        return flavour.db.run_sync(inner) if flavour.is_async else inner(plain)

    await begin(flavour, work)
    await until(lambda: len(seen) == 2)
    assert seen == ["outer", "released"]


@pytest.mark.gen_test
async def test_commit_by_hand(flavour: Flavour, serve: Any) -> None:
    """A COMMIT by hand counts; what comes after it waits for the next one."""
    seen: list[str] = []

    class Handler(flavour.Handler):
        async def post(self) -> None:
            self.session.add(Note(text="kept"))
            self.after_commit(seen.append, "kept")
            await settle(self.session.commit())
            assert seen == []
            self.session.add(Note(text="lost"))
            flavour.db.after_commit(seen.append, "lost")
            await settle(self.session.rollback())

    assert (await serve(Handler)(method="POST")).code == 200
    await until(lambda: seen)
    await asyncio.sleep(0.01)
    assert seen == ["kept"]


@pytest.mark.gen_test
async def test_release_is_no_commit(flavour: Flavour, serve: Any) -> None:
    """release() and a new isolation level end a transaction that has only read."""
    seen: list[str] = []

    class Handler(flavour.Handler):
        async def prepare(self) -> None:
            await settle(super().prepare())
            self.after_commit(seen.append, self.request.method)
            await settle(self.session.execute(select(Note)))
            await self.release()

        @transactional(isolation_level="SERIALIZABLE")
        async def post(self) -> None:
            self.set_status(400)

        @transactional(isolation_level="SERIALIZABLE")
        async def put(self) -> None:
            assert seen == []

    fetch = serve(Handler)
    assert (await fetch(method="POST")).code == 400
    assert (await fetch(method="PUT")).code == 200
    await until(lambda: seen)
    await asyncio.sleep(0.01)
    assert seen == ["PUT"]


@pytest.mark.gen_test
async def test_failures_are_logged_and_stop_nothing(
    flavour: Flavour, serve: Any, expected_log: list[str]
) -> None:
    seen: list[str] = []

    def fail() -> None:
        raise ValueError("broken callback")

    async def fail_later() -> None:
        await asyncio.sleep(0)
        raise ValueError("broken callback")

    class Mailer(flavour.Handler):
        @transactional
        async def post(self) -> None:
            for function in (fail, fail_later):
                self.after_commit(function)
            self.after_commit(seen.append, "made")

    name = "Mailer, POST /mail: after_commit(test_failures_are_logged_and_stop_nothing.<locals>."
    expected_log += [f"{name}fail) failed", f"{name}fail_later) failed"]
    assert (await serve(Mailer)("/mail", method="POST")).code == 200
    await until(lambda: seen)


@pytest.mark.gen_test
async def test_dispose_waits(flavour: Flavour, expected_log: list[str]) -> None:
    seen: list[str] = []

    async def slow() -> None:
        await asyncio.sleep(0.05)
        seen.append("made")

    await begin(flavour, lambda session: flavour.db.after_commit(slow))
    assert seen == []
    if isinstance(flavour.db, Database):  # it never waits for coroutines of its own loop
        expected_log.append("is disposed of while still at work: after_commit of ")
    await flavour.dispose()
    if flavour.is_async:
        assert seen == ["made"]
    await until(lambda: seen)


@pytest.mark.gen_test
async def test_not_without_a_scope(flavour: Flavour, serve: Any) -> None:
    with pytest.raises(NoActiveScope):
        flavour.db.after_commit(print)
    kept: list[Any] = []

    class Handler(flavour.Handler):
        async def get(self) -> None:
            kept.append(self)

    assert (await serve(Handler)()).code == 200
    with pytest.raises(ScopeClosed, match="GET /"):
        kept.pop().after_commit(print)


@only("sqlite")
def test_script_without_a_loop(flavour: Flavour, expected_log: list[str]) -> None:
    """Plain functions need none; a coroutine without one is an error in the log."""
    seen: list[str] = []

    async def never() -> None:
        raise AssertionError("called")

    with flavour.db.begin("script") as session:
        session.add(Note(text="kept"))
        flavour.db.after_commit(never)
        flavour.db.after_commit(seen.append, "made")
    assert seen == ["made"]
    expected_log.append("script: after_commit(test_script_without_a_loop.<locals>.never) failed")


# -- a response that leaves work uncommitted ------------------------------------------


def leaves_work(flavour: Flavour) -> Any:
    class Leaves(flavour.Handler):
        async def get(self) -> None:
            self.session.add_all([Note(text="lost"), Note(text="lost")])
            if self.get_argument("flush", ""):
                await settle(self.session.flush())
            self.write("fine")

        async def put(self) -> None:
            await settle(self.session.execute(insert(Note).values(text="lost")))
            self.finish("fine")

        async def post(self) -> None:
            (await settle(self.session.get(Note, 1))).text = "changed"
            self.redirect("/elsewhere")

        async def delete(self) -> None:
            self.session.add(Note(text="lost"))
            self.set_status(400)

    return Leaves


@pytest.mark.gen_test
async def test_uncommitted_changes_are_named(
    flavour: Flavour, serve: Any, expected_log: list[str]
) -> None:
    await begin(flavour, lambda session: session.add(Note(id=1, text="old")))
    fetch = serve(leaves_work(flavour))
    work = "answers 200 and leaves work uncommitted:"
    expected_log += [
        f"Leaves, GET /pending {work} 2 new Note. Commit it before the response",
        f"Leaves, GET /flushed {work} 2 new Note.",
        f"Leaves, PUT /core {work} INSERT into note by Core.",
        "Leaves, POST /dirty answers 302 and leaves work uncommitted: 1 dirty Note.",
    ]
    assert (await fetch("/pending")).body == b"fine"
    assert (await fetch("/flushed?flush=1")).body == b"fine"
    assert (await fetch("/core", method="PUT")).body == b"fine"
    assert (await fetch("/dirty", method="POST", follow_redirects=False)).code == 302
    assert (await fetch("/error", method="DELETE")).code == 400
    assert flavour.texts() == ["old"]


@pytest.mark.gen_test
@with_options(debug=True)
async def test_uncommitted_changes_with_debug(
    flavour: Flavour, serve: Any, expected_log: list[str]
) -> None:
    await begin(flavour, lambda session: session.add(Note(id=1, text="old")))
    fetch = serve(leaves_work(flavour))
    expected_log += ["Uncaught exception"] * 4
    for path, method in (("/", "GET"), ("/?flush=1", "GET"), ("/", "PUT"), ("/", "POST")):
        response = await fetch(path, method=method, follow_redirects=False)
        assert response.code == 500
        assert b"fine" not in response.body
        assert "Location" not in response.headers
    assert (await fetch("/", method="DELETE")).code == 400
    assert flavour.texts() == ["old"]


@only("sqlite")
@pytest.mark.gen_test
async def test_a_bare_handler_is_none_of_our_business(flavour: Flavour, serve: Any) -> None:
    """The check is about the sessions of the request, not about those made by hand."""
    by_hand = flavour.db.sessionmaker()

    class Handler(BaseHandler, RequestHandler):
        def get(self) -> None:
            by_hand.add(Note(text="not of this request"))
            self.session.get(Note, 1)

    assert (await serve(Handler)()).code == 200
    by_hand.close()
