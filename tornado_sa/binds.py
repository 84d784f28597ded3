"""Several databases in one session: an engine for each of ``binds``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from sqlalchemy import URL, exc, make_url

from tornado_sa.errors import ConfigurationError

EngineT = TypeVar("EngineT")


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


def distinct(engines: Sequence[EngineT]) -> list[EngineT]:
    """``engines`` without repetitions, in their order."""
    return list(dict.fromkeys(engines))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, str | URL) and isinstance(other, str | URL):
        try:
            return make_url(one) == make_url(other)
        except (exc.ArgumentError, ValueError):  # reported where the engine is made
            return False
    return one is other
