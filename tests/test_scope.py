"""Scopes as objects, as blocks and as decorators: scripts, jobs and threads."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session
from tornado import gen

from tests.support import Flavour, Note, Reply, only, settle
from tornado_sa import (
    ConfigurationError,
    NoActiveScope,
    Scope,
    ScopeClosed,
    TornadoSAError,
    current_scope,
)

sync_only = only("sqlite", "psycopg")
async_only = only("aiosqlite", "asyncpg", "psycopg_async")


def test_no_scope_says_what_to_write(flavour: Flavour) -> None:
    with pytest.raises(NoActiveScope, match=r"with db\.scope\(\) as session"):
        current_scope()
    with pytest.raises(NoActiveScope):
        flavour.db.session()


@pytest.mark.gen_test
async def test_begin_commits_and_scope_rolls_back(flavour: Flavour) -> None:
    await flavour.in_scope(lambda session: session.add(Note(text="committed")), commit=True)
    await flavour.in_scope(lambda session: session.add(Note(text="rolled back")))
    assert flavour.texts() == ["committed"]


@pytest.mark.gen_test
async def test_begin_rolls_back_on_an_exception(flavour: Flavour) -> None:
    async def add_and_fail(session: Any) -> None:
        session.add(Note(text="lost"))
        await settle(session.flush())
        raise ValueError("after the flush")

    with pytest.raises(ValueError, match="after the flush"):
        await flavour.in_scope(add_and_fail, commit=True)
    assert flavour.texts() == []


@pytest.mark.gen_test
async def test_failed_commit_of_a_block_leaves_nothing(flavour: Flavour) -> None:
    with pytest.raises(Exception, match=r"(?i)foreign key"):
        await flavour.in_scope(lambda session: session.add(Reply(note_id=404)), commit=True)
    result = await flavour.in_scope(lambda session: session.scalars(select(Reply)))
    assert result.all() == []


@sync_only
def test_db_session_inside_begin_is_the_same_session(flavour: Flavour) -> None:
    """Question 1: with sessionmaker.begin() and a separate scoped_session, it is not."""
    with flavour.db.begin() as session:
        assert flavour.db.session() is session
        assert isinstance(session, Session)
        assert session.query(Note).all() == []
        with flavour.db.scope() as inner:  # always a new scope
            assert inner is not session
            assert flavour.db.session() is inner
        assert flavour.db.session() is session
    with pytest.raises(NoActiveScope):
        flavour.db.session()


@async_only
@pytest.mark.gen_test
async def test_db_session_inside_async_begin(flavour: Flavour) -> None:
    async with flavour.db.begin() as session:
        assert flavour.db.session() is session
        async with flavour.db.scope() as inner:
            assert inner is not session
        assert flavour.db.session() is session


@pytest.mark.gen_test
async def test_objects_stay_readable_after_their_scope(flavour: Flavour) -> None:
    async def read(session: Any) -> Any:
        session.add(Note(text="read me"))
        await settle(session.flush())
        return (await settle(session.scalars(select(Note)))).one()

    note = await flavour.in_scope(read)  # rolled back, which would expire it
    assert note.text == "read me"


@sync_only
def test_label_of_a_block_is_its_place_or_its_function(flavour: Flavour) -> None:
    @flavour.db.scope()
    def job() -> str:
        return current_scope().label

    @flavour.db.scope("named")
    def named() -> str:
        return current_scope().label

    with flavour.db.scope():
        assert current_scope().label.startswith("tests.test_scope:")
    with flavour.db.scope("nightly"):
        assert current_scope().label == "nightly"
    assert job().endswith("test_label_of_a_block_is_its_place_or_its_function.<locals>.job")
    assert named() == "named"


@async_only
@pytest.mark.gen_test
async def test_label_of_an_async_block(flavour: Flavour) -> None:
    async with flavour.db.scope():
        assert current_scope().label.startswith("tests.test_scope:")


@sync_only
@pytest.mark.gen_test
async def test_decorated_functions_of_every_kind(flavour: Flavour) -> None:
    sessions = []

    @flavour.db.begin()
    def plain(text: str) -> None:
        flavour.db.session.add(Note(text=text))
        sessions.append(flavour.db.session())

    @flavour.db.begin()
    async def native(text: str) -> None:
        await asyncio.sleep(0)
        plain.__wrapped__(text)

    @flavour.db.begin()
    @gen.coroutine
    def generator(text: str) -> Any:
        yield gen.moment
        plain.__wrapped__(text)

    plain("plain")
    plain("again")
    await native("native")
    await generator("generator")
    assert flavour.texts() == ["plain", "again", "native", "generator"]
    assert len({id(session) for session in sessions}) == 4


@async_only
@pytest.mark.gen_test
async def test_decorated_coroutine_functions(flavour: Flavour) -> None:
    @flavour.db.begin()
    async def native(text: str) -> None:
        flavour.db.session.add(Note(text=text))
        await flavour.db.session.flush()

    await asyncio.gather(native("one"), native("two"))
    assert sorted(flavour.texts()) == ["one", "two"]


@async_only
def test_plain_function_cannot_be_decorated_with_an_async_scope(flavour: Flavour) -> None:
    with pytest.raises(ConfigurationError, match="async def"):

        @flavour.db.scope()
        def plain() -> None: ...


def test_generator_cannot_be_decorated(flavour: Flavour) -> None:
    with pytest.raises(ConfigurationError, match="generator"):

        @flavour.db.scope()
        def rows() -> Any:
            yield


@sync_only
def test_an_open_block_cannot_be_entered_again(flavour: Flavour) -> None:
    block = flavour.db.scope("once")
    with block, pytest.raises(TornadoSAError, match="'once' is open already"), block:
        pass


@pytest.mark.gen_test
async def test_remove_is_harmless_everywhere(flavour: Flavour) -> None:
    """The idiom of scoped_session, from applications that come to us with it."""
    await settle(flavour.db.session.remove())

    async def use_after_remove(session: Any) -> None:
        await settle(session.execute(select(1)))
        await settle(flavour.db.session.remove())
        assert flavour.db.session() is not session
        await settle(flavour.db.session.execute(select(1)))

    await flavour.in_scope(use_after_remove)


@sync_only
def test_session_options_for_one_scope(flavour: Flavour) -> None:
    with flavour.db.scope():
        flavour.db.session.remove()
        session = flavour.db.session(autoflush=False)
        assert session.autoflush is False
        assert flavour.db.session() is session
    assert flavour.db.status().open_scopes == []


@sync_only
def test_scope_that_ends_in_another_context(flavour: Flavour) -> None:
    """A fixture may be finished in another context than the one it began in."""
    block = flavour.db.scope()
    context = contextvars.copy_context()
    session = context.run(block.__enter__)
    session.execute(select(1))
    block.__exit__(None, None, None)
    with pytest.raises(ScopeClosed):
        context.run(flavour.db.session)


@sync_only
def test_threads_of_one_scope_get_one_session(flavour: Flavour) -> None:
    sessions: list[Any] = []
    together = threading.Barrier(8)

    def use() -> None:
        together.wait()
        sessions.append(flavour.db.session())

    with flavour.db.scope() as mine:
        contexts = [contextvars.copy_context() for _ in range(8)]
        threads = [threading.Thread(target=context.run, args=(use,)) for context in contexts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {id(session) for session in sessions} == {id(mine)}


@sync_only
def test_thread_cannot_slip_a_session_into_a_scope_that_ends(flavour: Flavour) -> None:
    """Whoever comes too late gets ScopeClosed; no session is left open, however they race."""

    def use(scope: Scope, opened: list[Any]) -> None:
        with contextlib.suppress(ScopeClosed):
            opened.append(flavour.db.session_in(scope))

    for _ in range(200):
        scope, opened = Scope("race"), list[Any]()
        late = threading.Thread(target=use, args=(scope, opened))
        late.start()
        scope.end()
        late.join()
        with pytest.raises(ScopeClosed):
            flavour.db.session_in(scope)
        for session in opened:
            with pytest.raises(Exception, match="permanently closed"):
                session.execute(select(1))


@async_only
@pytest.mark.gen_test
async def test_cancelled_block_gives_its_connection_back(flavour: Flavour) -> None:
    entered = asyncio.Event()

    async def job() -> None:
        async with flavour.db.begin() as session:
            session.add(Note(text="lost"))
            await session.flush()
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(job())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert flavour.checked_out() == 0
    assert flavour.texts() == []


@async_only
@pytest.mark.gen_test
async def test_block_of_a_coroutine_that_is_closed(flavour: Flavour) -> None:
    """As the garbage collector does it: a GeneratorExit, in another context."""
    entered = asyncio.Event()

    async def job() -> None:
        async with flavour.db.scope() as session:
            await session.execute(select(1))
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(job())
    await entered.wait()
    coroutine: Any = task.get_coro()
    contextvars.copy_context().run(coroutine.close)
    assert flavour.db.status().open_scopes == []
    task.cancel()
    with pytest.raises(RuntimeError, match="cannot reuse"):
        await task


@pytest.mark.gen_test
async def test_remove_and_no_further_use(flavour: Flavour) -> None:
    async def remove(session: Any) -> None:
        await settle(session.execute(select(1)))
        await settle(flavour.db.session.remove())

    await flavour.in_scope(remove)
    assert flavour.db.status().open_scopes == []


@sync_only
def test_session_that_cannot_be_made(flavour: Flavour) -> None:
    def fail(**options: Any) -> Any:
        raise LookupError("no tenant")

    flavour.db._make_session = fail
    with pytest.raises(LookupError), flavour.db.scope():
        pass
    assert flavour.db.status().open_scopes == []
