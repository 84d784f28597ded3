"""What a session would lose: flushed or pending, by objects, Core or text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import create_engine, delete, insert, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import NullPool

from tests.support import Base, Document, Flavour, Note, Reply, only
from tornado_sa.changes import uncommitted, watch_sessions, watch_writes, writing_word

KEY = 1_000_000  # not one that PostgreSQL hands out
Run = Callable[[Callable[[Session], Any]], Any]


@pytest.fixture
def run(flavour: Flavour, io_loop: Any) -> Run:
    """Call a function with a watched session, where it may do I/O."""

    class Watched(Session):
        pass

    watch_sessions(Watched)

    def call(function: Callable[[Session], Any]) -> Any:
        if not flavour.is_async:
            with Watched(flavour.sync_engine) as session:
                return function(session)

        async def call_async() -> Any:
            async with AsyncSession(flavour.db.engine, sync_session_class=Watched) as session:
                return await session.run_sync(function)

        return io_loop.run_sync(call_async)

    return call


@pytest.fixture
def note(flavour: Flavour) -> None:
    with flavour.admin.begin() as connection:
        connection.execute(insert(Note).values(id=KEY, text="one"))


def test_reading_loses_nothing(run: Run, note: None) -> None:
    """Nor does setting an attribute to what it was, nor asking twice."""

    def read(session: Session) -> None:
        assert uncommitted(session) is None
        session.execute(text("select 1"))
        session.scalars(select(Note)).one().text = "one"
        assert session.dirty
        assert uncommitted(session) is None
        session.flush()
        assert uncommitted(session) is None

    run(read)


def test_pending_and_flushed_objects_are_counted_together(run: Run, note: None) -> None:
    """An object is counted once, however often it was flushed."""

    def change(session: Session) -> str | None:
        one = session.get_one(Note, KEY)
        session.add(fresh := Note(text="two"))
        one.text = "first"
        assert uncommitted(session) == "1 new Note, 1 dirty Note"
        session.flush()
        assert uncommitted(session) == "1 new Note, 1 dirty Note"
        fresh.text = one.text = "again"
        session.flush()
        session.add_all([Note(text="three"), Document(text="", version=1)])
        session.delete(one)
        return uncommitted(session)

    expected = "2 new Note, 1 new Document, 1 dirty Note, 1 deleted Note"
    assert sorted(run(change).split(", ")) == sorted(expected.split(", "))


@pytest.mark.parametrize("end", [Session.commit, Session.rollback, Session.close])
def test_the_end_of_the_transaction_ends_the_count(run: Run, note: None, end: Any) -> None:
    def write(session: Session) -> None:
        session.add(Note(text="two"))
        session.flush()
        session.execute(update(Note).values(text="all"))
        assert uncommitted(session) == "1 new Note, UPDATE of note by Core"
        end(session)
        assert uncommitted(session) is None
        session.execute(select(1))  # most likely over the same connection
        assert uncommitted(session) is None

    run(write)


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        (insert(Note).values(text="two"), "INSERT into note by Core"),
        (update(Note).values(text="all"), "UPDATE of note by Core"),
        (delete(Note).where(Note.id == KEY), "DELETE from note by Core"),
        (insert(Base.metadata.tables["note"]).values(text="two"), "INSERT into note by Core"),
        (text("insert into note (text) values ('two')"), "INSERT by text()"),
        (text(" -- why\n /* and how */ UPDATE note SET text = 'all'"), "UPDATE by text()"),
        (select(Note), None),
        (select(Note).with_for_update(), None),
        (select(select(Note).cte()), None),
        (text("WITH x AS (SELECT 'a (insert into b') SELECT * FROM x"), None),
    ],
)
def test_statements(run: Run, note: None, statement: Any, says: str | None) -> None:
    def execute(session: Session) -> str | None:
        session.execute(statement)
        return uncommitted(session)

    assert run(execute) == says


def test_many_rows_and_raw_connections(run: Run) -> None:
    """Executemany in its ways, the bulk methods, and the session's own connection."""

    def write(session: Session) -> None:
        session.execute(insert(Note), [{"text": "a"}, {"text": "b"}])
        assert uncommitted(session) == "INSERT into note by Core"
        session.rollback()
        session.bulk_insert_mappings(Note.__mapper__, [{"text": "a"}, {"text": "b"}])
        assert uncommitted(session) == "INSERT into note by Core"
        session.rollback()
        session.connection().exec_driver_sql("DELETE FROM note")
        assert uncommitted(session) == "DELETE by text()"

    run(write)


@only("psycopg", "asyncpg", "psycopg_async")
def test_ddl_is_lost_too(run: Run) -> None:
    def create(session: Session) -> str | None:
        session.execute(text("CREATE TEMPORARY TABLE t (id int)"))
        return uncommitted(session)

    assert run(create) == "CREATE by text()"


