"""Transactions in doubt: which there are, and how they end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy import BindParameter, Connection, Engine, bindparam, text
from sqlalchemy.exc import DBAPIError

from tornado_sa.decisions import ABORT, COMMIT, Decisions, gid_of, realm_of
from tornado_sa.ending import logger
from tornado_sa.engine import shown
from tornado_sa.errors import ConfigurationError, TornadoSAError

# How often a branch is tried that its process has not let go of yet, and the pause in seconds. A
# server takes a moment to notice that a process was killed.
_ATTEMPTS = 20
_PAUSE = 0.05

# PostgreSQL: 42704 undefined_object, it is gone; 55000 object_not_in_prerequisite_state, somebody
# is at it. MariaDB: 1397 XAER_NOTA, gone or still its process's; 1402 XA_RBROLLBACK, it had
# written nothing; 1440 XAER_DUPID.
_MAY_PASS: frozenset[Any] = frozenset({"42704", "55000", 1397, 1402, 1440})

# What came of an attempt. Gone is what somebody else has ended.
_ENDED, _GONE, _HELD = "ended", "gone", "held"


@dataclass(frozen=True)
class InDoubt:
    """A transaction that is prepared, and neither committed nor rolled back."""

    xid: str
    """Its id on the server."""
    database: str
    """The URL of the database, without the password."""
    since: datetime | None
    """When it was prepared. None on MySQL and MariaDB, which do not tell."""
    ours: bool
    """True if the table of decisions of this database is the one that decides it."""
    decision: str | None
    """What that table says: ``"commit"``, ``"abort"``, or None, not decided."""


@dataclass(frozen=True)
class _Branch:
    """What stands in the server's list, and how to write its id in SQL."""

    shown: InDoubt
    engine: Engine
    id: str | None  # None: as a parameter


def in_doubt(engines: Sequence[Engine], decisions: Sequence[Decisions]) -> list[InDoubt]:
    """The transactions in doubt on ``engines``, ours and others."""
    return [branch.shown for branch in _branches(engines, decisions)]


def resolve(
    engines: Sequence[Engine], decisions: Sequence[Decisions], xid: str, commit: bool
) -> list[InDoubt]:
    """End all branches of the transaction ``xid``. See `.Database.resolve`."""
    wanted = COMMIT if commit else ABORT
    found = _branches(engines, decisions)
    of_xid = [one for one in found if one.shown.xid == xid]
    gids = {gid_of(one.shown.xid) for one in of_xid if one.shown.ours} or {xid}
    meant = of_xid + [
        one
        for one in found
        if one not in of_xid and one.shown.ours and gid_of(one.shown.xid) in gids
    ]
    if not meant:
        raise TornadoSAError(f"No transaction {xid!r} is in doubt here.")
    gid = gid_of(meant[0].shown.xid)
    if gid is not None:
        judge = _by_realm(decisions).get(realm_of(gid))
        if judge is None:
            raise TornadoSAError(
                f"The decision on {xid!r} is kept in another database, the first of those that take"
                " part. Without it, the others could end otherwise. Give its URL as well."
            )
        decision = judge.decide(gid, wanted)
        if decision != wanted:
            raise TornadoSAError(
                f"The decision on {gid} has been made: {decision}. db.recover() carries it out."
            )
    ended = [replace(one.shown, decision=wanted) for one in meant if _end(one, commit) != _HELD]
    if len(ended) < len(meant):
        raise TornadoSAError(
            f"The process that prepared {xid!r} still has it. It can be ended when the process has"
            " closed its connection."
        )
    return ended


def recover(engines: Sequence[Engine], decisions: Decisions) -> list[InDoubt]:
    """End every transaction of ours that is in doubt. See `.Database.recover`."""
    _check(engines)
    if decisions.realm() is None:
        return []
    ended: list[InDoubt] = []
    ours = [one for one in _branches(engines, [decisions]) if one.shown.ours]
    made: dict[str, str] = {}
    for branch in ours:
        gid = str(gid_of(branch.shown.xid))
        if gid not in made:
            made[gid] = decisions.decide(gid, ABORT)  # unless its process was first
        outcome = _end(branch, made[gid] == COMMIT)
        if outcome == _ENDED:
            ended.append(replace(branch.shown, decision=made[gid]))
        elif outcome == _HELD:
            logger.warning(
                "%s is still held by the process that prepared it, in %s; decision: %s",
                branch.shown.xid,
                branch.shown.database,
                made[gid],
            )
    decisions.forget_old()
    return ended


