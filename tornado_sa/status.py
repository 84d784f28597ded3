"""What a database is doing at this moment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import Engine

from tornado_sa.scope import Scope


@dataclass(frozen=True)
class Status:
    """What a database is doing at this moment, in this process.

    With ``binds``, figures are the sums over all engines. Those that the pool
    in use cannot give are None.
    """

    pool_size: int | None
    """Connections the pool keeps."""
    checked_out: int | None
    """Connections in use."""
    overflow: int | None
    """Connections in existence beyond ``pool_size``."""
    waiting: int | None
    """Units of work that wait for a connection."""
    open_scopes: list[Scope]
    """The scopes that have a session of this database, oldest first. Each has a ``label`` and
    an ``age`` in seconds."""


def status_of(engines: Sequence[Engine], open_scopes: Iterable[Scope]) -> Status:
    """The figures of all pools, summed up."""

    def figure(name: str) -> int | None:
        known: list[int] = []
        for engine in engines:
            found = getattr(engine.pool, name, None)  # a method in most pools, a number in one
            number: int | None = found() if callable(found) else found
            if number is not None:
                known.append(max(0, number))
        return sum(known) if known else None

    return Status(
        pool_size=figure("size"),
        checked_out=figure("checkedout"),
        overflow=figure("overflow"),
        waiting=figure("waiting"),
        open_scopes=sorted(list(open_scopes), key=lambda scope: scope.opened_at),
    )