@only("psycopg", "asyncpg", "psycopg_async")
def test_with_that_writes(run: Run) -> None:
    """Only PostgreSQL selects from an INSERT."""
    cte = insert(Note).values(text="two").returning(Note.id).cte("added")

    def write(session: Session) -> None:
        session.execute(select(cte.c.id))
        assert uncommitted(session) == "INSERT by Core"
        session.rollback()
        session.execute(text("WITH x AS (SELECT 1) DELETE FROM note"))
        assert uncommitted(session) == "DELETE by text()"

    run(write)


@only("sqlite", "aiosqlite")
def test_what_sqlite_stored_already_is_not_lost(flavour: Flavour, run: Run, note: None) -> None:
    """Python's driver begins no transaction before DDL, nor before WITH."""

    def write(session: Session) -> str | None:
        session.execute(text("WITH x AS (SELECT 1) DELETE FROM note"))
        session.execute(text("CREATE TABLE t (id INTEGER)"))
        return uncommitted(session)

    assert run(write) is None
    assert flavour.texts() == []


def test_a_statement_that_failed_wrote_nothing(run: Run, note: None) -> None:
    def fail(session: Session) -> str | None:
        with pytest.raises(IntegrityError):
            session.execute(insert(Note).values(id=KEY, text="twice"))
        return uncommitted(session)

    assert run(fail) is None


def test_a_failed_flush_hides_nothing(run: Run, note: None) -> None:
    """Core work before and after a flush that fails in a savepoint is still there."""

    def fail(session: Session) -> None:
        session.execute(update(Note).values(text="all"))
        with pytest.raises(IntegrityError), session.begin_nested():
            session.add(Note(id=KEY, text="twice"))
            session.flush()
        assert "UPDATE of note by Core" in str(uncommitted(session))
        session.execute(delete(Note))
        assert "DELETE from note by Core" in str(uncommitted(session))

    run(fail)


def test_a_savepoint_does_not_end_the_count(run: Run) -> None:
    def nest(session: Session) -> str | None:
        session.add(Note(text="two"))
        with session.begin_nested():
            session.execute(insert(Note).values(text="three"))
        return uncommitted(session)

    assert run(nest) == "1 new Note, INSERT into note by Core"


def test_autocommit_has_nothing_to_lose(run: Run) -> None:
    """But an object that was not flushed yet is lost there too."""

    def write(session: Session) -> None:
        session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        session.execute(insert(Note).values(text="two"))
        session.add(Note(text="three"))
        assert uncommitted(session) == "1 new Note"
        session.flush()
        assert uncommitted(session) is None
        session.rollback()

    run(write)


def test_autocommit_engine_has_nothing_to_lose(flavour: Flavour, io_loop: Any) -> None:
    class Watched(Session):
        pass

    watch_sessions(Watched)
    options: Any = {"isolation_level": "AUTOCOMMIT", "poolclass": NullPool}

    def write(session: Session) -> str | None:
        session.add(Note(text="two"))
        session.flush()
        return uncommitted(session)

    async def write_async() -> str | None:
        engine = create_async_engine(flavour.sync_engine.url, **options)
        async with AsyncSession(engine, sync_session_class=Watched) as session:
            return await session.run_sync(write)

    if flavour.is_async:
        assert io_loop.run_sync(write_async) is None
    else:
        with Watched(create_engine(flavour.sync_engine.url, **options)) as session:
            assert write(session) is None
    assert flavour.texts() == ["two"]


@pytest.mark.gen_test
async def test_asking_takes_no_greenlet(flavour: Flavour) -> None:
    """Nor a connection, nor an open session."""
    session: Any = Session(flavour.sync_engine, close_resets_only=False)
    session.add(Note(text="two"))
    assert uncommitted(session) == "1 new Note"
    session.expunge_all()
    assert uncommitted(session) is None
    session.close()
    assert uncommitted(session) is None


@only("aiosqlite", "asyncpg", "psycopg_async")
@pytest.mark.gen_test
async def test_asking_with_expired_objects_and_a_transaction(flavour: Flavour, note: None) -> None:
    """An attribute set on an expired object is a change, and nothing is loaded to find out."""
    sessions = sessionmaker()
    watch_sessions(sessions)
    made_by: Any = sessions  # any callable will do, though a class is what is declared
    async with AsyncSession(flavour.db.engine, sync_session_class=made_by) as session:
        one = await session.get_one(Note, KEY)
        await session.execute(update(Note).values(text="all"))
        session.expire(one)
        one.text = "other"
        assert uncommitted(session.sync_session) == "1 dirty Note, UPDATE of note by Core"


