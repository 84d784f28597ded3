"""Isolation: what is committed in a test, by handlers and by the test, is gone after it."""

from __future__ import annotations

import asyncio
import gc
import inspect
import re
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, func, select, text
from sqlalchemy.exc import (
    DBAPIError,
    IntegrityError,
    InvalidRequestError,
    OperationalError,
    SAWarning,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from tornado import gen
from tornado.web import Application
from tornado.websocket import websocket_connect

from tests.support import (
    ASYNC,
    BRIDGED,
    CANCELLED_LOG,
    MARIADB,
    SYNC,
    Base,
    Flavour,
    Note,
    RawClient,
    Reply,
    only,
    settle,
    until,
)
from tornado_sa import (
    AsyncDatabase,
    AsyncSessionWebSocketHandler,
    ConfigurationError,
    Database,
    ReadOnlyViolation,
    Scope,
    SessionWebSocketHandler,
    TornadoSAError,
    read_only,
    transactional,
)
from tornado_sa.testing import Isolation, count_queries, isolated
from tornado_sa.testing.session import IsolatedSession

everywhere = only(*SYNC, *ASYNC, *BRIDGED, *MARIADB)


@asynccontextmanager
async def isolation(flavour: Flavour, **options: Any) -> AsyncIterator[Isolation]:
    """``isolated(db)``, with the kind of `with` that the database wants."""
    if flavour.is_async:
        async with isolated(flavour.db, **options) as entered:
            yield entered
    else:
        with isolated(flavour.db, **options) as entered:
            yield entered


async def count(flavour: Flavour) -> int:
    found: int = await flavour.in_scope(lambda session: session.scalar(select(func.count(Note.id))))
    return found


@everywhere
@pytest.mark.gen_test
async def test_what_a_handler_commits_is_gone(flavour: Flavour, serve: Any) -> None:
    class Handler(flavour.Handler):
        @transactional
        async def post(self) -> None:
            self.session.add(Note(text="handler"))

    fetch = serve(Handler)
    for _ in range(2):  # entering again works
        async with isolation(flavour):
            assert (await fetch(method="POST")).code == 200
            await flavour.in_scope(lambda session: session.add(Note(text="test")), commit=True)
            assert await count(flavour) == 2
            assert flavour.texts() == []
        assert flavour.texts() == []
        assert await count(flavour) == 0
    assert (await fetch(method="POST")).code == 200
    assert flavour.texts() == ["handler"]


@everywhere
@pytest.mark.gen_test
async def test_a_request_that_fails_undoes_its_own_work_only(
    flavour: Flavour, serve: Any, expected_log: list[str]
) -> None:
    class Handler(flavour.Handler):
        @transactional
        async def post(self) -> None:
            self.session.add(Note(text="x"))
            await settle(self.session.flush())
            if self.get_argument("fail", None):
                self.send_error(400)

    fetch = serve(Handler)
    async with isolation(flavour):
        assert (await fetch(method="POST")).code == 200
        assert (await fetch("/?fail=1", method="POST")).code == 400
        assert await count(flavour) == 1
        assert (await fetch(method="POST")).code == 200
        assert await count(flavour) == 2
    assert flavour.texts() == []


@everywhere
@pytest.mark.gen_test
async def test_concurrent_requests_take_turns(flavour: Flavour, serve: Any) -> None:
    class Handler(flavour.Handler):
        async def post(self) -> None:
            self.session.add(Note(text="x"))
            await settle(self.session.flush())
            await gen.sleep(0.001)
            await settle(self.session.commit())

    fetch = serve(Handler)
    async with isolation(flavour):
        answers = await gen.multi([fetch(method="POST") for _ in range(8)])
        assert [answer.code for answer in answers] == [200] * 8
        assert await count(flavour) == 8
    assert flavour.texts() == []


# -- what a COMMIT does ----------------------------------------------------------------------------


async def dump(flavour: Flavour) -> bytes:
    """The database, byte for byte. PostgreSQL never rolls sequences back: without those."""
    if flavour.dialect == "sqlite":
        file = Path(flavour.sync_engine.url.database or "")
        logs = [Path(f"{file}{end}") for end in ("-wal", "-journal")]
        return b"".join(one.read_bytes() for one in [file, *logs] if one.exists())
    url = flavour.sync_engine.url
    plain = url.set(drivername=url.get_backend_name()).render_as_string(hide_password=False)
    process = await asyncio.create_subprocess_exec(
        "pg_dump", "--inserts", plain, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    unstable = rb"^(SELECT pg_catalog\.setval\(|\\(un)?restrict ).*$"
    return re.sub(unstable, b"", out, flags=re.MULTILINE)


@pytest.mark.gen_test
async def test_byte_for_byte_as_before(
    flavour: Flavour, serve: Any, expected_log: list[str]
) -> None:
    class Commits(flavour.Handler):
        async def post(self) -> None:
            self.session.add(Note(text="one"))
            await settle(self.session.commit())
            self.session.add(Note(text="two"))
            await settle(self.session.flush())
            await settle(self.session.rollback())
            self.session.add(Note(text="three"))
            await settle(self.session.commit())

    class Nested(flavour.Handler):
        @transactional
        async def post(self) -> None:
            self.session.add(Note(text="outer"))
            inner = self.session.begin_nested()
            inner = await inner if inspect.isawaitable(inner) else inner
            self.session.add(Note(text="inner"))
            await settle(inner.rollback())

    class Fails(flavour.Handler):
        @transactional
        async def post(self) -> None:
            self.session.add(Note(text="not stored"))
            self.session.add(Reply(note_id=404))
            self.set_status(201)
            self.write("never sent")

    async def add_before(session: Any) -> None:
        session.add(Note(text="before", replies=[Reply()]))

    await flavour.in_scope(add_before, commit=True)
    fetch = serve(Commits, "/commits"), serve(Nested, "/nested"), serve(Fails, "/fails")
    before = await dump(flavour)
    async with isolation(flavour):
        assert (await fetch[0]("/commits", method="POST")).code == 200
        assert (await fetch[0]("/nested", method="POST")).code == 200
        failed = await fetch[0]("/fails", method="POST")
        assert (failed.code, b"never" in failed.body) == (500, False)
        texts = await flavour.in_scope(lambda session: session.scalars(select(Note.text)))
        assert sorted(texts.all()) == ["before", "one", "outer", "three"]
        assert (await fetch[0]("/commits", method="POST")).code == 200  # the next one is clean
    assert await dump(flavour) == before
    expected_log.append("Uncaught exception POST /fails")


@only("sqlite", "aiosqlite")
@pytest.mark.gen_test
async def test_byte_for_byte_with_a_write_ahead_log(flavour: Flavour) -> None:
    with flavour.admin.connect() as connection:  # stays open, or the log would be removed
        connection.exec_driver_sql("PRAGMA journal_mode = WAL")
        connection.exec_driver_sql("INSERT INTO note (text) VALUES ('before')")
        connection.commit()
        before = await dump(flavour)
        async with isolation(flavour):
            await flavour.in_scope(lambda session: session.add(Note(text="x")), commit=True)
            assert await count(flavour) == 2
        assert await dump(flavour) == before


@pytest.mark.gen_test
async def test_a_constraint_is_as_deferred_as_before(flavour: Flavour) -> None:
    async def reply_first(session: Any, note_id: int) -> None:
        session.add(Reply(note_id=note_id))
        await settle(session.flush())
        session.add(Note(id=note_id, text="late"))

    async with isolation(flavour):
        for _ in range(2):
            with pytest.raises(IntegrityError, match=r"(?i)foreign key"):
                await flavour.in_scope(lambda session: session.add(Reply(note_id=8)), commit=True)
        for note_id in (7, 9):  # the second time, after a COMMIT that has checked
            await flavour.in_scope(lambda session, i=note_id: reply_first(session, i), commit=True)
        assert await count(flavour) == 2
    assert flavour.texts() == []


@only("psycopg", "asyncpg")
@pytest.mark.gen_test
async def test_initially_immediate_constraints_stay_so(flavour: Flavour) -> None:
    ddl = (
        'CREATE TABLE "Odd name" (id int PRIMARY KEY,'
        ' other int CONSTRAINT "Odd one" UNIQUE DEFERRABLE INITIALLY IMMEDIATE)'
    )
    async with isolation(flavour):
        await flavour.in_scope(lambda session: session.execute(text(ddl)), commit=True)
        insert = text("""INSERT INTO "Odd name" VALUES (:id, 1)""")
        await flavour.in_scope(lambda session: session.execute(insert, {"id": 1}), commit=True)
        with pytest.raises(IntegrityError):  # by the statement, and not by the COMMIT
            await flavour.in_scope(lambda session: session.execute(insert, {"id": 2}))


@only("sqlite", "aiosqlite")
@pytest.mark.gen_test
async def test_foreign_keys_that_were_broken_before_are_nobodys_fault(flavour: Flavour) -> None:
    with flavour.admin.connect() as connection:
        connection.exec_driver_sql("PRAGMA foreign_keys = OFF")
        connection.exec_driver_sql("INSERT INTO reply (note_id) VALUES (404)")
        connection.commit()
        connection.exec_driver_sql("PRAGMA foreign_keys = ON")
    async with isolation(flavour):
        await flavour.in_scope(lambda session: session.add(Note(text="x")), commit=True)
        assert await count(flavour) == 1


def options_of(connection: Any) -> Any:
    return getattr(connection, "sync_connection", connection).get_execution_options()


@everywhere
@pytest.mark.gen_test
async def test_isolation_levels_and_other_options(flavour: Flavour, serve: Any) -> None:
    """A level is ignored; other options end with the unit of work that set them."""
    seen: list[Any] = []

    class Handler(flavour.Handler):
        @transactional(isolation_level="SERIALIZABLE", retries=1)
        async def post(self) -> None:
            options = {"isolation_level": "SERIALIZABLE", "schema_translate_map": {"a": "b"}}
            connection = await settle(self.session.connection(execution_options=options))
            seen.append(options_of(connection).get("schema_translate_map"))
            self.session.add(Note(text="x"))

        async def get(self) -> None:
            options = {"schema_translate_map": {"a": "b"}}
            await settle(self.session.connection(execution_options=options))

        async def put(self) -> None:
            connection = await settle(self.session.connection())
            seen.append(options_of(connection).get("schema_translate_map"))

    fetch = serve(Handler)
    async with isolation(flavour):
        with warnings.catch_warnings():  # SQLAlchemy's own: it has a connection already
            warnings.simplefilter("ignore", SAWarning)
            assert (await fetch(method="POST")).code == 200
        assert await count(flavour) == 1
        assert (await fetch()).code == 200
        assert (await fetch(method="PUT")).code == 200
        assert seen[1] is None
    assert flavour.texts() == []


# -- who only reads --------------------------------------------------------------------------------


@everywhere
@pytest.mark.gen_test
async def test_readers_share_the_connection_and_cannot_write(
    flavour: Flavour, serve: Any, expected_log: list[str]
) -> None:
    errors: list[BaseException | None] = []

    class Handler(flavour.Handler):
        @read_only
        async def get(self) -> None:
            found = await settle(self.session.scalars(select(Note.text)))
            self.write(",".join(found.all()))

        @read_only
        async def put(self) -> None:
            await settle(self.session.execute(text("UPDATE note SET text = 'y'")))

        @transactional
        async def post(self) -> None:
            self.session.add(Note(text="x"))

        def log_exception(self, _type: Any, value: BaseException | None, _tb: Any) -> None:
            errors.append(value)

    fetch = serve(Handler)
    async with isolation(flavour):
        for text_read in (b"x", b"x,x"):
            assert (await fetch(method="POST")).code == 200
            assert (await fetch()).body == text_read
            assert (await fetch(method="PUT")).code == 500
        reader = {"bind": flavour.sync_engines[1]}  # as a get_bind() of the user's may answer
        query = select(func.count(Note.id))
        found = await flavour.in_scope(lambda one: one.scalar(query, bind_arguments=reader))
        assert found == 2
        assert flavour.checked_out() == 1
        assert (await fetch()).body == b"x,x"
    assert [type(error) for error in errors] == [ReadOnlyViolation] * 2
    assert "PUT /" in str(errors[0])
    assert flavour.texts() == []
    # The connection went back as it was.
    assert (await fetch(method="POST")).code == 200
    assert flavour.texts() == ["x"]


# -- units of work ---------------------------------------------------------------------------------


@everywhere
@pytest.mark.gen_test
async def test_a_unit_inside_another_names_both(flavour: Flavour) -> None:
    async with isolation(flavour):
        with pytest.raises(TornadoSAError, match=r"'inner' was opened inside 'outer'"):
            if flavour.is_async:
                async with flavour.db.scope("outer"), flavour.db.scope("inner"):
                    pass
            else:
                with flavour.db.scope("outer"), flavour.db.scope("inner"):
                    pass
        assert await count(flavour) == 0


@only(*BRIDGED)
@pytest.mark.gen_test
async def test_blocks_under_the_bridge(
    flavour: Flavour, serve: Any, expected_log: list[str]
) -> None:
    class Handler(flavour.Handler):
        def get(self) -> None:
            with self.db.scope("inner"):
                pass

    fetch = serve(Handler)
    async with isolation(flavour):
        assert (await fetch()).code == 500
        assert await count(flavour) == 0
    assert (await fetch()).code == 200
    expected_log.append("Uncaught exception GET /")


@everywhere
@pytest.mark.gen_test
async def test_a_test_that_waits_for_itself_is_told(
    flavour: Flavour, serve: Any, expected_log: list[str]
) -> None:
    errors: list[Any] = []

    class Handler(flavour.Handler):
        def log_exception(self, _type: Any, value: BaseException | None, _tb: Any) -> None:
            errors.append(value)

    fetch = serve(Handler)

    async def wait_for_itself(_session: Any) -> None:
        assert (await fetch("/self")).code == 500

    async with isolation(flavour, timeout=0.05):
        await flavour.in_scope(wait_for_itself)
    assert isinstance(errors[0], TornadoSAError)
    assert re.search(
        r"'GET /self' has waited 0\.05 s .* which 'test' \(.*db\.begin", str(errors[0])
    )


@only(*SYNC)
@pytest.mark.gen_test
async def test_a_plain_unit_never_waits_on_the_loop(flavour: Flavour, serve: Any) -> None:
    go_on = asyncio.Event()

    class Handler(flavour.Handler):
        async def get(self) -> None:
            await go_on.wait()

    fetch = serve(Handler)
    async with isolation(flavour) as entered:
        request = asyncio.ensure_future(fetch())
        await until(lambda: entered.in_use)
        with (
            pytest.raises(TornadoSAError, match=r"'mine' cannot begin: 'GET /' "),
            flavour.db.scope("mine"),
        ):
            pass
        other = asyncio.ensure_future(asyncio.to_thread(in_thread, flavour.db))  # there it may
        await until(lambda: len(entered.in_use) == 2)
        go_on.set()
        assert (await request).code == 200
        assert await other == 0


def in_thread(db: Any) -> Any:
    with db.scope("thread") as session:
        return session.scalar(select(func.count(Note.id)))


@only(*SYNC, *ASYNC)
@pytest.mark.gen_test
async def test_a_cancelled_waiter_swallows_nothing(flavour: Flavour, serve: Any) -> None:
    """Neither one that still waits, nor one that was just given the connection."""

    class Handler(flavour.Handler):
        cancel_on_disconnect = True

        async def get(self) -> None:
            await settle(self.session.scalar(select(1)))
            await asyncio.sleep(0.05)

    fetch = serve(Handler)
    async with isolation(flavour) as entered:
        first = asyncio.ensure_future(fetch())
        await until(lambda: entered.in_use)
        tasks = []
        for _ in range(3):
            scope = Scope("waiter")
            tasks.append((scope, asyncio.ensure_future(wait_for(entered, scope))))
        await asyncio.sleep(0)
        assert len(entered.in_use) == 4
        tasks[0][1].cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(entered.in_use) == 3
        entered.lock.leave(entered.in_use[0])  # gives it to the next, who is cancelled meanwhile
        assert entered.in_use[0] is tasks[1][0]
        tasks[1][1].cancel()
        await asyncio.wait([task for _, task in tasks], timeout=5)
        assert entered.in_use == [tasks[2][0]]
        tasks[2][0].end()
        await first
        await until(lambda: not entered.in_use)
        assert await count(flavour) == 0


async def wait_for(isolation: Isolation, scope: Scope) -> None:
    waits = isolation.begin(scope)
    if waits is not None:
        await waits


@only(*SYNC, *ASYNC)
@pytest.mark.gen_test
async def test_a_client_that_vanishes_while_it_waits(
    flavour: Flavour, serve: Any, base_url: str, expected_log: list[str]
) -> None:
    class Handler(flavour.Handler):
        cancel_on_disconnect = True

        async def get(self) -> None:
            await settle(self.session.scalar(select(1)))

    fetch = serve(Handler)
    async with isolation(flavour) as entered:
        scope = Scope("holder")
        entered.take(scope)
        async with RawClient(base_url) as client:
            await client.send("GET /gone HTTP/1.1\nHost: x")
            await until(lambda: len(entered.in_use) == 2)
        await until(lambda: len(entered.in_use) == 1)
        scope.end()
        assert (await fetch()).code == 200
    expected_log.extend(CANCELLED_LOG)


@everywhere
@pytest.mark.gen_test
@pytest.mark.parametrize("kind", ["def", "async def", "coroutine", "no super"])
async def test_every_kind_of_prepare_waits(flavour: Flavour, serve: Any, kind: str) -> None:
    def read(handler: Any) -> Any:
        return handler.session.scalar(select(func.count(Note.id)))

    class Handler(flavour.Handler):
        if kind == "def":

            def prepare(self) -> Any:
                super().prepare()

        elif kind == "async def":

            async def prepare(self) -> None:
                await super().prepare()
                await settle(read(self))

        elif kind == "coroutine":

            @gen.coroutine
            def prepare(self) -> Any:
                yield super().prepare()

        else:

            async def prepare(self) -> None:
                await settle(read(self))

        async def get(self) -> None:
            await settle(read(self))
            await asyncio.sleep(0.001)
            await settle(read(self))

    fetch = serve(Handler)
    async with isolation(flavour):
        answers = await asyncio.gather(*[fetch() for _ in range(4)])
        assert [answer.code for answer in answers] == [200] * 4


@only("sqlite", "aiosqlite", "asyncpg", "bridged_asyncpg")
@pytest.mark.gen_test
async def test_events_of_websockets_keep_their_order(
    flavour: Flavour, app: Application, http_server: Any, base_url: str
) -> None:
    Socket: Any = (
        AsyncSessionWebSocketHandler
        if flavour.is_async and not flavour.is_bridged
        else SessionWebSocketHandler
    )

    class Handler(Socket):
        if flavour.is_bridged or not flavour.is_async:

            def on_message(self, message: str | bytes) -> None:
                self.session.add(Note(text=message))
                self.session.commit()
                self.write_message(message)

        else:

            async def on_message(self, message: str | bytes) -> None:
                self.session.add(Note(text=message))
                await self.session.commit()
                await self.write_message(message)

    app.add_handlers(r".*", [("/ws", Handler)])
    async with isolation(flavour) as entered:
        client = await websocket_connect(base_url.replace("http", "ws") + "/ws")
        await until(lambda: not entered.in_use)
        scope = Scope("holder")
        entered.take(scope)
        for i in range(5):
            client.write_message(str(i))
        await until(lambda: len(entered.in_use) == 2)
        await asyncio.sleep(0.01)
        assert len(entered.in_use) == 2  # the second one waits for the first, as ever
        scope.end()
        assert [await client.read_message() for _ in range(5)] == list("01234")
        assert await count(flavour) == 5
        client.close()
        await client.read_message()
    assert flavour.texts() == []


@only("sqlite", "psycopg")
@pytest.mark.gen_test
async def test_work_in_threads_belongs_to_its_unit(flavour: Flavour, serve: Any) -> None:
    def add() -> None:
        flavour.db.session.add(Note(text="x"))
        flavour.db.session.commit()

    class Handler(flavour.Handler):
        async def post(self) -> None:
            await self.db.to_thread(add)

    fetch = serve(Handler)
    async with isolation(flavour):
        answers = await asyncio.gather(*[fetch(method="POST") for _ in range(4)])
        assert [answer.code for answer in answers] == [200] * 4
        assert await count(flavour) == 4
    assert flavour.texts() == []


# -- sessions, callbacks, the database itself ------------------------------------------------------


@everywhere
@pytest.mark.gen_test
async def test_an_object_of_the_test_is_never_in_the_requests_session(
    flavour: Flavour, serve: Any
) -> None:
    """Question 4: the connection is shared, the session is not."""
    seen: list[Any] = []

    class Handler(flavour.Handler):
        async def get(self) -> None:
            seen.append(await settle(self.session.get(Note, 1)))
            assert mine not in self.session

    mine = Note(id=1, text="x")
    fetch = serve(Handler)
    async with isolation(flavour):
        await flavour.in_scope(lambda session: session.add(mine), commit=True)
        assert (await fetch()).code == 200
    assert seen[0] is not mine
    assert seen[0].text == "x"


@everywhere
@pytest.mark.gen_test
async def test_sessions_of_the_sessionmaker_are_isolated_too(flavour: Flavour, serve: Any) -> None:
    fetch = serve(flavour.Handler)
    async with isolation(flavour, timeout=0.1) as entered:
        session = flavour.db.sessionmaker()
        session.add(Note(text="x"))
        await settle(session.commit())
        assert entered.in_use == []
        await settle(session.scalar(select(1)))
        assert [scope.label for scope in entered.in_use] == ["a session of db.sessionmaker()"]
        await settle(session.close())
        assert entered.in_use == []
        assert await count(flavour) == 1
    assert (await fetch("/")).code == 405
    with pytest.raises(InvalidRequestError):
        await settle(session.scalar(select(1)))
    assert flavour.texts() == []


@everywhere
@pytest.mark.gen_test
@pytest.mark.parametrize("captured", [False, True])
async def test_after_commit(flavour: Flavour, serve: Any, captured: bool) -> None:
    called: list[str] = []

    async def note(name: str) -> None:
        await flavour.in_scope(lambda session: session.add(Note(text=name)), commit=True)
        called.append(name)

    class Handler(flavour.Handler):
        @transactional
        async def post(self) -> None:
            self.after_commit(note, "mail")
            self.session.add(Note(text="x"))

        @transactional
        async def put(self) -> None:
            self.after_commit(note, "not committed")
            self.set_status(400)

    fetch = serve(Handler)
    async with isolation(flavour, capture_after_commit=captured) as entered:
        assert (await fetch(method="POST")).code == 200
        assert (await fetch(method="PUT")).code == 400
        if captured:
            assert called == []
            assert [call.name.rpartition(".")[2] for call in entered.calls] == ["note"]
            await entered.calls[0]()
        await until(lambda: called == ["mail"])
        assert await count(flavour) == 2
    assert flavour.texts() == []


@only(*SYNC)
def test_a_plain_callback_opens_a_unit_of_work(flavour: Flavour) -> None:
    def store() -> None:
        with flavour.db.begin("callback") as session:
            session.add(Note(text="mail"))

    with isolated(flavour.db):
        with flavour.db.scope() as session:
            session.add(Note(text="x"))
            flavour.db.after_commit(store)
            session.commit()
            session.scalar(select(1))  # has the connection again
        with flavour.db.scope() as session:
            assert session.scalar(select(func.count(Note.id))) == 2


@everywhere
@pytest.mark.gen_test
async def test_release_and_retries(flavour: Flavour, serve: Any, expected_log: list[str]) -> None:
    tries: list[int] = []

    class Handler(flavour.Handler):
        async def get(self) -> None:
            await settle(self.session.scalar(select(1)))
            await self.release()
            self.write(str(await settle(self.session.scalar(select(func.count(Note.id))))))

        @transactional(retries=1)
        async def post(self) -> None:
            self.session.add(Note(text="x"))
            await settle(self.session.flush())
            tries.append(1)
            if len(tries) == 1:
                raise StaleAnswer("try again", None, Locked())

    fetch = serve(Handler)
    async with isolation(flavour):
        assert (await fetch(method="POST")).code == 200
        assert (await fetch()).body == b"1"
    assert len(tries) == 2
    expected_log.append("try 1 of 2 failed")


class Locked(Exception):
    """A driver's error that says: try again. By the code that PostgreSQL has for it."""

    sqlstate = "40001"


class StaleAnswer(OperationalError):
    pass


@everywhere
@pytest.mark.gen_test
async def test_ping_status_and_dispose_inside(flavour: Flavour, expected_log: list[str]) -> None:
    async with isolation(flavour):
        await flavour.in_scope(lambda session: session.add(Note(text="x")), commit=True)
        assert await settle(flavour.db.ping())
        assert flavour.db.status().checked_out == 1
        assert flavour.db.status().open_scopes == []
        await settle(flavour.db.dispose())
        assert await count(flavour) == 1

        async def dispose_within(session: Any) -> None:
            await settle(session.scalar(select(1)))
            await settle(flavour.db.dispose())

        await flavour.in_scope(dispose_within)
        assert await count(flavour) == 1
    assert flavour.texts() == []
    expected_log.append("is disposed of while still in use by: test")


@pytest.mark.parametrize("kind", [Database, AsyncDatabase])
@pytest.mark.gen_test
async def test_a_database_in_memory(kind: Any) -> None:
    db = kind("sqlite://" if kind is Database else "sqlite+aiosqlite://")
    flavour = Flavour("", db, None)  # type: ignore[arg-type]  # nobody looks at rows
    await flavour.in_scope(
        lambda session: session.execute(text("CREATE TABLE note (id INTEGER PRIMARY KEY, text)")),
        commit=True,
    )
    for _ in range(2):
        async with isolation(flavour):
            await flavour.in_scope(lambda session: session.add(Note(text="x")), commit=True)
            assert await settle(db.ping())
            assert await count(flavour) == 1
            with pytest.raises(ReadOnlyViolation):
                block = db.scope(read_only=True)
                if flavour.is_async:
                    async with block as session:
                        await session.execute(text("DELETE FROM note"))
                else:
                    with block as session:
                        session.execute(text("DELETE FROM note"))
            assert await count(flavour) == 1
        assert await count(flavour) == 0
    async with isolation(flavour):
        await count(flavour)
        if kind is Database:
            db.engine.connect().close()
        else:
            async with db.engine.connect():
                pass
        with pytest.raises(TornadoSAError, match=r"used db\.engine"):
            await count(flavour)
    await settle(db.dispose())


@pytest.mark.gen_test
@pytest.mark.parametrize("kind", [Database, AsyncDatabase])
async def test_several_databases(kind: Any, tmp_path: Path) -> None:
    class Elsewhere(DeclarativeBase):
        pass

    class Page(Elsewhere):
        __tablename__ = "page"
        id: Mapped[int] = mapped_column(primary_key=True)

    driver = "sqlite" if kind is Database else "sqlite+aiosqlite"
    db = kind(f"{driver}:///{tmp_path}/one.db", binds={Elsewhere: f"{driver}:///{tmp_path}/two.db"})
    flavour = Flavour("", db, None)  # type: ignore[arg-type]  # nobody looks at rows
    for base, name in ((Base, "one"), (Elsewhere, "two")):
        engine = create_engine(f"sqlite:///{tmp_path}/{name}.db")
        base.metadata.create_all(engine)
        engine.dispose()

    async def both(session: Any) -> tuple[int, int]:
        return (
            await settle(session.scalar(select(func.count(Note.id)))),
            await settle(session.scalar(select(func.count(Page.id)))),
        )

    async with isolation(flavour):
        await flavour.in_scope(
            lambda session: session.add_all([Note(text="x"), Page()]), commit=True
        )
        assert await flavour.in_scope(both) == (1, 1)
        assert db.status().checked_out == 2
    assert await flavour.in_scope(both) == (0, 0)
    await settle(db.dispose())


@everywhere
@pytest.mark.gen_test
async def test_options_of_the_engine_and_the_sessions(flavour: Flavour) -> None:
    """Autocommit, warnings of long holds, a session class and its options."""

    class Own(Session):
        def __init__(self, **options: Any) -> None:
            super().__init__(join_transaction_mode="rollback_only", **options)

    option = "sync_session_class" if flavour.is_async else "class_"
    db = type(flavour.db)(
        flavour.sync_engine.url,
        engine_options={"isolation_level": "AUTOCOMMIT"},
        session_options={option: Own, "expire_on_commit": True, "autoflush": False},
        hold_warning=0.1,
    )
    own = Flavour(flavour.name, db, flavour.admin)
    async with isolation(own):
        for _ in range(2):
            await own.in_scope(lambda session: session.add(Note(text="x")), commit=True)
        with pytest.raises(ValueError, match="mine"):
            await own.in_scope(add_and_fail)
        assert await count(own) == 2
        if flavour.name == "sqlite":
            await asyncio.sleep(0.12)
        sessions = db.sessionmaker()
        plain = getattr(sessions, "sync_session", sessions)
        assert isinstance(plain, Own)
        assert (plain.autoflush, plain.expire_on_commit) == (False, True)
        await settle(sessions.close())
    assert flavour.texts() == []
    await own.in_scope(lambda session: session.add(Note(text="x")), commit=True)
    assert flavour.texts() == ["x"]
    await own.dispose()


async def add_and_fail(session: Any) -> None:
    session.add(Note(text="x"))
    await settle(session.flush())
    raise ValueError("mine")


@only(*BRIDGED)
@pytest.mark.gen_test
async def test_plain_callbacks_wait_under_the_bridge(flavour: Flavour, serve: Any) -> None:
    called: list[int] = []

    def store() -> None:
        with flavour.db.begin("callback") as session:
            session.add(Note(text="mail"))
        called.append(1)

    class Handler(flavour.Handler):
        @transactional
        def post(self) -> None:
            self.session.add(Note(text="x"))
            self.after_commit(store)

    fetch = serve(Handler)
    async with isolation(flavour):
        answers = await asyncio.gather(*[fetch(method="POST") for _ in range(4)])
        assert [answer.code for answer in answers] == [200] * 4
        await until(lambda: len(called) == 4)
        assert await count(flavour) == 8


@only("sqlite", "aiosqlite")
@pytest.mark.gen_test
async def test_it_leaves_nothing_in_memory(flavour: Flavour) -> None:
    for _ in range(20):
        async with isolation(flavour):
            await count(flavour)
    gc.collect()
    assert len(IsolatedSession.__subclasses__()) == 0


@only(*SYNC, *ASYNC)
@pytest.mark.gen_test
async def test_what_fails_to_begin_holds_nothing(flavour: Flavour) -> None:
    url = flavour.sync_engine.url
    db = type(flavour.db)(url, binds={Reply: url})  # so it has no reader
    own = Flavour(flavour.name, db, flavour.admin)
    async with isolation(own, timeout=0.1) as entered:
        for _ in range(2):
            with pytest.raises(ConfigurationError, match="no reader"):
                block = db.scope(read_only=True)
                if own.is_async:
                    async with block:
                        pass
                else:
                    with block:
                        pass
            assert entered.in_use == []
        kept: list[Any] = []
        await own.in_scope(kept.append)
        with pytest.raises(InvalidRequestError):  # SQLAlchemy's own: it was closed
            await settle(kept[0].scalar(select(1)))
        assert entered.in_use == []
        assert await count(own) == 0
    await own.dispose()


@pytest.mark.gen_test
async def test_a_commit_that_failed_and_a_bare_close(flavour: Flavour) -> None:
    async with isolation(flavour):
        for _ in range(2):
            session = flavour.db.sessionmaker()
            session.add(Reply(note_id=404))
            with pytest.raises(IntegrityError):
                await settle(session.commit())
            await settle(session.close())
        assert await count(flavour) == 0


@only(*ASYNC)
@pytest.mark.gen_test
async def test_blocks_wait(flavour: Flavour, serve: Any) -> None:
    class Handler(flavour.Handler):
        async def get(self) -> None:
            await asyncio.sleep(0.02)

    fetch = serve(Handler)
    async with isolation(flavour) as entered:
        request = asyncio.ensure_future(fetch())
        await until(lambda: entered.in_use)
        assert await count(flavour) == 0
        assert (await request).code == 200


# -- what cannot be --------------------------------------------------------------------------------


@only("sqlite", "aiosqlite")
@pytest.mark.gen_test
async def test_what_cannot_be_says_so(flavour: Flavour) -> None:
    with pytest.raises(TornadoSAError, match=r"Write `(async )?with"):
        if flavour.is_async:
            with isolated(flavour.db):
                pass
        else:
            async with isolated(flavour.db):
                pass
    async with isolation(flavour):
        with pytest.raises(TornadoSAError, match="is on already"):
            async with isolation(flavour):
                pass
        await flavour.in_scope(lambda session: session.add(Note(text="x")), commit=True)
    assert flavour.texts() == []

    async def enter_inside(_session: Any) -> None:
        with pytest.raises(
            TornadoSAError, match=r"open, whose sessions would be left out: 'test' \("
        ):
            async with isolation(flavour):
                pass

    await flavour.in_scope(enter_inside)
    block = flavour.db.scope("half way")
    with pytest.raises(TornadoSAError, match=r"ends while .* 'half way' \("):
        async with isolation(flavour):
            if flavour.is_async:
                session = await block.__aenter__()
            else:
                session = block.__enter__()
    with pytest.raises(TornadoSAError, match="over by now"):
        await settle(session.scalar(select(1)))
    if flavour.is_async:
        await block.__aexit__(None, None, None)
    else:
        block.__exit__(None, None, None)


@only("sqlite", "aiosqlite")
@pytest.mark.gen_test
async def test_who_waits_at_the_end_is_sent_away(flavour: Flavour) -> None:
    scope = Scope("holder")
    with pytest.raises(TornadoSAError, match=r"'holder' .* 'waiter' \("):
        async with isolation(flavour) as entered:
            entered.take(scope)
            task = asyncio.ensure_future(wait_for(entered, Scope("waiter")))
            await until(lambda: len(entered.in_use) == 2)
    with pytest.raises(TornadoSAError, match="'waiter' wants to begin when"):
        await asyncio.wait_for(task, 1)
    scope.end()


@only("psycopg")
def test_two_phase_is_refused(flavour: Flavour, postgresql_url: str) -> None:
    url = flavour.sync_engine.url
    db = Database(url, session_options={"twophase": True})
    with pytest.raises(ConfigurationError, match="two phases"), isolated(db):
        pass


SLOW = {
    "postgresql": "SELECT pg_sleep(0.3)",
    "mariadb": "SELECT SLEEP(0.3)",
    "sqlite": "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT 300000)"
    " SELECT count(*) FROM c",
}


@only(*ASYNC, *BRIDGED, "aiomysql")
@pytest.mark.gen_test
async def test_a_query_that_is_cancelled(flavour: Flavour, serve: Any, base_url: str) -> None:
    """Undoes its own unit of work. Not so on MariaDB, whose driver closes the connection."""
    errors: list[Any] = []

    class Handler(flavour.Handler):
        async def post(self) -> None:
            self.session.add(Note(text="undone"))
            await settle(self.session.flush())
            try:
                async with asyncio.timeout(0.02):
                    await settle(self.session.execute(text(SLOW[flavour.dialect])))
            except TimeoutError as error:
                errors.append(error)
                self.set_status(504)

    fetch = serve(Handler)
    async with isolation(flavour):
        await flavour.in_scope(lambda session: session.add(Note(text="kept")), commit=True)
        assert (await fetch(method="POST")).code == 504
        assert len(errors) == 1
        if flavour.dialect == "mariadb":
            with pytest.raises(TornadoSAError, match="its connection was lost"):
                await count(flavour)
        else:
            assert await count(flavour) == 1
            await flavour.in_scope(lambda session: session.add(Note(text="kept")), commit=True)
            assert await count(flavour) == 2
    assert flavour.texts() == []


@only("psycopg", "asyncpg", "pymysql", "aiomysql")
@pytest.mark.gen_test
async def test_a_connection_that_is_killed(flavour: Flavour) -> None:
    kill = {
        "postgresql": "SELECT pg_terminate_backend(pg_backend_pid())",
        "mariadb": "KILL CONNECTION_ID()",
    }[flavour.dialect]
    async with isolation(flavour):
        await flavour.in_scope(lambda session: session.add(Note(text="x")), commit=True)
        with pytest.raises(DBAPIError):
            await flavour.in_scope(lambda session: session.execute(text(kill)))
        for _ in range(2):
            with pytest.raises(TornadoSAError, match="its connection was lost"):
                await count(flavour)
    assert await count(flavour) == 0


@only("pymysql", "aiomysql")
@pytest.mark.gen_test
async def test_a_statement_that_commits_by_itself_is_noticed(flavour: Flavour) -> None:
    async with isolation(flavour):
        with pytest.raises(DBAPIError, match="SAVEPOINT"):
            await flavour.in_scope(
                lambda session: session.execute(text("ALTER TABLE note COMMENT 'x'")), commit=True
            )
        with pytest.raises(TornadoSAError, match="DDL"):
            await count(flavour)


# -- counting --------------------------------------------------------------------------------------


@everywhere
@pytest.mark.gen_test
async def test_statements_are_counted(flavour: Flavour, serve: Any) -> None:
    class Handler(flavour.Handler):
        @transactional
        async def post(self) -> None:
            self.session.add(Note(text="secret"))

        @read_only
        async def get(self) -> None:
            await settle(self.session.scalar(select(func.count(Note.id))))

    fetch = serve(Handler)

    async def both() -> int:
        with count_queries(flavour.db) as counted:
            await fetch(method="POST")
            await fetch()
        return counted.count

    with count_queries(flavour.db, expected=1):
        await count(flavour)
    plain = await both()
    assert plain == 2
    async with isolation(flavour):
        assert await both() == plain
        assert await both() == plain
        with pytest.raises(AssertionError, match="expected 3 statements, and got <2 ") as error:
            with count_queries(flavour.db, expected=3):
                await fetch(method="POST")
                await fetch()
        assert "   1. INSERT INTO note" in str(error.value)
        assert "secret" not in str(error.value)
    with pytest.raises(ValueError, match="mine"), count_queries(flavour.db, expected=3):
        raise ValueError("mine")
