"""Units of work that only read: the reader, and the server that refuses what they write."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, delete, event, insert, make_url, select, text, update
from sqlalchemy.ext.asyncio import create_async_engine
from tornado import gen

from tests.cluster import Cluster
from tests.support import (
    ASYNC,
    BRIDGED,
    MARIADB,
    POSTGRESQL,
    SYNC,
    Base,
    Flavour,
    Note,
    Reply,
    make_database,
    only,
    proxy,
    settle,
    until,
)
from tornado_sa import (
    AsyncDatabase,
    ConfigurationError,
    Database,
    ReadOnlyViolation,
    SessionHandler,
    SessionWebSocketHandler,
    UncommittedChanges,
    read_only,
)
from tornado_sa.changes import uncommitted
from tornado_sa.engine import parse
from tornado_sa.reader import reader_options

EVERY = [*SYNC, *ASYNC, *BRIDGED, *MARIADB]


TABLE = Base.metadata.tables["note"]


def three_notes(flavour: Flavour) -> list[str]:
    with flavour.admin.begin() as connection:
        rows = [{"id": 10**6 + i, "text": str(i)} for i in range(3)]
        connection.execute(insert(Note), rows)
    return ["0", "1", "2"]


async def flush_new(session: Any) -> None:
    session.add(Note(text="new"))
    await settle(session.flush())


async def commit_new(session: Any) -> None:
    session.add(Note(text="new"))
    await settle(session.commit())


async def commit_changed(session: Any) -> None:
    (await settle(session.get(Note, 10**6))).text = "changed"
    await settle(session.commit())


async def commit_deleted(session: Any) -> None:
    await settle(session.delete(await settle(session.get(Note, 10**6))))
    await settle(session.commit())


def executing(statement: Any) -> Callable[[Any], Any]:
    async def execute(session: Any) -> None:
        await settle(session.execute(statement))
        await settle(session.commit())

    return execute


async def over_its_connection(session: Any) -> None:
    connection = await settle(session.connection())
    await settle(connection.exec_driver_sql("DELETE FROM note"))


async def in_bulk(session: Any) -> None:
    rows = [{"text": "new"}]  # one: after an executemany() that fails, psycopg may log a warning
    plain = getattr(session, "run_sync", lambda function: function(session))
    await settle(plain(lambda session: session.bulk_insert_mappings(Note, rows)))


WAYS = {
    "flush_new": flush_new,
    "commit_new": commit_new,
    "commit_changed": commit_changed,
    "commit_deleted": commit_deleted,
    "orm_insert": executing(insert(Note).values(text="new")),
    "orm_update": executing(update(Note).values(text="changed")),
    "orm_delete": executing(delete(Note)),
    "core_insert": executing(TABLE.insert().values(text="new")),
    "text_insert": executing(text("INSERT INTO note (id, text) VALUES (7, 'new')")),
    "text_update": executing(text("UPDATE note SET text = 'changed'")),
    "text_delete": executing(text("/* quietly */ DELETE FROM note")),
    "text_ddl": executing(text("CREATE TABLE another (id int)")),
    "over_its_connection": over_its_connection,
    "in_bulk": in_bulk,
}


@only(*EVERY)
@pytest.mark.gen_test
async def test_every_write_is_refused_by_the_server(
    flavour: Flavour, serve: Any, expected_log: list[str]
) -> None:
    """ORM, Core and text: 500, the rows as they were, and the next request is none the wiser."""
    rows = three_notes(flavour)

    class Handler(flavour.Handler):
        @read_only
        async def get(self) -> None:
            way = self.get_argument("way", None)
            if way:
                await WAYS[way](self.session)
            found = await settle(self.session.scalars(select(Note.text).order_by(Note.id)))
            self.write({"texts": found.all()})

    fetch = serve(Handler)
    for way in WAYS:
        response = await fetch(f"/?way={way}")
        expected_log.append(f"Uncaught exception GET /?way={way}")
        assert response.code == 500, way
        assert sorted(flavour.texts()) == rows, way
        after = await fetch("/")
        assert after.code == 200 and b'"0", "1", "2"' in after.body, way
    await until(lambda: flavour.checked_out() == 0)


@only(*EVERY)
@pytest.mark.gen_test
async def test_the_error_of_a_write(flavour: Flavour, serve: Any) -> None:
    """It names the unit of work and comes from the driver's; after a rollback one can go on."""
    rows = three_notes(flavour)
    caught: list[ReadOnlyViolation] = []

    class Handler(flavour.Handler):
        @read_only
        async def get(self) -> None:
            for way in flush_new, WAYS["text_insert"]:
                with pytest.raises(ReadOnlyViolation) as raised:
                    await way(self.session)
                caught.append(raised.value)
                await settle(self.session.rollback())
            with pytest.raises(ReadOnlyViolation):  # of this request still, inside another unit
                async with _begun(flavour):
                    await flush_new(self.session)
            await settle(self.session.rollback())
            assert len((await settle(self.session.scalars(select(Note)))).all()) == len(rows)

    response = await serve(Handler)("/notes")
    assert response.code == 200
    for error in caught:
        assert str(error).startswith("GET /notes is a unit of work that only reads, and the server")
        assert "db.begin()" in str(error)
        assert error.__cause__ is not None
    assert sorted(flavour.texts()) == rows