@only("sqlite", "psycopg")
def test_two_engines_in_one_session(flavour: Flavour, tmp_path: Any) -> None:
    """Both are watched, though only the session was asked to be."""
    other = create_engine(f"sqlite:///{tmp_path / 'other.db'}")
    Base.metadata.create_all(other)
    sessions = sessionmaker(binds={Note: flavour.sync_engine, Document: other, Reply: other})
    watch_sessions(sessions)
    with sessions() as session:
        session.execute(select(Note))
        session.add(Document(text="", version=1))
        session.flush()
        assert uncommitted(session) == "1 new Document"
        session.execute(delete(Reply))
        session.execute(delete(Note))
        expected = "1 new Document, DELETE from reply by Core, DELETE from note by Core"
        assert uncommitted(session) == expected
        session.rollback()
        assert uncommitted(session) is None
    other.dispose()


@only("sqlite", "psycopg")
def test_a_session_on_a_connection_of_its_callers(flavour: Flavour) -> None:
    """What was written there before and after the session's transaction is not the session's."""
    sessions = sessionmaker()
    watch_sessions(sessions)
    with flavour.sync_engine.connect() as connection:
        connection.execute(insert(Note).values(text="before"))
        with sessions(bind=connection, join_transaction_mode="create_savepoint") as session:
            session.execute(select(1))
            assert uncommitted(session) is None
            session.execute(insert(Note).values(text="in it"))
            assert uncommitted(session) == "INSERT into note by Core"
            session.commit()
            connection.execute(insert(Note).values(text="after"))
            assert uncommitted(session) is None
        with sessions(bind=connection) as session:
            session.execute(select(1))
            assert uncommitted(session) is None
        connection.rollback()


@only("sqlite", "psycopg")
def test_sessions_do_not_see_each_others_work(flavour: Flavour) -> None:
    """Nor what Core code writes over a connection that a session had before."""
    sessions = sessionmaker(flavour.sync_engine)
    watch_sessions(sessions)
    with sessions() as reader:
        reader.execute(select(Note))
        reader.commit()
        with sessions.begin() as writer:
            writer.add(Note(text="two"))
            writer.flush()
            assert uncommitted(reader) is None
        with flavour.sync_engine.begin() as connection:
            connection.execute(delete(Note))
            assert uncommitted(reader) is None


def test_an_invalidated_connection_is_not_asked(run: Run) -> None:
    def invalidate(session: Session) -> str | None:
        session.add(Note(text="two"))
        session.flush()
        session.connection().invalidate()
        lost = uncommitted(session)
        session.rollback()
        assert uncommitted(session) is None
        return lost

    assert run(invalidate) == "1 new Note"


@only("sqlite")
def test_watching_twice_is_watching_once(flavour: Flavour) -> None:
    engine = flavour.sync_engine
    watch_writes(engine)
    watched = engine.dialect.execution_ctx_cls
    watch_writes(engine)
    watch_writes(engine.execution_options(schema_translate_map={}))
    assert engine.dialect.execution_ctx_cls is watched


@pytest.mark.parametrize(
    ("statement", "verb"),
    [
        ("INSERT INTO a VALUES (1)", "INSERT"),
        ("\n((Replace into a values (1)", "REPLACE"),
        ("/* insert */ select 1", None),
        ("-- delete\nMERGE INTO a USING b", "MERGE"),
        ("Truncate a", "TRUNCATE"),
        ("INSERTED", None),
        ("", None),
        ("WITH x AS (UPDATE a SET b = 1 RETURNING *) SELECT * FROM x", "UPDATE"),
        ("WITH x AS (SELECT 1) /* c */ INSERT INTO a SELECT * FROM x", "INSERT"),
        ("WITH x AS (SELECT replace(a, 'b', 'c')) SELECT * FROM x FOR UPDATE", None),
        ("WITH x AS (SELECT 'it''s (delete from y') SELECT (1) -- (insert into\n", None),
        ('WITH x AS (SELECT 1 AS "(insert ") SELECT * FROM x', None),
        ("EXPLAIN INSERT INTO a VALUES (1)", None),
        ("(" * 5000 + " " * 5000 + "SELECT", None),
    ],
)
def test_which_text_writes(statement: str, verb: str | None) -> None:
    assert writing_word(statement) == verb


@only("psycopg", "asyncpg", "psycopg_async")
def test_a_function_that_writes_is_not_seen(run: Run) -> None:
    """The documented limit: what a SELECT calls is not known here."""

    def call(session: Session) -> str | None:
        session.execute(text("SELECT lo_create(0)"))
        return uncommitted(session)

    assert run(call) is None
