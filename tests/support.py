"""What the tests share: a small model, the databases it runs on, and a client that misbehaves."""

from __future__ import annotations

import asyncio
import inspect
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar, NoReturn, TypeVar

import pytest
import tornado
from sqlalchemy import Engine, ForeignKey, String, Text, event
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from tornado_sa import (
    AsyncDatabase,
    AsyncSessionHandler,
    Database,
    SessionHandler,
)

T = TypeVar("T")


class Base(DeclarativeBase):
    # MariaDB has no VARCHAR without a length.
    type_annotation_map: ClassVar = {str: String().with_variant(Text(), "mysql", "mariadb")}


class Note(Base):
    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]
    replies: Mapped[list[Reply]] = relationship(back_populates="note")


class Reply(Base):
    """Its foreign key is checked at COMMIT, which is how a COMMIT is made to fail."""

    __tablename__ = "reply"

    id: Mapped[int] = mapped_column(primary_key=True)
    note_id: Mapped[int] = mapped_column(
        ForeignKey("note.id", deferrable=True, initially="DEFERRED")
    )
    note: Mapped[Note] = relationship(back_populates="replies")


class Document(Base):
    """Has a version counter, so that a lost update is a StaleDataError."""

    __tablename__ = "document"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]
    version: Mapped[int] = mapped_column()
    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012  (SQLAlchemy's own form)


def check_foreign_keys(engine: Engine) -> None:
    """SQLite checks foreign keys only when it is asked to, on each connection."""

    @event.listens_for(engine, "connect")
    def ask(connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()


class Flavour:
    """A database, the handler class that goes with it, and a way to look at its rows."""

    def __init__(self, name: str, db: Any, admin: Engine) -> None:
        self.name = name
        self.db = db
        self.admin = admin
        self.is_async = isinstance(db, AsyncDatabase)
        self.is_bridged = name.startswith("bridged")
        awaits = self.is_async and not self.is_bridged
        self.Handler: Any = AsyncSessionHandler if awaits else SessionHandler

    @property
    def session(self) -> Any:
        """The proxy that leads to what ``self.session`` is in a handler of this flavour."""
        return self.db.session if self.is_async and not self.is_bridged else self.db.sync_session

    @property
    def sync_engine(self) -> Engine:
        engine: Engine = self.db.engine.sync_engine if self.is_async else self.db.engine
        return engine

    @property
    def sync_engines(self) -> list[Engine]:
        """The engine, and the reader."""
        reader = self.db.reader
        return [self.sync_engine, reader.sync_engine if self.is_async else reader]

    @property
    def dialect(self) -> str:
        return self.sync_engine.dialect.name

    def texts(self) -> list[str]:
        """The committed notes, read over a connection of the test's own."""
        with self.admin.connect() as connection:
            return list(connection.scalars(Note.__table__.select().with_only_columns(Note.text)))

    def checked_out(self) -> int:
        # Not every Pool counts; those of the flavours do.
        pools: list[Any] = [self.db.engine.pool, self.db.reader.pool]
        return sum(pool.checkedout() for pool in pools)

    async def in_scope(self, function: Callable[[Any], Any], *, commit: bool = False) -> Any:
        """Call ``function(session)`` in a unit of work of its own."""
        block = self.db.begin("test") if commit else self.db.scope("test")
        if self.is_async:
            async with block as session:
                return await settle(function(session))
        with block as session:
            return await settle(function(session))

    async def dispose(self) -> None:
        await settle(self.db.dispose())


# The flavours by name: driver of the application, driver of the test's own connection.
SYNC = ["sqlite", "psycopg"]
ASYNC = ["aiosqlite", "asyncpg", "psycopg_async"]
BRIDGED = ["bridged_aiosqlite", "bridged_asyncpg", "bridged_psycopg"]
MARIADB = ["pymysql", "aiomysql", "bridged_aiomysql"]  # for tests that ask for them
POSTGRESQL = ["psycopg", "asyncpg", "psycopg_async", "bridged_asyncpg", "bridged_psycopg"]
DRIVERS = {
    "sqlite": "sqlite",
    "psycopg": "postgresql+psycopg",
    "aiosqlite": "sqlite+aiosqlite",
    "asyncpg": "postgresql+asyncpg",
    "psycopg_async": "postgresql+psycopg",
    "bridged_aiosqlite": "sqlite+aiosqlite",
    "bridged_asyncpg": "postgresql+asyncpg",
    "bridged_psycopg": "postgresql+psycopg",
    "pymysql": "mariadb+pymysql",
    "aiomysql": "mariadb+aiomysql",
    "bridged_aiomysql": "mariadb+aiomysql",
}


def make_database(name: str, url: str, **options: Any) -> Any:
    """Make the database of a flavour, with SQLite's foreign keys checked."""
    is_sync = name in (*SYNC, "pymysql")
    made: Any = Database(url, **options) if is_sync else AsyncDatabase(url, **options)
    if "sqlite" in url:
        check_foreign_keys(made.engine if is_sync else made.engine.sync_engine)
    return made


# Tornado 6.5 itself logs, through asyncio, that a handler was cancelled.
CANCELLED_LOG = [] if tornado.version_info >= (6, 6) else ["Exception in callback _HandlerDelegate"]


def only(*names: str) -> pytest.MarkDecorator:
    """Run the test on these flavours only."""
    return pytest.mark.parametrize("flavour", names, indirect=True)


def with_options(**options: Any) -> Callable[[T], T]:
    """Run the test on databases made with these options."""

    def mark(function: T) -> T:
        setattr(function, "database_options", options)  # noqa: B010  (mypy: no such attribute)
        return function

    return mark


async def settle(value: Awaitable[T] | T) -> T:
    """Await ``value`` if it wants to be: one test for both flavours."""
    if inspect.isawaitable(value):
        return await value
    return value


async def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    """Wait until ``condition()`` holds; fail when ``seconds`` have passed."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        if asyncio.get_running_loop().time() > deadline:
            pytest.fail(f"not so after {seconds} s: {inspect.getsource(condition).strip()}")
        await asyncio.sleep(0.005)


def proxy(handler: Any) -> Any:
    """The proxy that leads to the session of ``handler``, from anywhere below it."""
    is_async = isinstance(handler, AsyncSessionHandler)
    return handler.db.session if is_async else handler.db.sync_session


class RawClient:
    """A client that sends what it likes and leaves when it likes."""

    def __init__(self, url: str) -> None:
        self.port = int(url.rsplit(":", 1)[1].split("/")[0])

    async def __aenter__(self) -> RawClient:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def __aexit__(self, *error: object) -> None:
        self.vanish()

    async def send(self, head: str, body: bytes = b"") -> None:
        self.writer.write(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
        await self.writer.drain()

    async def status(self) -> int:
        return int((await self.reader.readline()).split()[1])

    def vanish(self) -> None:
        """Close the socket without a goodbye: the server sees a reset."""
        sock = self.writer.get_extra_info("socket")
        if sock is not None and not self.writer.is_closing():
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.writer.transport.abort()


def missing(what: str, reason: object) -> NoReturn:
    """Skip for want of a server or a package; in CI, where it is required, fail."""
    message = f"no {what}: {reason}"
    if what in os.environ.get("TORNADO_SA_REQUIRE", "").split(","):
        pytest.fail(message)
    pytest.skip(message)