class _begun:
    """``with db.begin()`` for every flavour."""

    def __init__(self, flavour: Flavour) -> None:
        self.block = flavour.db.begin("another")
        self.is_async = flavour.is_async

    async def __aenter__(self) -> Any:
        return await self.block.__aenter__() if self.is_async else self.block.__enter__()

    async def __aexit__(self, *error: Any) -> None:
        if self.is_async:
            await self.block.__aexit__(*error)
        else:
            self.block.__exit__(*error)


@pytest.mark.gen_test
async def test_which_verbs_read_only(flavour: Flavour, serve: Any, expected_log: list[str]) -> None:
    """Decorated, with and without arguments, or named; every kind of method; by the outermost."""
    is_reading: list[bool] = []

    def note(self: Any) -> None:
        session = self.session
        bind = getattr(session, "sync_session", session).get_bind()
        is_reading.append(bind.engine.pool is flavour.sync_engines[1].pool)

    class Parent(flavour.Handler):
        read_only_methods = frozenset({"OPTIONS", "DELETE"})

        @read_only
        def get(self) -> Any:
            note(self)

        @read_only(stream=True)
        async def post(self) -> None:
            note(self)

        @gen.coroutine
        @read_only()
        def put(self) -> Any:
            yield gen.moment
            note(self)

        @read_only
        @gen.coroutine
        def patch(self) -> Any:
            yield gen.moment
            note(self)

        async def options(self) -> None:
            note(self)

        def delete(self) -> None:
            note(self)

    class Child(Parent):
        read_only_methods = frozenset({"OPTIONS"})

        async def get(self) -> None:
            super().get()

        @read_only
        def head(self) -> None:
            note(self)

    fetch = serve(Parent, "/parent")
    serve(Child, "/child")
    for path, expected in ("/parent", [True] * 6), ("/child", [False] + [True] * 4 + [False, True]):
        verbs = ["GET", "POST", "PUT", "PATCH", "OPTIONS", "DELETE", "HEAD"][: len(expected)]
        is_reading.clear()
        for verb in verbs:
            assert (await fetch(path, method=verb)).code == 200, verb
        assert is_reading == expected


@pytest.mark.gen_test
async def test_prepare_reads_as_the_verb_does(
    flavour: Flavour, serve: Any, expected_log: list[str]
) -> None:
    three_notes(flavour)
    before = [pool_of(engine).checkedout() for engine in flavour.sync_engines]

    class Handler(flavour.Handler):
        async def prepare(self) -> None:
            await settle(self.session.get(Note, 10**6))
            now = [pool_of(engine).checkedout() for engine in flavour.sync_engines]
            assert now == [before[0], before[1] + 1]
            if self.get_argument("write", None):
                await flush_new(self.session)

        @read_only
        def get(self) -> None:
            assert proxy(self)() is self.session

    fetch = serve(Handler)
    assert (await fetch("/")).code == 200
    expected_log.append("Uncaught exception GET /?write=1")
    assert (await fetch("/?write=1")).code == 500


