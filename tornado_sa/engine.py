"""From what the user wrote to an engine, or to an error that says what to write."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sqlalchemy import URL, Dialect, Engine, create_engine, exc, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from tornado_sa.errors import ConfigurationError
from tornado_sa.fair_pool import FairPoolCore
from tornado_sa.memory import SharedPool
from tornado_sa.pool import AsyncFairPool, FairPool
from tornado_sa.responses import mark_unreachable

# What to suggest for each backend: a sync and an async driver name.
_DRIVERS = {
    "sqlite": ("sqlite", "sqlite+aiosqlite"),
    "postgresql": ("postgresql+psycopg", "postgresql+asyncpg"),
    "mysql": ("mysql+pymysql", "mysql+aiomysql"),
    "mariadb": ("mariadb+pymysql", "mariadb+aiomysql"),
    "oracle": ("oracle+oracledb", "oracle+oracledb_async"),
    "mssql": ("mssql+pyodbc", "mssql+aioodbc"),
}

# Where the package to install is not called as the driver is.
_PACKAGES = {
    "psycopg": "psycopg[binary]",
    "psycopg_async": "psycopg[binary]",
    "psycopg2": "psycopg2-binary",
    "mysqldb": "mysqlclient",
    "oracledb_async": "oracledb",
}

# Query parameters that carry a password or a token.
_SECRET = re.compile("passw|pwd|secret|token|odbc_connect", re.IGNORECASE)

# Set on functions that mark the errors of connecting.
_MARKS = "_tornado_sa_marks"


def sync_engine(
    url: str | URL | Engine, options: Mapping[str, Any] | None, ping_after: float | None = 30.0
) -> Engine:
    """The engine for a `.Database`. Raises `.ConfigurationError`.

    ``ping_after`` is for `.FairPool`; a ready engine and any other pool go without.
    """
    _check_seconds("ping_after", ping_after, "never")
    if isinstance(url, AsyncEngine):
        raise ConfigurationError(
            "Database was given an AsyncEngine. Write AsyncDatabase(engine), or give Database an"
            " engine from sqlalchemy.create_engine()."
        )
    if isinstance(url, Engine):
        _refuse_options(options)
        engine = url
    else:
        parsed = parse(url, "Database")
        engine = _build(create_engine, parsed, FairPool, options, ping_after)
    if engine.dialect.is_async:
        raise _wrong_kind(engine.url, "Database", "AsyncDatabase", 0)
    _mark_failed_connects(engine.dialect)
    return engine


def async_engine(
    url: str | URL | AsyncEngine, options: Mapping[str, Any] | None, ping_after: float | None = 30.0
) -> AsyncEngine:
    """The engine for an `.AsyncDatabase`. Raises `.ConfigurationError`.

    ``ping_after`` is for `.AsyncFairPool`; a ready engine and any other pool go without.
    """
    _check_seconds("ping_after", ping_after, "never")
    if isinstance(url, Engine):
        raise ConfigurationError(
            "AsyncDatabase was given a plain Engine. Write Database(engine), or give"
            " AsyncDatabase an engine from sqlalchemy.ext.asyncio.create_async_engine()."
        )
    if isinstance(url, AsyncEngine):
        _refuse_options(options)
        engine = url
    else:
        parsed = parse(url, "AsyncDatabase")
        try:
            engine = _build(create_async_engine, parsed, AsyncFairPool, options, ping_after)
        except exc.InvalidRequestError:  # "requires an async driver to be used"
            raise _wrong_kind(parsed, "AsyncDatabase", "Database", 1) from None
    _mark_failed_connects(engine.dialect)
    return engine


def plain(engine: Engine | AsyncEngine) -> Engine:
    """``engine`` without its async facade."""
    return engine.sync_engine if isinstance(engine, AsyncEngine) else engine


def copy_of(engine: Engine) -> Engine:
    """An engine like ``engine``, with a pool of its own."""
    pool = engine.pool.recreate()
    if engine.dialect.is_async:
        return create_async_engine(engine.url, pool=pool).sync_engine
    return create_engine(engine.url, pool=pool)


def is_memory(url: URL) -> bool:
    """True if the SQLite ``url`` names a database that lives in memory."""
    return not url.database or ":memory:" in url.database or url.query.get("mode") == "memory"


def shown(url: URL) -> str:
    """``url`` as text for people: no password, wherever the driver takes it from."""
    secret = [key for key in url.query if _SECRET.search(key)]
    masked = url.update_query_dict(dict.fromkeys(secret, "***"))
    return masked.render_as_string(hide_password=True).replace("%2A%2A%2A", "***")


def parse(url: str | URL, kind: str) -> URL:
    if not isinstance(url, str | URL):
        raise ConfigurationError(
            f"{kind} takes a URL as str or sqlalchemy.URL, or a ready engine, not"
            f" {type(url).__name__}."
        )
    try:
        parsed = make_url(url)
        if "@" not in (parsed.host or ""):  # else the password has an @ of its own
            return parsed
    except (exc.ArgumentError, ValueError):
        pass
    # Not SQLAlchemy's own message, which repeats the text.
    raise ConfigurationError(
        f"The URL given to {kind} cannot be parsed (it is not repeated here, for it may hold a"
        " password). Write driver://user:password@host:port/database, such as"
        " postgresql+psycopg://app:password@localhost:5432/app or sqlite:///app.db, and escape"
        " special characters in the password with urllib.parse.quote_plus()."
    )


def _build(
    factory: Any,
    url: URL,
    fair_pool: type[FairPoolCore],
    options: Mapping[str, Any] | None,
    ping_after: float | None,
) -> Any:
    settings = dict(options or {})
    if settings.get("poolclass") is None and settings.get("pool") is None:
        if url.get_backend_name() == "sqlite" and is_memory(url):
            settings["poolclass"] = SharedPool
            threads = {"check_same_thread": False}
            settings["connect_args"] = threads | settings.get("connect_args", {})
        else:
            settings["poolclass"] = fair_pool
            settings.setdefault("ping_after", ping_after)
            _check_pool(settings)
    for creator in ("creator", "async_creator"):
        if settings.get(creator):
            settings[creator] = _marking(settings[creator])
    try:
        return factory(url, **settings)
    except exc.NoSuchModuleError:
        known = ", ".join(sorted({name for pair in _DRIVERS.values() for name in pair}))
        raise ConfigurationError(
            f"SQLAlchemy knows no driver {url.drivername!r}. Known ones are, among others: {known}."
        ) from None
    except ImportError as error:
        driver = url.drivername.partition("+")[2] or error.name or url.drivername
        package = _PACKAGES.get(driver, driver)
        raise ConfigurationError(
            f"The driver for {url.drivername!r} is not installed ({error})."
            f" Install it with: pip install '{package}'"
        ) from error
    except (TypeError, ValueError, exc.ArgumentError) as error:
        raise ConfigurationError(
            f"The engine_options or the URL's options are not accepted for {url.drivername!r}:"
            f" {error}"
        ) from error


def _check_pool(settings: Mapping[str, Any]) -> None:
    """Refuse figures with which a pool would wait for ever, or fail at the first request."""
    for name, least in ("pool_size", 0), ("max_overflow", -1):
        value = settings.get(name, least)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigurationError(
                f"{name} must be a whole number, {least} or more ({least} is no limit), not"
                f" {value!r}."
            )
    _check_seconds("pool_timeout", settings.get("pool_timeout"), "for ever")
    _check_seconds("ping_after", settings.get("ping_after"), "never")


def _check_seconds(name: str, value: Any, without: str) -> None:
    if value is None:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf:
        raise ConfigurationError(
            f"{name} must be a number of seconds, 0 or more, or None ({without}), not {value!r}."
        )


def _refuse_options(options: Mapping[str, Any] | None) -> None:
    if options:
        raise ConfigurationError(
            "engine_options have no effect on a ready engine. Give them to create_engine() or"
            " create_async_engine(), or give Database a URL."
        )


def _wrong_kind(url: URL, kind: str, other: str, index: int) -> ConfigurationError:
    drivers = _DRIVERS.get(url.get_backend_name())
    instead = f"{kind}('{drivers[index]}://...')" if drivers else f"a driver for {kind}"
    wanted = "an async" if index else "a sync"
    return ConfigurationError(
        f"{kind} needs {wanted} driver, and {url.drivername!r} is not one. Write {instead}, or"
        f" {other}('{url.drivername}://...')."
    )


def _mark_failed_connects(dialect: Dialect) -> None:
    """Make attempts to connect mark their exceptions as ours to answer with 503.

    Set on the dialect, because a ``do_connect`` listener that connects would
    silence listeners added after it, such as those that fetch a fresh password.
    """
    if not hasattr(dialect.connect, _MARKS):
        setattr(dialect, "connect", _marking(dialect.connect))  # noqa: B010  (a method, to mypy)


def _marking(connect: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(connect)
    def marking_connect(*args: Any, **kwargs: Any) -> Any:
        with _mark_errors():
            return connect(*args, **kwargs)

    @functools.wraps(connect)
    async def marking_async_connect(*args: Any, **kwargs: Any) -> Any:
        with _mark_errors():
            return await connect(*args, **kwargs)

    marking = marking_async_connect if inspect.iscoroutinefunction(connect) else marking_connect
    setattr(marking, _MARKS, True)
    return marking


@contextmanager
def _mark_errors() -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError):  # wrong arguments: a mistake, not an outage
        raise
    except Exception as error:
        mark_unreachable(error)
        raise
