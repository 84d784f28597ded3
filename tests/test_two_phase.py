"""Two-phase commit: whatever crashes, both databases agree after ``recover()``."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, Engine, create_engine, event, insert, inspect, select, text
from sqlalchemy.exc import DBAPIError, IllegalStateChangeError
from sqlalchemy.orm import Session

from tests.cluster import Cluster
from tests.support import missing, settle
from tests.transfer import (
    STEPS,
    Account,
    Base,
    OtherAccount,
    OtherBase,
    at,
    make,
    move,
    transfer,
)
from tornado_sa import AsyncDatabase, ConfigurationError, Database, TornadoSAError
from tornado_sa.__main__ import main
from tornado_sa.decisions import TABLE

MARIADB = URL.create("mysql+pymysql", "root", None, "127.0.0.1", 3306, "test")
ROOT = Path(__file__).parents[1]
DRIVERS = {
    "sync": {"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql"},
    "async": {"postgresql": "postgresql+psycopg", "mysql": "mysql+aiomysql"},
}
DRIVERS["bridged"] = DRIVERS["async"]


class Pair:
    """Two databases with an account each, and the test's own connections to them."""

    def __init__(self, flavour: str, urls: list[URL]) -> None:
        self.flavour = flavour
        drivers = DRIVERS[flavour]
        self.urls = [
            url.set(drivername=drivers[url.get_backend_name()]).render_as_string(False)
            for url in urls
        ]
        self.admins = [create_engine(url) for url in urls]
        Base.metadata.create_all(self.admins[0])
        OtherBase.metadata.create_all(self.admins[1])
        with Session(self.admins[0]) as session, Session(self.admins[1]) as other:
            session.add(Account(id=1, amount=100))
            other.add(OtherAccount(id=1, amount=100))
            session.commit()
            other.commit()

    def make(self) -> Any:
        return make(self.flavour, *self.urls)

    def amounts(self) -> tuple[int, int]:
        """What is in the accounts. Waits for whoever still writes there."""
        with Session(self.admins[0]) as session, Session(self.admins[1]) as other:
            one = session.execute(select(Account.amount).with_for_update()).scalar_one()
            two = other.execute(select(OtherAccount.amount).with_for_update()).scalar_one()
            return one, two

    def listed(self) -> list[str]:
        """All that is in doubt: in both databases on PostgreSQL, on the whole server on MariaDB."""
        return list(dict.fromkeys(self.listed_in(0) + self.listed_in(1)))

    def listed_in(self, number: int) -> list[str]:
        found: list[str] = []
        for admin in self.admins[number : number + 1]:
            with admin.connect() as connection:
                if admin.dialect.name == "postgresql":
                    found += connection.scalars(
                        text("SELECT gid FROM pg_prepared_xacts WHERE database=current_database()")
                    )
                else:
                    found += [row[3].decode() for row in connection.execute(text("XA RECOVER"))]
        return found

    def in_doubt(self) -> list[str]:
        """What is in doubt and ours: other tests may be running on the server."""
        with self.admins[0].connect() as connection:
            if not inspect(connection).has_table(TABLE.name):
                return []
            query = select(TABLE.c.decision).where(TABLE.c.xid == "realm")
            start = f"tornado_sa-{connection.scalar(query)}-"
        return [xid for xid in self.listed() if xid.startswith(start)]

    def decisions(self) -> list[str]:
        with self.admins[0].connect() as connection:
            return list(connection.scalars(select(TABLE.c.decision).where(TABLE.c.xid != "realm")))

    def start(self, step: str, what: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [
                *(sys.executable, "-W", "error", "-m", "tests.transfer"),
                *(self.flavour, *self.urls, step, what),
            ],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def crash(self, step: str) -> None:
        with self.start(step, "kill") as process:
            process.communicate(timeout=30)
        assert process.returncode == -signal.SIGKILL

    def run(self, work: Any) -> Any:
        """``await work(db)`` with a database of this process."""

        async def with_database() -> Any:
            db = self.make()
            try:
                return await work(db)
            finally:
                await settle(db.dispose())

        return asyncio.run(with_database())

    def recover(self) -> Any:
        return self.run(lambda db: _awaited(db.recover()))


async def _awaited(value: Any) -> Any:
    return await settle(value)


def new_database(server: URL) -> URL:
    name = f"tornado_sa_{uuid.uuid4().hex[:12]}"
    admin = create_engine(server, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    admin.dispose()
    return server.set(database=name)


def drop_database(server: URL, url: URL) -> None:
    admin = create_engine(server, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        force = " WITH (FORCE)" if url.get_backend_name() == "postgresql" else ""
        connection.execute(text(f"DROP DATABASE {url.database}{force}"))
    admin.dispose()


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    flavour, *backends = request.param
    urls = []
    servers = []
    for backend in backends:
        if backend == "postgresql":
            cluster: Cluster = request.getfixturevalue("cluster")
            server = cluster.url("postgresql+psycopg")
        else:
            server = MARIADB
            try:
                if flavour != "sync":
                    __import__("aiomysql")
                create_engine(server).connect().close()
            except (ImportError, DBAPIError) as error:
                missing("mariadb", error)
        servers.append(server)
        urls.append(new_database(server))
    pair = Pair(flavour, urls)
    yield pair
    left = pair.in_doubt()
    for admin in pair.admins:
        for xid in left:  # of a test that failed; its locks would be in the way
            with contextlib.suppress(DBAPIError):
                _roll_back(admin, xid)
        admin.dispose()
    for server, url in zip(servers, urls, strict=True):
        drop_database(server, url)
    assert left == []


PG = "postgresql"
ALL = [
    ("sync", PG, PG),
    ("sync", PG, "mysql"),
    ("sync", "mysql", PG),
    ("sync", "mysql", "mysql"),
    ("async", PG, PG),
    ("bridged", PG, PG),
    ("bridged", PG, "mysql"),
]


def on(*pairs: tuple[str, str, str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("pair", pairs, indirect=True, ids="-".join)


FLAVOURS = on(("sync", PG, PG), ("async", PG, PG), ("bridged", PG, PG))
SYNC = on(("sync", PG, PG))


@on(*ALL)
def test_both_commit(pair: Pair) -> None:
    pair.run(lambda db: transfer(pair.flavour, db))
    assert pair.amounts() == (90, 110)
    assert pair.in_doubt() == []
    assert pair.decisions() == []  # the database has tidied up as it was disposed of


@on(*ALL)
@pytest.mark.parametrize("step", [step for step in STEPS if step != "never"])
def test_killed_at_any_step_both_agree(pair: Pair, step: str) -> None:
    pair.crash(step)
    before = pair.in_doubt()
    pair.recover()
    committed = step in ("after the decision", "between the commits")
    assert pair.amounts() == ((90, 110) if committed else (100, 100))
    assert pair.in_doubt() == []
    expected = {"before the first prepare": 0, "between the prepares": 1, "between the commits": 1}
    assert len(before) == expected.get(step, 2)
    # and again: nothing is left to do, and the next transfer goes through
    assert pair.recover() == []
    pair.run(lambda db: transfer(pair.flavour, db))
    assert sum(pair.amounts()) == 200


@on(*ALL)
def test_recover_before_the_decision_of_a_living_process(
    pair: Pair, expected_log: list[str]
) -> None:
    with pair.start("before the decision", "wait") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        ended = pair.recover()
        assert {one.decision for one in ended} <= {"abort"}
        held = 2 - len(ended)  # on MariaDB its connection alone can end it
        expected_log += ["is still held by the process"] * held
        assert held == sum(engine.dialect.name == "mysql" for engine in pair.admins)
        said = process.communicate("\n", timeout=30)[0]
    assert "was rolled back in all databases" in said
    assert pair.amounts() == (100, 100)
    assert pair.in_doubt() == []


@on(*ALL)
def test_recover_after_the_decision_of_a_living_process(
    pair: Pair, expected_log: list[str]
) -> None:
    with pair.start("after the decision", "wait") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        ended = pair.recover()
        expected_log += ["is still held by the process"] * (2 - len(ended))
        said = process.communicate("\n", timeout=30)[0]
    assert said == "stored\n"  # and not an error, although somebody else has committed
    assert pair.amounts() == (90, 110)
    assert pair.in_doubt() == []


@FLAVOURS
def test_an_error_before_the_commit_rolls_both_back(pair: Pair) -> None:
    async def work(db: Any) -> None:
        def fail(*_: Any) -> None:
            raise ValueError

        at(db, "between the prepares", fail)
        # SQLAlchemy 2.0.31 stumbles over its own rollback, and reports that instead.
        with pytest.raises((ValueError, IllegalStateChangeError)):
            await transfer(pair.flavour, db)

    pair.run(work)
    assert pair.amounts() == (100, 100)
    assert pair.in_doubt() == []


def kill_backends(pair: Pair) -> None:
    """Cut all other connections to both PostgreSQL databases."""
    for admin in pair.admins:
        with admin.connect() as connection:
            connection.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            )


@FLAVOURS
@pytest.mark.parametrize("step", ["after the decision", "between the commits"])
def test_connections_lost_after_the_decision_are_replaced(pair: Pair, step: str) -> None:
    async def work(db: Any) -> None:
        at(db, step, lambda *_: kill_backends(pair))
        await transfer(pair.flavour, db)

    pair.run(work)
    assert pair.amounts() == (90, 110)
    assert pair.in_doubt() == []


@FLAVOURS
def test_connections_lost_before_the_decision(pair: Pair) -> None:
    """What can be, is rolled back; the rest is left in doubt until recover()."""

    async def work(db: Any) -> None:
        at(db, "before the decision", lambda *_: kill_backends(pair))
        await transfer(pair.flavour, db)

    pair.run(work)  # the connection of the decision is a new one, and so are those of the commits
    assert pair.amounts() == (90, 110)
    assert pair.in_doubt() == []


@SYNC
def test_a_decision_whose_answer_is_lost_is_asked_for_again(pair: Pair) -> None:
    async def work(db: Any) -> None:
        lost: list[str] = []

        def lose(connection: Any) -> None:
            if not lost:
                lost.append("once")
                connection.exec_driver_sql("COMMIT")  # it is stored, and nobody hears of it
                kill_backends(pair)

        db._decisions.new_gid()  # makes the table
        event.listen(db._decisions.engine, "commit", lose)
        await transfer(pair.flavour, db)
        assert lost

    pair.run(work)
    assert pair.amounts() == (90, 110)
    assert pair.in_doubt() == []


class Broken(Exception):
    pass


@FLAVOURS
def test_nobody_knows_the_decision(pair: Pair, expected_log: list[str]) -> None:
    """The first database is gone: nothing is undone, for the decision may have been stored."""

    async def work(db: Any) -> None:
        def refuse(*_: Any) -> None:
            raise Broken

        def shut(*_: Any) -> None:
            event.listen(db._decisions.engine, "before_cursor_execute", refuse)

        at(db, "before the decision", shut)
        with pytest.raises(Broken) as caught:
            await transfer(pair.flavour, db)
        notes = " ".join(getattr(caught.value, "__notes__", []))
        assert notes.count("may be in doubt") == 2
        event.remove(db._decisions.engine, "before_cursor_execute", refuse)

    expected_log += ["may be in doubt"] * 2
    pair.run(work)
    assert len(pair.in_doubt()) == 2
    pair.recover()
    assert pair.amounts() == (100, 100)


@SYNC
def test_a_commit_that_fails_after_the_decision(pair: Pair, expected_log: list[str]) -> None:
    """The other branch is committed, and recover() commits the one that failed."""

    async def work(db: Any) -> None:
        second = db.binds[OtherBase]

        def refuse(*_: Any) -> None:
            raise Broken

        def shut(connection: Any, _xid: Any, _prepared: Any) -> None:
            event.listen(second, "do_connect", refuse)  # no other connection either
            kill_backends(pair)

        event.listen(second, "commit_twophase", shut)
        with pytest.raises(DBAPIError) as caught:
            await transfer("sync", db)
        assert "decision: commit" in caught.value.__notes__[0]
        event.remove(second, "do_connect", refuse)

    expected_log += ["may be in doubt"]
    pair.run(work)
    assert len(pair.in_doubt()) == 1
    with Session(pair.admins[0]) as session:
        assert session.scalars(select(Account.amount)).all() == [90]
    (ended,) = pair.recover()
    assert ended.decision == "commit"
    assert pair.amounts() == (90, 110)


def _roll_back(admin: Engine, xid: str) -> None:
    with admin.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        way = "ROLLBACK PREPARED" if admin.dialect.name == "postgresql" else "XA ROLLBACK"
        connection.exec_driver_sql(f"{way} '{xid}'")


@on(("sync", PG, PG), ("sync", PG, "mysql"))
def test_ids_of_others_are_left_alone(pair: Pair) -> None:
    pair.run(lambda db: transfer(pair.flavour, db))  # so that there is a table of decisions
    mine = uuid.uuid4().hex
    for admin, table in zip(pair.admins, (Account, OtherAccount), strict=True):
        for number, start in enumerate(("foreign-", f"tornado_sa-{'0' * 12}-")):
            connection = admin.connect()
            transaction = connection.begin_twophase(f"{start}{mine}-{pair.admins.index(admin)}")
            connection.execute(insert(table).values(id=7 + number, amount=1))
            transaction.prepare()
            connection.invalidate()
            connection.close()
    before = {xid for xid in pair.listed() if mine in xid}
    assert len(before) == 4
    assert pair.recover() == []
    assert {xid for xid in pair.listed() if mine in xid} == before

    async def resolve(db: Any) -> None:
        listed = {one.xid: one for one in db.in_doubt()}
        for xid in before:
            assert not listed[xid].ours
            if xid.startswith("foreign"):
                db.resolve(xid, commit=False)
            else:  # of this package, in another application
                with pytest.raises(TornadoSAError, match="kept in another database"):
                    db.resolve(xid, commit=False)
                _roll_back(pair.admins[int(xid[-1])], xid)

    pair.run(resolve)
    assert [xid for xid in pair.listed() if mine in xid] == []


@FLAVOURS
@pytest.mark.parametrize("commit", [True, False])
def test_resolve_by_hand_ends_all_branches(pair: Pair, commit: bool) -> None:
    pair.crash("before the decision")
    xid = pair.in_doubt()[0]

    async def resolve(db: Any) -> None:
        first, second = await settle(db.in_doubt())
        assert first.ours and second.ours and first.decision is None
        assert len(await settle(db.resolve(xid, commit=commit))) == 2
        with pytest.raises(TornadoSAError, match="in doubt here"):
            await settle(db.resolve(xid, commit=commit))

    pair.run(resolve)
    assert pair.amounts() == ((90, 110) if commit else (100, 100))


@on(("async", PG, PG), ("bridged", PG, PG), ("async", PG, "mysql"))
@pytest.mark.parametrize(
    "step", ["before the decision", "after the decision", "between the commits"]
)
def test_a_commit_that_is_cancelled(
    pair: Pair, step: str, caplog: pytest.LogCaptureFixture
) -> None:
    """All or nothing, and nothing is left in doubt."""
    # psycopg says that a COMMIT PREPARED cannot be cancelled, which is as well.
    caplog.set_level(logging.ERROR, logger="psycopg")

    async def work(db: Any) -> None:
        task = asyncio.create_task(transfer(pair.flavour, db))
        at(db, step, lambda *_: task.cancel())
        with pytest.raises(asyncio.CancelledError):
            await task

    pair.run(work)
    assert pair.amounts() == ((100, 100) if step == "before the decision" else (90, 110))
    assert pair.in_doubt() == []


@SYNC
def test_resolve_from_the_command_line_wants_the_first_database(
    pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    pair.crash("before the decision")
    second = next(xid for xid in pair.in_doubt() if xid in pair.listed_in(1))
    assert main(["in-doubt", *pair.urls]) == 1
    assert main(["resolve", pair.urls[1], second, "--commit"]) == 1
    assert "kept in another database" in capsys.readouterr().err
    assert main(["resolve", *pair.urls, second, "--commit"]) == 0
    assert capsys.readouterr().out.count("\tcommit\n") == 2
    assert pair.amounts() == (90, 110)


@SYNC
def test_resolve_does_not_contradict_the_decision(pair: Pair) -> None:
    pair.crash("between the commits")

    async def resolve(db: Any) -> None:
        with pytest.raises(TornadoSAError, match="has been made: commit"):
            db.resolve(pair.in_doubt()[0], commit=False)

    pair.run(resolve)
    pair.recover()
    assert pair.amounts() == (90, 110)


@SYNC
def test_one_database_needs_no_decision(pair: Pair) -> None:
    async def work(db: Any) -> None:
        seen: list[str] = []
        with db.begin() as session:
            session.get(Account, 1).amount = 1
        event.listen(
            db._decisions.engine, "before_cursor_execute", lambda *call: seen.append(call[2])
        )
        with db.begin() as session:
            session.get(Account, 1).amount = 2
        assert seen == []

    pair.run(work)
    assert pair.amounts() == (2, 100)


@SYNC
def test_a_transaction_begun_by_hand_is_not_ours(pair: Pair) -> None:
    async def work(db: Any) -> None:
        with db.begin() as session:
            move(session)
            session.get_bind(Account)
            with db.engine.connect() as connection, connection.begin_twophase() as transaction:
                assert not transaction.xid.startswith("tornado_sa")
                transaction.rollback()

    pair.run(work)


@SYNC
def test_an_engine_outside_of_binds_is_refused(pair: Pair) -> None:
    async def work(db: Any) -> None:
        with (
            db.scope() as session,
            pytest.raises(ConfigurationError, match="not one of this database's `binds`"),
        ):
            session.connection(bind_arguments={"bind": pair.admins[1]})

    pair.run(work)


@SYNC
def test_a_full_pool_does_not_wait_for_its_own_decision(pair: Pair) -> None:
    async def work(_: Any) -> None:
        db = Database(
            pair.urls[0],
            binds={OtherBase: pair.urls[1]},
            engine_options={"pool_size": 1, "max_overflow": 0},
            session_options={"twophase": True},
        )
        await transfer("sync", db)
        assert db.status().pool_size == 2
        db.dispose()

    pair.run(work)
    assert pair.amounts() == (90, 110)


@on(("async", PG, PG))
def test_small_pools_and_many_units_at_once(pair: Pair) -> None:
    async def work(_: Any) -> None:
        db = AsyncDatabase(
            pair.urls[0],
            binds={OtherBase: pair.urls[1]},
            engine_options={"pool_size": 2, "max_overflow": 0},
            session_options={"twophase": True},
        )
        await asyncio.gather(*(transfer("async", db) for _ in range(16)))
        assert db.status().checked_out == 0
        await db.dispose()

    pair.run(work)
    assert pair.amounts() == (100 - 160, 100 + 160)


@SYNC
def test_one_database_whose_commit_is_lost(pair: Pair, expected_log: list[str]) -> None:
    """Nothing was decided, so recover() rolls it back, and the log does not say otherwise."""

    async def work(db: Any) -> None:
        at(db, "after the decision", lambda *_: kill_backends(pair))
        with pytest.raises(DBAPIError) as caught, db.begin() as session:
            session.get(Account, 1).amount = 1
        assert "decision: None" in caught.value.__notes__[0]

    expected_log += ["decision: None"]
    pair.run(work)
    assert len(pair.in_doubt()) == 1
    pair.recover()
    assert pair.amounts() == (100, 100)


@FLAVOURS
def test_many_commits_leave_few_rows(pair: Pair) -> None:
    async def work(db: Any) -> None:
        for _ in range(101):
            await transfer(pair.flavour, db)
        assert len(pair.decisions()) == 1

    pair.run(work)
    assert pair.amounts() == (100 - 1010, 100 + 1010)
    assert pair.decisions() == []


@SYNC
def test_two_processes_may_make_the_table_at_once(pair: Pair) -> None:
    processes = [pair.start("never", "wait") for _ in range(3)]
    for process in processes:
        assert process.communicate(timeout=30)[0] == "stored\n"
    assert pair.amounts() == (70, 130)


@SYNC
def test_who_may_not_make_the_table_is_told_what_to_execute(pair: Pair) -> None:
    role = f"r{uuid.uuid4().hex[:12]}"
    for admin, table in zip(pair.admins, ("account", "other_account"), strict=True):
        with admin.begin() as connection:
            if admin is pair.admins[0]:
                connection.execute(text(f"CREATE ROLE {role} LOGIN"))
            connection.execute(text(f"GRANT ALL ON {table} TO {role}"))
            connection.execute(text("REVOKE CREATE ON SCHEMA public FROM PUBLIC"))
    urls = [str(engine.url.set(username=role)) for engine in pair.admins]
    db = make("sync", *urls)
    with pytest.raises(ConfigurationError, match="CREATE TABLE tornado_sa_decision"):
        asyncio.run(transfer("sync", db))
    db.dispose()
    assert pair.amounts() == (100, 100)


@pytest.mark.parametrize(
    ("kind", "url", "words"),
    [
        (Database, "sqlite:///x.db", "PostgreSQL, MySQL and MariaDB"),
        (AsyncDatabase, "sqlite+aiosqlite:///x.db", "PostgreSQL, MySQL and MariaDB"),
        (AsyncDatabase, "postgresql+asyncpg://u:secret@h/d", r"Write postgresql\+psycopg"),
    ],
)
def test_drivers_without_two_phase_commit_are_refused(kind: Any, url: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as caught:
        kind(url, session_options={"twophase": True})
    assert "secret" not in str(caught.value)


def test_a_second_database_without_two_phase_commit_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="sqlite"):
        Database(
            "postgresql+psycopg://h/d",
            binds={OtherBase: "sqlite:///x.db"},
            session_options={"twophase": True},
        )