def pool_of(engine: Any) -> Any:
    return engine.pool


@pytest.mark.parametrize("flavour", POSTGRESQL, indirect=True)
@pytest.mark.gen_test
async def test_no_begin_and_no_rollback_on_the_wire(
    flavour: Flavour, serve: Any, cluster: Cluster
) -> None:
    """The server's own log has the statements of the verb, and nothing else. A write is in there.

    And what the user asks for with ``connect_args`` holds on the reader too.
    """
    url = cluster.url("postgresql+asyncpg" if "asyncpg" in flavour.name else "postgresql+psycopg")
    if "asyncpg" in flavour.name:
        connect_args: dict[str, Any] = {"server_settings": {"log_statement": "all"}}
    else:
        connect_args = {"options": "-c log_statement=all"}
    db = make_database(
        flavour.name,
        url.render_as_string(hide_password=False),
        engine_options={"connect_args": connect_args, "pool_size": 1, "max_overflow": 0},
    )
    pids = []

    class Handler(flavour.Handler):
        database = db

        async def statements(self) -> None:
            pids.append(await settle(self.session.scalar(text("SELECT pg_backend_pid()"))))
            await settle(self.session.execute(text("SELECT 'hello'")))

        @read_only
        async def get(self) -> None:
            await self.statements()

        @read_only(stream=True)
        async def put(self) -> None:
            await self.statements()

        async def post(self) -> None:
            await self.statements()

    fetch = serve(Handler)
    for method in "GET", "GET", "POST", "GET", "PUT":
        assert (await fetch("/", method=method)).code == 200
        await until(lambda: not db.status().open_scopes and db.reader.pool.checkedout() == 0)
    await settle(db.dispose())
    assert len(set(pids)) == 2
    sent = logged(cluster, pids[0])
    first = next(i for i, line in enumerate(sent) if "SELECT pg_backend_pid()" in line)
    kinds = [kind_of(line) for line in sent[first:]]
    assert kinds[:6] == ["pid", "hello"] * 3
    assert kinds[6:] == ["BEGIN", "pid", "hello", "ROLLBACK"]  # stream=True
    kinds = [kind_of(line) for line in logged(cluster, pids[2])]
    assert kinds[-4:] == ["BEGIN", "pid", "hello", "ROLLBACK"]


def logged(cluster: Cluster, pid: int) -> list[str]:
    """What the server was sent by the connection with this process, as far as it says so."""
    lines = (cluster.folder / "log").read_text().splitlines()
    said = [line for line in lines if f"[{pid}]" in line]
    return [line for line in said if "statement: " in line or "execute " in line]


def kind_of(line: str) -> str:
    for piece, kind in ("pg_backend_pid", "pid"), ("'hello'", "hello"), ("BEGIN", "BEGIN"):
        if piece in line:
            return kind
    return line.rsplit(": ", 1)[-1].strip("; ").upper()


@only(*MARIADB)
@pytest.mark.gen_test
async def test_no_commit_and_no_rollback_for_mariadb(flavour: Flavour, serve: Any) -> None:
    """The server counts what a connection sent."""
    counts: list[dict[str, int]] = []
    query = text(
        "SHOW SESSION STATUS WHERE Variable_name IN"
        " ('Com_begin', 'Com_rollback', 'Com_commit', 'Com_select', 'Questions')"
    )

    class Handler(flavour.Handler):
        @read_only
        async def get(self) -> None:
            found = await settle(self.session.execute(query))
            counts.append({name: int(value) for name, value in found.all()})
            await settle(self.session.scalars(select(Note)))
            await self.release()

    fetch = serve(Handler)
    for _ in range(3):
        assert (await fetch("/")).code == 200
        await until(lambda: flavour.checked_out() == 0)
    for name in "Com_begin", "Com_rollback", "Com_commit":
        assert counts[2][name] == counts[0][name], name
    assert [later["Questions"] for later in counts] == [
        counts[0]["Questions"] + 2 * number for number in range(3)
    ]