def end_elsewhere(engine: Engine, xid: str, commit: bool) -> bool:
    """End a branch of ours, which is decided, over another connection than its own.

    False if it is still in doubt.
    """
    id = None if engine.dialect.name == "postgresql" else f"X'{xid.encode().hex()}',X'',1"
    return _end(_Branch(InDoubt(xid, "", None, True, None), engine, id), commit) != _HELD


def _by_realm(decisions: Sequence[Decisions]) -> dict[str, Decisions]:
    realms = ((one.realm(), one) for one in decisions)
    return {realm: one for realm, one in realms if realm is not None}


def _branches(engines: Sequence[Engine], decisions: Sequence[Decisions]) -> list[_Branch]:
    """What the servers list. A transaction that two of the engines see is there once."""
    _check(engines)
    by_realm = _by_realm(decisions)
    found: dict[str, _Branch] = {}
    for engine in engines:
        with _autocommit(engine) as connection:
            for branch in _listed(connection):
                xid = branch.shown.xid
                gid = gid_of(xid)
                judge = by_realm.get(realm_of(gid)) if gid is not None else None
                if judge is not None and gid is not None:
                    row = replace(branch.shown, ours=True, decision=judge.find(gid))
                    branch = replace(branch, shown=row)
                found.setdefault(xid, branch)
    return list(found.values())


def _listed(connection: Connection) -> Iterator[_Branch]:
    engine = connection.engine
    if engine.dialect.name == "postgresql":
        # The view shows those of all databases of the server; they can be ended in their own only.
        for xid, since in connection.execute(
            text(
                "SELECT gid, prepared FROM pg_prepared_xacts WHERE database = current_database()"
                " ORDER BY prepared"
            )
        ).all():
            yield _Branch(InDoubt(xid, shown(engine.url), since, False, None), engine, None)
    else:
        for form, length, _, data in connection.execute(text("XA RECOVER")).all():
            raw = data.encode() if isinstance(data, str) else bytes(data)
            parts = [part for part in (raw[:length], raw[length:]) if part]
            xid = ",".join(part.decode(errors="backslashreplace") for part in parts)
            # In hexadecimal: those of others may be any bytes.
            id = f"X'{raw[:length].hex()}',X'{raw[length:].hex()}',{form}"
            yield _Branch(InDoubt(xid, shown(engine.url), None, False, None), engine, id)


def _check(engines: Sequence[Engine]) -> None:
    for engine in engines:
        if engine.dialect.name not in ("postgresql", "mysql", "mariadb"):
            raise ConfigurationError(
                f"{engine.dialect.name} has no two-phase commit."
                " PostgreSQL, MySQL and MariaDB have one."
            )


def _end(branch: _Branch, commit: bool) -> str:
    """Commit or roll back ``branch``, unless it is held by its process, or gone."""
    word = "COMMIT" if commit else "ROLLBACK"
    if branch.id is None:
        xid: BindParameter[str] = bindparam("xid", branch.shown.xid, literal_execute=True)
        statement = text(f"{word} PREPARED :xid").bindparams(xid)
        pause = text(f"SELECT pg_sleep({_PAUSE})")
    else:
        statement = text(f"XA {word} {branch.id}")
        pause = text(f"SELECT SLEEP({_PAUSE})")
    with _autocommit(branch.engine) as connection:
        for _ in range(_ATTEMPTS):
            try:
                connection.execute(statement)
                return _ENDED
            except DBAPIError as error:
                if not _codes(error) & _MAY_PASS:
                    raise
            if branch.shown.xid not in {one.shown.xid for one in _listed(connection)}:
                return _GONE
            connection.execute(pause)  # by the server, because nothing here may block the loop
    return _HELD


def _codes(error: DBAPIError) -> set[object]:
    """The SQLSTATE, and for MySQL and MariaDB the number, which says more."""
    original: Any = error.orig
    return {
        getattr(original, "sqlstate", None),
        getattr(original, "pgcode", None),
        *getattr(original, "args", ())[:1],
    }


@contextmanager
def _autocommit(engine: Engine) -> Iterator[Connection]:
    """A connection outside of any transaction, as COMMIT PREPARED demands."""
    with engine.connect() as connection:
        yield connection.execution_options(isolation_level="AUTOCOMMIT")
