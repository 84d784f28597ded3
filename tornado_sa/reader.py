"""The reader: a second engine of a database, whose connections the server keeps read-only.

Its connections are in autocommit mode, so a unit of work that only reads takes no BEGIN and no
ROLLBACK, two round trips of the three that a single query takes otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar, cast

from sqlalchemy import URL, Connection, Dialect, Engine, ExceptionContext, event, exc
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session

from tornado_sa.changes import session_of, writing_word
from tornado_sa.engine import is_memory, parse, plain
from tornado_sa.errors import ConfigurationError, ReadOnlyViolation
from tornado_sa.scope import ReadOnly, Scope

EngineT = TypeVar("EngineT", bound=Engine | AsyncEngine)

# PostgreSQL keeps a session read-only by this setting, when it is part of the start-up message. A
# SET would do it too, and would stay behind on a connection that a transaction pooler shares.
_SETTING = "default_transaction_read_only"

# Asked of each new connection, for a pooler in between may have dropped the parameter. PgBouncer
# does, if it stands in its ignore_startup_parameters.
_IS_READ_ONLY = f"SHOW {_SETTING}"

# Said once to each new connection of the others.
_ON_CONNECT = {
    "mysql": "SET SESSION TRANSACTION READ ONLY",
    "mariadb": "SET SESSION TRANSACTION READ ONLY",
    "sqlite": "PRAGMA query_only = ON",
}

# For @read_only(stream=True): what each server calls its own default.
_TRANSACTION = {
    "postgresql": "READ COMMITTED",
    "mysql": "REPEATABLE READ",
    "mariadb": "REPEATABLE READ",
    "sqlite": "SERIALIZABLE",
}

# read_only_sql_transaction: PostgreSQL manual, appendix A.
_POSTGRESQL_REFUSAL = "25006"
# ER_CANT_EXECUTE_IN_READ_ONLY_TRANSACTION: MySQL and MariaDB error reference.
_MYSQL_REFUSAL = 1792
# SQLITE_READONLY: https://sqlite.org/rescode.html. The low byte of an extended code.
_SQLITE_REFUSAL = 8

_IN_MEMORY = (
    "A database in memory is one connection, so it has no reader: there, the session of a unit of"
    " work that only reads refuses to write. Use db.engine."
)

# Where its unit of work is found in the info of a read-only session: another may be the current
# one when it is refused to write.
READS_FOR = "tornado_sa.read_only"


class Reader(Generic[EngineT]):
    """The reader engine of a database; or, in memory, no engine and a session that refuses.

    Or neither, and the reason why: then a unit of work that asks for it gets an error.
    """

    def __init__(
        self, engine: EngineT | None = None, *, in_memory: bool = False, why_none: str = ""
    ) -> None:
        self.engine_or_none = engine
        self._in_memory = in_memory
        self._why_none = why_none
        if engine is None:
            return
        on = plain(engine)
        backend = on.dialect.name
        if backend in _ON_CONNECT:
            event.listen(on, "connect", _saying(_ON_CONNECT[backend]))
        else:
            event.listen(on, "connect", _check_read_only)
        event.listen(on, "handle_error", _translate)
        _save_round_trips(on.dialect)
        level = _TRANSACTION[backend]
        self._streaming = cast(EngineT, engine.execution_options(isolation_level=level))

    @property
    def engine(self) -> EngineT:
        """The engine. Raises `.ConfigurationError` if there is none."""
        if self.engine_or_none is None:
            raise ConfigurationError(self._why_none)
        return self.engine_or_none

    def plain_engine(self) -> Engine | None:
        """The engine, without its async facade; None if there is none."""
        return None if self.engine_or_none is None else plain(self.engine_or_none)

    def take_over(self, session: Any, scope: Scope, how: ReadOnly) -> None:
        """Make ``session``, which is new, one that only reads.

        Raises `.ConfigurationError` if the database has no reader.
        """
        inner: Session = getattr(session, "sync_session", session)
        inner.info[READS_FOR] = scope
        if self._in_memory:
            event.listen(inner, "after_begin", _refuse_writes)
            return
        engine = self._streaming if how.stream and self.engine_or_none else self.engine
        session.bind, inner.bind = engine, plain(engine)


def make_reader(
    make_engine: Callable[[str | URL, Mapping[str, Any], float | None], EngineT],
    url: str | URL | EngineT,
    reader_url: str | URL | None,
    engine_options: Mapping[str, Any] | None,
    session_options: Mapping[str, Any] | None,
    ping_after: float | None,
) -> Reader[EngineT]:
    """The reader for a database with these arguments. It connects when it is first used.

    Raises `.ConfigurationError` for a ``reader_url`` that cannot be used.
    """
    options = dict(engine_options or {})
    given = reader_url is not None
    if given and not isinstance(reader_url, str | URL):
        raise ConfigurationError(
            "reader_url takes a URL as str or sqlalchemy.URL, not"
            f" {type(reader_url).__name__}: its connections are made read-only as they connect."
        )
    target = reader_url if reader_url is not None else url
    ready = not isinstance(target, str | URL)
    parsed = target.url if not isinstance(target, str | URL) else parse(target, "reader_url")
    in_memory = parsed.get_backend_name() == "sqlite" and is_memory(parsed)
    if in_memory and not given:
        return Reader(in_memory=True, why_none=_IN_MEMORY)
    reason = _why_not(parsed, ready, in_memory, options, session_options or {})
    if reason:
        why = f"This database has no reader, for read-only units of work: {reason}"
        if given:
            raise ConfigurationError(why)
        return Reader(why_none=why)
    return Reader(make_engine(parsed, reader_options(parsed, options), ping_after))


def _why_not(
    url: URL,
    ready: bool,
    in_memory: bool,
    engine_options: Mapping[str, Any],
    session_options: Mapping[str, Any],
) -> str | None:
    """Why there can be no reader, and what to write instead; None if there can be one."""
    for name in ("bind", "binds"):
        if session_options.get(name):
            return f"its session_options have {name!r}, by which its sessions choose an engine."
    if ready:
        return "it was given a ready engine. Give it a reader_url too, or a URL for both."
    if in_memory:
        return "reader_url names a database in memory, which is another one."
    if engine_options.get("pool") is not None:
        return "its engine_options have 'pool', whose connections may write. Write 'poolclass'."
    backend = url.get_backend_name()
    if backend not in _TRANSACTION:
        return f"tornado_sa cannot keep {backend} read-only. PostgreSQL, MySQL, MariaDB, SQLite."
    if backend != "postgresql":
        return None
    for name in ("creator", "async_creator"):
        if engine_options.get(name):
            return (
                f"its engine_options have {name!r}, and on PostgreSQL it is a start-up parameter"
                " that makes a connection read-only. Write 'connect_args'."
            )
    driver = _driver(url)
    if driver not in ("asyncpg", "psycopg", "psycopg_async", "psycopg2", ""):
        return f"tornado_sa has no start-up parameters for {driver}. Use psycopg or asyncpg."
    return None


def _driver(url: URL) -> str:
    """The name of the driver; empty if there is no such one, which is for the engine to say."""
    try:
        return url.get_driver_name()
    except exc.NoSuchModuleError:
        return ""


def reader_options(url: URL, engine_options: Mapping[str, Any]) -> dict[str, Any]:
    """The options for the reader engine of ``url``: the user's own, and what makes it a reader.

    What the user gives the server as start-up parameters goes to the reader as well, wherever
    the driver takes it from: ``connect_args``, the query of the URL, or ``PGOPTIONS``.
    """
    options = {**engine_options, "isolation_level": "AUTOCOMMIT"}
    if "execution_options" in options:
        execution_options = dict(options["execution_options"] or {})
        execution_options.pop("isolation_level", None)
        options["execution_options"] = execution_options
    if url.get_backend_name() == "postgresql":
        given = dict(options.get("connect_args") or {})
        if _driver(url) == "asyncpg":
            given["server_settings"] = {**(given.get("server_settings") or {}), _SETTING: "on"}
        else:
            theirs = given.get("options", url.query.get("options"))
            if theirs is None:
                theirs = os.environ.get("PGOPTIONS", "")
            if not isinstance(theirs, str):  # given in the query several times
                theirs = " ".join(theirs)
            given["options"] = f"{theirs} -c {_SETTING}=on".lstrip()
        options["connect_args"] = given
    return options


def _saying(statement: str) -> Callable[..., None]:
    def say(connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        try:
            cursor.execute(statement)
        finally:
            cursor.close()

    return say


def _check_read_only(connection: Any, _record: Any) -> None:
    """Raise `.ConfigurationError` if PostgreSQL would not refuse to write."""
    cursor = connection.cursor()
    try:
        cursor.execute(_IS_READ_ONLY)
        (found,) = cursor.fetchone()
    finally:
        cursor.close()
        connection.rollback()
    if found != "on":
        connection.close()  # SQLAlchemy would leave that to the garbage collector
        raise ConfigurationError(
            f"The reader's connections are not read-only: {_SETTING} is {found!r}, although it was"
            " sent as a start-up parameter. A pooler must have dropped it. For PgBouncer, name a"
            f" database in reader_url that has connect_query='SET {_SETTING} = on'."
        )


def _save_round_trips(dialect: Dialect) -> None:
    """Send no COMMIT and no ROLLBACK over a connection that is in no transaction.

    SQLAlchemy ends the transactions that it thinks of in autocommit mode as well, and the pool
    resets each connection. asyncpg and psycopg know better and send nothing. The MySQL drivers do
    send it, and aiosqlite crosses to its thread. (``skip_autocommit_rollback`` is for ROLLBACK
    only, from SQLAlchemy 2.0.43.)

    Not so over a connection that is busy with a forgotten task's statement: the next user would
    wait for it. The ROLLBACK waits or fails, and with the latter the connection is discarded.
    asyncpg, which has nothing to send, fails as it does in a transaction.
    """

    # _execute_mutex: private, and there is no other way to ask.
    def unless_busy(end: Callable[[Any], None]) -> Callable[[Any], None]:
        def end_transaction(connection: Any) -> None:
            if connection.dbapi_connection._execute_mutex.locked():
                raise dialect.loaded_dbapi.InterfaceError("another task's statement is in progress")
            end(connection)

        return end_transaction

    def unless_idle(end: Callable[[Any], None]) -> Callable[[Any], None]:
        def end_transaction(connection: Any) -> None:
            mutex = getattr(connection.dbapi_connection, "_execute_mutex", None)
            if (mutex is not None and mutex.locked()) or not _is_idle(connection):
                end(connection)

        return end_transaction

    only_if = unless_busy if dialect.driver == "asyncpg" else unless_idle
    for name in ("do_commit", "do_rollback"):
        setattr(dialect, name, only_if(getattr(dialect, name)))


def _is_idle(connection: Any) -> bool:
    """True if the driver knows, without asking the server, that there is nothing to end."""
    driver = connection.driver_connection
    get_autocommit = getattr(driver, "get_autocommit", None)
    if get_autocommit is not None:  # of MySQL; 1 is SERVER_STATUS_IN_TRANS, after somebody's BEGIN
        return bool(get_autocommit()) and not getattr(driver, "server_status", 0) & 1
    return getattr(driver, "in_transaction", None) is False  # of SQLite


def is_refusal(error: BaseException | None) -> bool:
    """True if ``error``, a driver's, says that a server refused to write."""
    for name in ("sqlstate", "pgcode"):  # pgcode: psycopg2
        if getattr(error, name, None) == _POSTGRESQL_REFUSAL:
            return True
    sqlite_code = getattr(error, "sqlite_errorcode", None)
    if sqlite_code is not None:
        return bool(sqlite_code & 0xFF == _SQLITE_REFUSAL)
    return error is not None and error.args[:1] == (_MYSQL_REFUSAL,)


def _translate(context: ExceptionContext) -> BaseException | None:
    """The error to raise in place of the driver's, which becomes its cause."""
    if not is_refusal(context.original_exception):
        return None
    connection = context.connection
    session = None if connection is None else session_of(connection)
    scope = None if session is None else session.info.get(READS_FOR)
    return violation(scope, "the server refused to write")


def _refuse_writes(session: Session, _transaction: Any, connection: Connection) -> None:
    """Watch the statements of a session on a server that cannot: one connection for everybody."""

    def refuse(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        word = writing_word(statement)
        if word is not None:
            raise violation(session.info[READS_FOR], f"its session refused to {word}")

    event.listen(connection, "before_cursor_execute", refuse)


def violation(scope: Scope | None, what: str) -> ReadOnlyViolation:
    label = "This" if scope is None else scope.label
    return ReadOnlyViolation(
        f"{label} is a unit of work that only reads, and {what}. For a verb that writes,"
        " take @read_only away, or its name out of read_only_methods; elsewhere write"
        " `with db.begin() as session:` (`async with` on an AsyncDatabase) around what writes."
    )