@only(*MARIADB, "sqlite", "aiosqlite", "bridged_aiosqlite")
@pytest.mark.gen_test
async def test_a_transaction_begun_as_text_is_ended(flavour: Flavour, serve: Any) -> None:
    """Round trips are saved where there is no transaction, not where SQLAlchemy sees none."""
    three_notes(flavour)

    class Handler(flavour.Handler):
        @read_only
        async def get(self) -> None:
            if self.get_argument("begin", None):
                await settle(self.session.execute(text("BEGIN")))
            found = await settle(self.session.scalars(select(Note.text).order_by(Note.id)))
            self.write(str(found.all()[0]))

    fetch = serve(Handler)
    assert (await fetch("/?begin=1")).body == b"0"
    await until(lambda: flavour.checked_out() == 0)
    with flavour.admin.begin() as connection:
        connection.execute(text("UPDATE note SET text = 'later'"))
    assert (await fetch("/")).body == b"later"


@only(*SYNC, *BRIDGED)
@pytest.mark.gen_test
async def test_lazy_loading(flavour: Flavour, serve: Any, statements: list[str]) -> None:
    """In a plain session, which under the bridge never blocks the loop."""
    three_notes(flavour)
    with flavour.admin.begin() as connection:
        connection.execute(insert(Reply), [{"id": 10**6, "note_id": 10**6}])

    class Handler(flavour.Handler):
        @read_only
        def get(self) -> None:
            self.write(str(len(self.get_or_404(Note, 10**6).replies)))

        @read_only
        async def put(self) -> None:
            note = self.get_or_404(Note, 10**6)
            await asyncio.sleep(0)
            self.write(str(len(note.replies)))

    fetch = serve(Handler)
    assert (await fetch("/")).body == b"1"
    assert (await fetch("/", method="PUT", body="")).body == b"1"
    assert len(statements) == 4


@only(*EVERY)
@pytest.mark.gen_test
async def test_a_server_side_cursor(flavour: Flavour, serve: Any, expected_log: list[str]) -> None:
    """It needs a transaction, which only reads as well; after it, the connection is as before."""
    rows = three_notes(flavour)
    query = select(Note.text).order_by(Note.id).execution_options(yield_per=2)

    class Handler(flavour.Handler):
        @read_only(stream=True)
        async def get(self) -> None:
            if hasattr(self.session, "stream_scalars"):
                found = await self.session.stream_scalars(query)
                texts = [one async for one in found]
            else:
                texts = list(self.session.scalars(query))
            self.write({"texts": texts})

        @read_only(stream=True)
        async def post(self) -> None:
            await flush_new(self.session)

        @read_only
        async def put(self) -> None:
            await settle(self.session.scalars(select(Note)))

    fetch = serve(Handler)
    for _ in range(2):
        response = await fetch("/")
        assert response.code == 200 and b'["0", "1", "2"]' in response.body
        assert (await fetch("/", method="PUT")).code == 200
    expected_log.append("Uncaught exception POST /")
    assert (await fetch("/", method="POST")).code == 500
    assert (await fetch("/")).code == 200
    assert sorted(flavour.texts()) == rows


