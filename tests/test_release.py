"""Connections that are held, and given back: release(), hold_warning, a pool that is too small."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from sqlalchemy import insert, select
from tornado import gen

from tests.support import ASYNC, SYNC, Flavour, Note, make_database, only, settle, until
from tornado_sa import ScopeClosed, UncommittedChanges


async def one_note(flavour: Flavour) -> None:
    await flavour.in_scope(lambda session: session.add(Note(id=10**6, text="one")), commit=True)


@pytest.mark.gen_test
async def test_release_gives_the_connection_back(flavour: Flavour, serve: Any) -> None:
    """The session goes on: what was loaded stays loaded, and the next query connects again."""
    await one_note(flavour)

    class Handler(flavour.Handler):
        async def get(self) -> None:
            await self.release()  # nothing yet
            note = await settle(self.session.get(Note, 10**6))
            session = self.session
            assert flavour.checked_out() == 1
            await self.release()
            assert flavour.checked_out() == 0
            assert note.text == "one" and self.session is session
            assert await settle(self.session.get(Note, 10**6)) is note
            await settle(self.session.execute(select(Note)))
            assert flavour.checked_out() == 1

    assert (await serve(Handler)()).code == 200


@pytest.mark.gen_test
async def test_release_expires_nothing(flavour: Flavour, serve: Any) -> None:
    """Also where a COMMIT would."""
    await one_note(flavour)
    url = flavour.db.engine.url.render_as_string(hide_password=False)
    db = make_database(flavour.name, url, session_options={"expire_on_commit": True})

    class Handler(flavour.Handler):
        database = db

        async def get(self) -> None:
            note = await settle(self.session.get(Note, 10**6))
            await self.release()
            self.write(note.__dict__["text"])

    assert (await serve(Handler)()).body == b"one"
    await settle(db.dispose())


@pytest.mark.parametrize("work", ["added", "flushed", "changed", "by Core"])
@pytest.mark.gen_test
async def test_release_loses_no_work(flavour: Flavour, serve: Any, work: str) -> None:
    await one_note(flavour)

    class Handler(flavour.Handler):
        async def post(self) -> None:
            note = await settle(self.session.get(Note, 10**6))
            if work == "changed":
                note.text = "two"
            elif work == "by Core":
                await settle(self.session.execute(insert(Note).values(text="two")))
            else:
                self.session.add(Note(text="two"))
            if work == "flushed":
                await settle(self.session.flush())
            with pytest.raises(UncommittedChanges, match=r"POST /notes.*(Note|note).*commit\(\)"):
                await self.release()
            await settle(self.session.commit())
            await self.release()

    assert (await serve(Handler)("/notes", method="POST")).code == 200
    assert "two" in flavour.texts()


@only(*SYNC, "bridged_aiosqlite", "bridged_asyncpg", "bridged_psycopg")
@pytest.mark.gen_test
async def test_release_in_a_plain_verb(flavour: Flavour, serve: Any) -> None:
    """A plain session lets go at once: there is nothing to wait for."""
    await one_note(flavour)

    class Handler(flavour.Handler):
        def get(self) -> None:
            self.session.get(Note, 10**6)
            self.release()
            assert flavour.checked_out() == 0

    assert (await serve(Handler)()).code == 200


@pytest.mark.gen_test
async def test_release_in_a_generator_and_after_the_end(flavour: Flavour, serve: Any) -> None:
    await one_note(flavour)

    class Handler(flavour.Handler):
        @gen.coroutine
        def get(self) -> Any:
            result = self.session.get(Note, 10**6)
            if flavour.is_async and not flavour.is_bridged:
                yield result
            yield gen.moment
            assert flavour.checked_out() == 1
            yield self.release()
            assert flavour.checked_out() == 0
            self.finish()
            with pytest.raises(ScopeClosed):
                self.release()

    assert (await serve(Handler)()).code == 200


@pytest.mark.gen_test
async def test_long_hold_is_named(flavour: Flavour, serve: Any, expected_log: list[str]) -> None:
    url = flavour.db.engine.url.render_as_string(hide_password=False)
    db = make_database(flavour.name, url, hold_warning=0.2)

    class Handler(flavour.Handler):
        database = db

        async def get(self) -> None:
            await settle(self.session.execute(select(1)))
            await asyncio.sleep(0.3)

        async def post(self) -> None:
            await settle(self.session.execute(select(1)))
            await self.release()
            await asyncio.sleep(0.3)

    fetch = serve(Handler)
    expected_log.append("GET /held held a connection for 0.3 s, 0.0 s of it in SQL; first used at")
    assert (await fetch("/held")).code == 200
    assert (await fetch("/released", method="POST")).code == 200
    pool: Any = db.engine.pool
    await until(lambda: pool.checkedout() == 0)
    await settle(db.dispose())


@only(*SYNC)
@pytest.mark.gen_test
async def test_plain_session_never_waits_on_the_loop(
    flavour: Flavour, serve: Any, expected_log: list[str]
) -> None:
    """Row 21: who gets no connection is answered 503 at once; in a thread it may wait."""
    url = flavour.db.engine.url.render_as_string(hide_password=False)
    options = {"pool_size": 2, "max_overflow": 0}
    db = make_database(flavour.name, url, engine_options=options)

    class Handler(flavour.Handler):
        database = db

        async def get(self) -> None:
            self.session.execute(select(1))
            await asyncio.sleep(0.05)

        async def post(self) -> None:
            await db.to_thread(lambda: db.session.execute(select(1)))

    fetch = serve(Handler)
    began = time.monotonic()
    answers = await asyncio.gather(*(fetch() for _ in range(16)))
    assert time.monotonic() - began < 10
    codes = [answer.code for answer in answers]
    assert codes.count(200) >= 2 and codes.count(503) == 16 - codes.count(200) > 0
    assert all(answer.headers["Retry-After"] for answer in answers if answer.code == 503)
    expected_log += ["GET /: 503 Service Unavailable: TimeoutError"] * codes.count(503)
    answers = await asyncio.gather(*(fetch(method="POST") for _ in range(16)))
    assert [answer.code for answer in answers] == [200] * 16
    db.dispose()


@only(*ASYNC, "bridged_asyncpg")
@pytest.mark.gen_test
async def test_waiting_is_shown(flavour: Flavour) -> None:
    url = flavour.db.engine.url.render_as_string(hide_password=False)
    options = {"pool_size": 1, "max_overflow": 0}
    db = make_database(flavour.name, url, engine_options=options)

    async def query() -> None:
        async with db.scope() as session:
            await session.execute(select(1))

    async with db.scope() as session:
        await session.execute(select(1))
        waiting = [asyncio.create_task(query()) for _ in range(3)]
        await until(lambda: db.status().waiting == 3)
    await asyncio.gather(*waiting)
    assert (db.status().waiting, db.status().checked_out) == (0, 0)
    await db.dispose()
