"""The engines of one database: the first, one for each of ``binds``, and the reader's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from sqlalchemy import URL, Engine, exc, make_url
from sqlalchemy.ext.asyncio import AsyncEngine

from tornado_sa.decisions import Decisions
from tornado_sa.engine import plain
from tornado_sa.errors import ConfigurationError
from tornado_sa.reader import Reader, make_reader

T = TypeVar("T")
EngineT = TypeVar("EngineT", bound=Engine | AsyncEngine)


# Defaults that differ from SQLAlchemy's. A closed session raises instead of silently
# beginning again; objects stay readable after the commit.
SESSION_DEFAULTS = {"close_resets_only": False, "expire_on_commit": False}


class Engines(Generic[EngineT]):
    """All engines of a database, made from what its constructor was given.

    ``make`` makes one from a URL or a ready engine, the engine options, and
    ``ping_after``. Raises `.ConfigurationError`.
    """

    def __init__(
        self,
        make: Callable[[Any, Mapping[str, Any] | None, float | None], EngineT],
        url: Any,
        reader_url: str | URL | None,
        binds: Mapping[Any, Any] | None,
        engine_options: Mapping[str, Any] | None,
        session_options: Mapping[str, Any] | None,
        ping_after: float | None,
    ) -> None:
        def make_other(target: Any) -> EngineT:
            ready = isinstance(target, Engine | AsyncEngine)
            return make(target, None if ready else engine_options, ping_after)

        self.first: EngineT = make(url, engine_options, ping_after)
        self.binds: dict[Any, EngineT] = bound_engines(
            (url, self.first), binds, session_options, make_other
        )
        #: Without their async facades.
        self.plain: list[Engine] = distinct([plain(self.first), *map(plain, self.binds.values())])
        #: Where two-phase commits of them are decided.
        self.decisions: Decisions = Decisions(self.plain[0])
        given = dict(session_options or {})
        choosing = {**given, **({"binds": binds} if binds else {})}
        self.reader: Reader[EngineT] = make_reader(
            make, url, reader_url, engine_options, choosing, ping_after
        )
        #: The options for the factory of the sessions.
        self.session_options: dict[str, Any] = {"bind": self.first, **SESSION_DEFAULTS, **given}
        if self.binds:
            self.session_options["binds"] = self.binds


def bound_engines(
    first: tuple[Any, EngineT],
    binds: Mapping[Any, Any] | None,
    session_options: Mapping[str, Any] | None,
    make: Callable[[Any], EngineT],
) -> dict[Any, EngineT]:
    """The engine of each key of ``binds``: one for each URL, whatever the number of keys.

    ``first`` is what the first engine was made from, and that engine.
    """
    options = session_options or {}
    if "binds" in options and (binds or options.get("twophase")):
        raise ConfigurationError(
            "session_options has `binds` of its own. Give them as binds={Base: url, ...}."
        )
    made = [first]
    engines: dict[Any, EngineT] = {}
    for key, target in (binds or {}).items():
        engine = next((engine for given, engine in made if _same(given, target)), None)
        if engine is None:
            engine = make(target)
            made.append((target, engine))
        engines[key] = engine
    return engines


def distinct(engines: Sequence[T]) -> list[T]:
    """``engines`` without repetitions, in their order."""
    return list(dict.fromkeys(engines))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, str | URL) and isinstance(other, str | URL):
        try:
            return make_url(one) == make_url(other)
        except (exc.ArgumentError, ValueError):  # reported where the engine is made
            return False
    return one is other