@only("sqlite", "aiosqlite", "bridged_aiosqlite")
@pytest.mark.gen_test
async def test_a_database_in_memory(flavour: Flavour, serve: Any) -> None:
    """One connection is all there is: the session itself refuses. Others go on writing."""
    db: Any = AsyncDatabase("sqlite+aiosqlite://") if flavour.is_async else Database("sqlite://")
    with pytest.raises(ConfigurationError, match="in memory"):
        _ = db.reader

    def fill(session: Any) -> None:
        Base.metadata.create_all(session.connection())
        session.execute(insert(Note), [{"id": 10**6, "text": "0"}])

    if flavour.is_async:
        async with db.begin() as session:
            await session.run_sync(fill)
    else:
        with db.begin() as session:
            fill(session)

    class Handler(flavour.Handler):
        database = db

        @read_only
        async def get(self) -> None:
            way = self.get_argument("way", None)
            if way:
                with pytest.raises(ReadOnlyViolation, match=r"GET / .* its session refused to"):
                    await WAYS[way](self.session)
                await settle(self.session.rollback())
            found = await settle(self.session.scalars(select(Note.text)))
            self.write({"texts": found.all()})

        async def post(self) -> None:
            await commit_new(self.session)

    fetch = serve(Handler)
    for way in WAYS:
        response = await fetch(f"/?way={way}")
        assert response.code == 200 and b'["0"]' in response.body, (way, response.body)
    assert (await fetch("/", method="POST")).code == 200
    assert b'["0", "new"]' in (await fetch("/")).body
    await settle(db.dispose())


@only("sqlite", "aiosqlite", "bridged_aiosqlite")
@pytest.mark.gen_test
async def test_a_replica_is_read(flavour: Flavour, serve: Any, tmp_path: Path) -> None:
    three_notes(flavour)
    replica = make_url(str(flavour.db.engine.url)).set(database=str(tmp_path / "replica.db"))
    copy = create_engine(replica.set(drivername="sqlite"))
    Base.metadata.create_all(copy)
    with copy.begin() as connection:
        connection.execute(insert(Note), [{"id": 1, "text": "replicated"}])
    copy.dispose()
    db = make_database(flavour.name, str(flavour.db.engine.url), reader_url=replica)
    assert db.reader.url.database == str(tmp_path / "replica.db")

    class Handler(flavour.Handler):
        database = db

        async def texts(self) -> None:
            found = await settle(self.session.scalars(select(Note.text).order_by(Note.id)))
            self.write(" ".join(found.all()))

        @read_only
        async def get(self) -> None:
            await self.texts()

        async def put(self) -> None:
            await self.texts()

    fetch = serve(Handler)
    assert (await fetch("/")).body == b"replicated"
    assert (await fetch("/", method="PUT")).body == b"0 1 2"
    await until(lambda: not db.status().open_scopes and db.reader.pool.checkedout() == 0)
    await settle(db.dispose())


@only(*EVERY)
@pytest.mark.gen_test
async def test_a_block_that_only_reads(flavour: Flavour) -> None:
    """As a context manager and as a decorator; a block within it has a session of its own."""
    three_notes(flavour)

    @flavour.db.scope("job", read_only=True)
    async def job() -> int:
        with pytest.raises(ReadOnlyViolation, match="job is a unit of work that only reads"):
            await flush_new(flavour.db.session())
        await settle(flavour.db.session.rollback())
        async with _begun(flavour) as session:
            await settle(session.execute(delete(Note)))
        return len((await settle(flavour.db.session.scalars(select(Note)))).all())

    if not flavour.is_async or not flavour.is_bridged:
        assert await job() == 0
    block = flavour.db.scope(read_only=True)
    if flavour.is_async:
        async with block as session:
            assert session.bind is flavour.db.reader
            await session.scalars(select(Note))
    else:
        with block as session:
            assert session.bind is flavour.db.reader
            session.scalars(select(Note))
    assert flavour.checked_out() == 0


@pytest.mark.gen_test
async def test_a_session_made_with_options_reads_too(flavour: Flavour, serve: Any) -> None:
    class Handler(flavour.Handler):
        @read_only
        async def get(self) -> None:
            session = flavour.db.session(autoflush=False)
            assert session.bind is flavour.db.reader and not session.autoflush
            with pytest.raises(ReadOnlyViolation):
                if flavour.is_bridged:
                    session = session.sync_session
                await flush_new(session)

    assert (await serve(Handler)("/")).code == 200


