"""Which response an error deserves: pure functions, no handler in sight."""

from __future__ import annotations

from http import HTTPStatus

from sqlalchemy import exc
from sqlalchemy.orm.exc import StaleDataError

#: Sent as ``Retry-After`` with every 503, in seconds: long enough for a busy pool
#: or a restarting server to recover a little, short enough not to lose the user.
RETRY_AFTER = 1

# 40001 serialization_failure, 40P01 deadlock_detected: PostgreSQL manual, appendix A.
_RETRYABLE_SQLSTATES = frozenset({"40001", "40P01"})
# 1213 ER_LOCK_DEADLOCK, 1205 ER_LOCK_WAIT_TIMEOUT: MySQL and MariaDB error reference.
_RETRYABLE_MYSQL_CODES = frozenset({1213, 1205})
# SQLITE_BUSY, SQLITE_LOCKED: https://sqlite.org/rescode.html. The low byte of an
# extended code, such as SQLITE_BUSY_SNAPSHOT (517), is the primary code.
_RETRYABLE_SQLITE_CODES = frozenset({5, 6})

_UNREACHABLE = "_tornado_sa_unreachable"


def mark_unreachable(error: BaseException) -> None:
    """Remember that ``error`` came from an attempt to reach the database.

    Drivers let plain ``OSError`` through when they cannot connect. Marking the
    exception where the engine connects tells it from an ``OSError`` of the
    handler's own, and leaves its type as callers know it.
    """
    setattr(error, _UNREACHABLE, True)


def is_unreachable(error: BaseException) -> bool:
    """True if the database could not be reached, or the connection to it was lost."""
    if isinstance(error, exc.DBAPIError):
        if error.connection_invalidated:
            return True
        return error.orig is not None and is_unreachable(error.orig)
    return getattr(error, _UNREACHABLE, False) is True


def is_retryable(error: BaseException) -> bool:
    """True if the same transaction may succeed when it is run again.

    That is a serialization failure, a deadlock, a lock wait that timed out, or
    a locked SQLite file.
    """
    if not isinstance(error, exc.DBAPIError) or error.orig is None:
        return False
    original = error.orig
    if getattr(original, "sqlstate", None) in _RETRYABLE_SQLSTATES:
        return True
    if getattr(original, "pgcode", None) in _RETRYABLE_SQLSTATES:  # psycopg2
        return True
    sqlite_code = getattr(original, "sqlite_errorcode", None)
    if sqlite_code is not None:
        return sqlite_code & 0xFF in _RETRYABLE_SQLITE_CODES
    # MySQL and MariaDB drivers put the number first. Other drivers put text there.
    return bool(original.args) and original.args[0] in _RETRYABLE_MYSQL_CODES


def status_for(error: BaseException | None) -> HTTPStatus | None:
    """The status to answer ``error`` with, or None if Tornado's own choice is right."""
    if error is None:
        return None
    if isinstance(error, exc.TimeoutError) or is_unreachable(error) or is_retryable(error):
        return HTTPStatus.SERVICE_UNAVAILABLE
    if isinstance(error, StaleDataError):
        return HTTPStatus.CONFLICT
    return None


def summary(error: BaseException) -> str:
    """One line for the log, without the SQL text and its parameters."""
    shown = error.orig if isinstance(error, exc.DBAPIError) and error.orig else error
    text = str(shown.args[0]) if shown.args else str(shown)
    return f"{type(shown).__name__}: {text.strip().splitlines()[0] if text.strip() else '-'}"
