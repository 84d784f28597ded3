"""What a session has written, or would write, and has not committed."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, Engine, TextClause, event
from sqlalchemy.engine import Compiled, ExecutionContext
from sqlalchemy.engine.default import DefaultExecutionContext
from sqlalchemy.orm import Session, SessionTransaction, sessionmaker

# Where a session's `_Work` is found in its info.
_WORK = "tornado_sa.work"
# Set on a connection: who began its transaction. Its `info` takes four calls to get at.
_BEGUN_BY = "_tornado_sa_begun_by"
# The root transaction and its connections, in the info of a session.
_CONNECTIONS = "tornado_sa.connections"
# Set on the execution contexts that tell what they write.
_WATCHED = "_tornado_sa_watched"

# The word by which a statement writes. What a ROLLBACK takes back on PostgreSQL and SQLite counts,
# so DDL does.
_GAP = r"(?:\s++|--[^\n]*+|/\*.*?\*/)*+"
_VERB = re.compile(
    rf"(?:\(|{_GAP})*+(INSERT|UPDATE|DELETE|MERGE|REPLACE|TRUNCATE|CREATE|ALTER|DROP|WITH)\b",
    re.IGNORECASE | re.DOTALL,
)
# After WITH, it stands in a parenthesis of its own or behind the last one. `FOR UPDATE` and
# `replace(...)` do not look like that.
_VERB_AFTER_WITH = re.compile(
    rf"[()]{_GAP}(INSERT|UPDATE|DELETE|MERGE|REPLACE)\s", re.IGNORECASE | re.DOTALL
)
_QUOTED = re.compile(r"'[^']*+'|\"[^\"]*+\"|--[^\n]*+|/\*.*?\*/", re.DOTALL)
_PREPOSITIONS = {"INSERT": " into", "UPDATE": " of", "DELETE": " from", "MERGE": " into"}

# The ids of changed objects, by what happened to them and the name of their class. Ids, because
# the objects are the session's to keep; a number that is used again only makes a count smaller.
_Objects = dict[tuple[str, str], set[int]]


class _Work:
    """What one session wrote in one transaction."""

    __slots__ = ("before_flush", "flushed", "statements", "transaction")

    def __init__(self, transaction: SessionTransaction) -> None:
        self.transaction = weakref.ref(transaction)
        self.flushed: _Objects = {}
        self.statements: dict[str, None] = {}  # a set that keeps its order
        self.before_flush: dict[str, None] = {}


def watch_writes(engine: Engine) -> None:
    """Notice the statements of ``engine`` that write. `watch_sessions` does so by itself.

    A hook of the execution context and no event, because this is paid for by
    every SELECT: an engine with a listener runs all its hooks, 20 % of a SELECT
    from memory, and a dialect's ``do_execute`` costs 3 % and comes too early.
    """
    dialect = engine.dialect
    if not hasattr(dialect.execution_ctx_cls, _WATCHED):
        dialect.execution_ctx_cls = _noticing(dialect.execution_ctx_cls)


def watch_sessions(sessions: type[Session] | sessionmaker[Any]) -> None:
    """Notice the work of the sessions of this class, or made by this ``sessionmaker``.

    An ``AsyncSession`` is watched by way of its ``sync_session_class``. Every
    engine such a session uses is watched from then on.
    """
    event.listen(sessions, "after_begin", _began)
    event.listen(sessions, "before_flush", _flush_begins)
    event.listen(sessions, "after_flush", _flushed)


def session_of(connection: Connection) -> Session | None:
    """The session that last began a transaction on ``connection``."""
    session: Session | None = getattr(connection, _BEGUN_BY, _NOBODY)[0]()
    return session


def uncommitted(session: Session) -> str | None:
    """What would be lost if ``session`` were rolled back now, in words; None if nothing would.

    Such as ``2 new Account, 1 dirty Transfer`` or ``INSERT into account by
    Core``. Seen are objects that were added, changed or deleted, flushed or
    not, Core statements that write, and SQL text that begins with a word for
    writing. A function that writes inside a SELECT is not seen. What was
    written over an autocommit connection is not counted, and what a savepoint
    took back still is, until the transaction ends. Takes no I/O.
    """
    work = _work_of(session)
    # Asked of every response, so first the short way: nothing in the session has changed.
    if work is None and not (
        session.identity_map.check_modified() or session.new or session.deleted
    ):
        return None
    objects: _Objects = {} if work is None else {key: set(ids) for key, ids in work.flushed.items()}
    _add_changed(objects, session)
    new = set().union(*(ids for (what, _), ids in objects.items() if what == "new"))
    parts = []
    for what in ("new", "dirty", "deleted"):
        for (happened, name), ids in objects.items():
            count = len(ids - new if what == "dirty" else ids)
            if happened == what and count:
                parts.append(f"{count} {what} {name}")
    if work is not None:
        parts += work.before_flush | work.statements
    return ", ".join(parts) or None


def connections_of(session: Session) -> list[Connection]:
    """The connections of the transaction of ``session``, or of its last one."""
    found: tuple[Any, list[Connection]] = session.info.get(_CONNECTIONS, (None, []))
    return found[1]


def _add_changed(objects: _Objects, session: Session) -> None:
    """Add the objects that a flush writes. At its end, ``after_flush``, they still look so."""
    for what, changed in (
        ("new", session.new),
        ("dirty", session.dirty),
        ("deleted", session.deleted),
    ):
        for one in changed:
            if what != "dirty" or session.is_modified(one):  # set to what it was: not a change
                objects.setdefault((what, type(one).__name__), set()).add(id(one))


def _noticing(base: type[ExecutionContext]) -> type[ExecutionContext]:
    """An execution context like ``base`` that tells the session what it wrote."""
    inherited = base.post_exec
    empty = inherited is DefaultExecutionContext.post_exec  # not worth a call for each SELECT

    def post_exec(self: ExecutionContext) -> None:
        if not empty:
            inherited(self)
        if self.statement[:6] != "SELECT":
            _notice(self)

    return type(base.__name__, (base,), {"post_exec": post_exec, _WATCHED: True})


def _notice(context: ExecutionContext) -> None:
    verb = writing_word(context.statement)
    if verb is not None:
        connection = context.root_connection
        session, transaction = (ref() for ref in getattr(connection, _BEGUN_BY, _NOBODY))
        if transaction is None or session is None or session.get_transaction() is not transaction:
            return  # that of another user of the connection, before this one
        if _is_stored(connection):
            return
        work = _work_of(session)
        if work is None:
            work = session.info[_WORK] = _Work(transaction)
        work.statements[_in_words(verb, context.compiled)] = None


_NOBODY: tuple[Callable[[], Any], Callable[[], Any]] = (lambda: None, lambda: None)


def _work_of(session: Session) -> _Work | None:
    """What ``session`` wrote in the transaction that is open now, if it wrote anything."""
    work: _Work | None = session.info.get(_WORK)
    # That of an earlier transaction is over with it, committed or rolled back.
    if work is None or work.transaction() is not (session.get_transaction() or _NOBODY):
        return None
    return work


def writing_word(statement: str) -> str | None:
    """The word by which ``statement`` writes, in upper case; None if it only reads."""
    found = _VERB.match(statement)
    if found is not None and found[1].upper() == "WITH":
        found = _VERB_AFTER_WITH.search(statement)
        if found is not None:  # unless it is part of a string or a comment
            found = _VERB_AFTER_WITH.search(_QUOTED.sub(" ", statement))
    return None if found is None else found[1].upper()


def _in_words(verb: str, compiled: Compiled | None) -> str:
    if compiled is None or isinstance(compiled.statement, TextClause):
        return f"{verb} by text()"
    name = getattr(getattr(compiled.statement, "table", None), "name", None)
    return f"{verb}{_PREPOSITIONS.get(verb, ' of')} {name} by Core" if name else f"{verb} by Core"


def _is_stored(connection: Connection) -> bool:
    """True if what ``connection`` has just written needs no COMMIT."""
    pooled = connection.connection
    return (
        connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT"
        or getattr(pooled.dbapi_connection, "autocommit", None) is True
        # SQLite knows best: Python's driver begins a transaction for some statements only.
        or getattr(pooled.driver_connection, "in_transaction", None) is False
    )


def _began(session: Session, _transaction: SessionTransaction, connection: Connection) -> None:
    watch_writes(connection.engine)
    root = session.get_transaction()
    found = session.info.get(_CONNECTIONS)
    if found is not None and found[0]() is root:
        found[1].append(connection)
    else:
        found = session.info[_CONNECTIONS] = (weakref.ref(root), [connection])
    setattr(connection, _BEGUN_BY, (weakref.ref(session), found[0]))


def _flush_begins(session: Session, *_flush: Any) -> None:
    work = _work_of(session)
    if work is not None:
        work.before_flush |= work.statements
        work.statements = {}


def _flushed(session: Session, *_flush: Any) -> None:
    """Replace the statements of the flush, if any wrote, by the objects they wrote."""
    work = _work_of(session)
    if work is not None and work.statements:
        _add_changed(work.flushed, session)
        if work.flushed:
            work.statements = {}