@pytest.mark.gen_test
async def test_release(flavour: Flavour, serve: Any) -> None:
    """The connection goes back, nothing is in doubt, and an `add` still counts as work."""
    three_notes(flavour)

    class Handler(flavour.Handler):
        @read_only
        async def get(self) -> None:
            note = await settle(self.session.get(Note, 10**6))
            await settle(self.session.execute(text("SELECT 1")))
            assert flavour.checked_out() == 1
            plain: Any = getattr(self.session, "sync_session", self.session)
            assert uncommitted(plain) is None
            await self.release()
            assert flavour.checked_out() == 0
            assert note.text == "0"
            assert await settle(self.session.get(Note, 10**6 + 1)) is not None
            self.session.add(Note(text="never"))
            with pytest.raises(UncommittedChanges):
                await self.release()
            self.session.expunge_all()

    assert (await serve(Handler)("/")).code == 200


@only(*SYNC, "pymysql")
@pytest.mark.gen_test
async def test_a_worker_thread_reads_too(flavour: Flavour, serve: Any) -> None:
    rows = three_notes(flavour)

    class Handler(flavour.Handler):
        @read_only
        async def get(self) -> None:
            with pytest.raises(ReadOnlyViolation, match="GET /"):
                await self.db.to_thread(write)
            await self.db.to_thread(self.db.session.rollback)
            self.write(str(await self.db.to_thread(count)))

    def count() -> int:
        return len(flavour.db.session.scalars(select(Note)).all())

    def write() -> None:
        flavour.db.session.add(Note(text="new"))
        flavour.db.session.flush()

    assert (await serve(Handler)("/")).body == str(len(rows)).encode()
    assert sorted(flavour.texts()) == rows


@pytest.mark.gen_test
async def test_it_costs_nothing_until_it_is_used(flavour: Flavour) -> None:
    """A reader without readers has no connection; dispose() closes those of one that had some."""
    closed: list[Any] = []
    event.listen(flavour.sync_engines[1], "close", lambda *args: closed.append(args))
    assert pool_of(flavour.sync_engines[1]).checkedin() == 0
    await flavour.in_scope(lambda session: session.execute(select(1)))
    assert pool_of(flavour.sync_engines[1]).checkedin() == 0
    block = flavour.db.scope(read_only=True)
    if flavour.is_async:
        async with block as session:
            await session.execute(select(1))
    else:
        with block as session:
            session.execute(select(1))
    assert pool_of(flavour.sync_engines[1]).checkedin() == 1
    await flavour.dispose()
    assert len(closed) == 1


@pytest.mark.gen_test
async def test_a_long_hold_is_named(flavour: Flavour, serve: Any, expected_log: list[str]) -> None:
    url = flavour.db.engine.url.render_as_string(hide_password=False)
    db = make_database(flavour.name, url, hold_warning=0.1)

    class Handler(flavour.Handler):
        database = db

        @read_only
        async def get(self) -> None:
            await settle(self.session.execute(select(1)))
            await asyncio.sleep(0.2)

    expected_log.append("GET /held held a connection for 0.2 s")
    assert (await serve(Handler)("/held")).code == 200
    await until(lambda: db.reader.pool.checkedout() == 0)
    await settle(db.dispose())


@only("sqlite", "aiosqlite")
@pytest.mark.gen_test
async def test_a_ready_engine_has_no_reader(
    flavour: Flavour, serve: Any, expected_log: list[str]
) -> None:
    """Who asks for it is told what to write; everybody else is served."""
    create = create_async_engine if flavour.is_async else create_engine
    engine: Any = create(flavour.db.engine.url)
    db = type(flavour.db)(engine)

    class Handler(flavour.Handler):
        database = db

        @read_only
        async def get(self) -> None:
            with pytest.raises(ConfigurationError, match="Give it a reader_url"):
                _ = self.session

        async def put(self) -> None:
            await settle(self.session.execute(select(1)))

    fetch = serve(Handler)
    assert (await fetch("/")).code == 200
    assert (await fetch("/", method="PUT")).code == 200
    await settle(db.dispose())
    with_reader = type(flavour.db)(engine, reader_url=engine.url)
    assert with_reader.reader is not engine
    await settle(with_reader.dispose())


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("sqlite:///a.db", {"session_options": {"binds": {Note: "x"}}}, "'binds'"),
        ("sqlite:///a.db", {"session_options": {"bind": create_engine("sqlite://")}}, "'bind'"),
        ("sqlite:///a.db", {"engine_options": {"pool": create_engine("sqlite://").pool}}, "'pool'"),
        ("postgresql+psycopg:///a", {"engine_options": {"creator": print}}, "'creator'"),
    ],
)
def test_what_keeps_a_reader_away(url: str, options: dict[str, Any], message: str) -> None:
    if message == "'binds'":
        options = {"session_options": {"binds": {Note: create_engine("sqlite://")}}}
    with pytest.raises(ConfigurationError, match=f"has no reader.*{message}"):
        _ = Database(url, **options).reader
    with pytest.raises(ConfigurationError, match=f"has no reader.*{message}"):
        Database(url, reader_url=url, **options)


@pytest.mark.parametrize(
    ("reader_url", "message"),
    [
        ("sqlite://", "in memory"),
        ("sqlite+aiosqlite:///a.db", "needs a sync driver"),
        ("nonsense", "cannot be parsed"),
        ("nosuch://x/y", "nosuch"),
        (create_engine("sqlite:///a.db"), "takes a URL"),
    ],
)
def test_a_wrong_reader_url(reader_url: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Database("sqlite:///a.db", reader_url=reader_url)


@pytest.mark.parametrize(
    ("url", "options", "environment", "connect_args"),
    [
        ("+psycopg://h/d", {}, "", {"options": "-c default_transaction_read_only=on"}),
        (
            "+psycopg2://h/d",
            {"connect_args": {"options": "-c a=b", "connect_timeout": 3}},
            "-c c=d",
            {"options": "-c a=b -c default_transaction_read_only=on", "connect_timeout": 3},
        ),
        (
            "+psycopg://h/d?options=-c%20a%3Db",
            {},
            "-c c=d",
            {"options": "-c a=b -c default_transaction_read_only=on"},
        ),
        ("+psycopg://h/d", {}, "-c c=d", {"options": "-c c=d -c default_transaction_read_only=on"}),
        (
            "+asyncpg://h/d",
            {"connect_args": {"server_settings": {"a": "b"}, "timeout": 3}},
            "",
            {"server_settings": {"a": "b", "default_transaction_read_only": "on"}, "timeout": 3},
        ),
    ],
)
def test_start_up_parameters(
    url: str,
    options: dict[str, Any],
    environment: str,
    connect_args: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are added to the user's own, wherever these come from."""
    monkeypatch.setenv("PGOPTIONS", environment)
    ours = {"isolation_level": "X", "a": 1}
    kept = {"isolation_level": "SERIALIZABLE", "execution_options": ours}
    made = reader_options(parse(f"postgresql{url}", "test"), {**options, **kept})
    assert made == {
        "connect_args": connect_args,
        "isolation_level": "AUTOCOMMIT",
        "execution_options": {"a": 1},
    }
    assert ours == {"isolation_level": "X", "a": 1}


def test_what_is_no_verb_is_refused() -> None:
    """When the class is made, and with what to write."""
    with pytest.raises(ConfigurationError, match=r"on_message\(\) is no verb.*read_only=True"):

        class Socket(SessionWebSocketHandler):
            @read_only
            def on_message(self, message: Any) -> None: ...

    with pytest.raises(ConfigurationError, match=r"prepare\(\) is no verb"):

        class Prepares(SessionHandler):
            @read_only
            def prepare(self) -> None: ...

    with pytest.raises(ConfigurationError, match="@read_only is for the verbs of a handler"):
        read_only(True)  # type: ignore[call-overload]  # the mistake at hand
    for named in "GET", {"get"}, {"GET", "FETCH"}:
        with pytest.raises(ConfigurationError, match="read_only_methods is a set of HTTP methods"):
            type("Named", (SessionHandler,), {"read_only_methods": named})
