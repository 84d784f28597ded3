"""Which status an error is answered with: a pure function, a table of cases."""

from __future__ import annotations

import sqlite3
from typing import Any

import pytest
from sqlalchemy import exc
from sqlalchemy.orm.exc import StaleDataError

from tornado_sa.responses import is_retryable, mark_unreachable, status_for, summary


def driver_error(*args: Any, **attributes: Any) -> exc.DBAPIError:
    original = Exception(*args)
    for name, value in attributes.items():
        setattr(original, name, value)
    return exc.DBAPIError("SELECT secret", {"parameter": "secret"}, original)


def lost() -> exc.DBAPIError:
    error = driver_error("gone")
    error.connection_invalidated = True
    return error


def marked(error: BaseException) -> BaseException:
    mark_unreachable(error)
    return error


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (exc.TimeoutError("QueuePool limit"), 503),
        (lost(), 503),
        (marked(ConnectionRefusedError()), 503),
        (exc.OperationalError("", {}, marked(Exception("refused"))), 503),
        (driver_error("serialization", sqlstate="40001"), 503),
        (StaleDataError("expected to update 1 row"), 409),
        (ConnectionRefusedError(), None),
        (OSError(), None),
        (TimeoutError(), None),
        (driver_error("syntax", sqlstate="42601"), None),
        (ValueError(), None),
        (None, None),
    ],
)
def test_status_for(error: BaseException | None, status: int | None) -> None:
    assert status_for(error) == status


@pytest.mark.parametrize(
    ("error", "retryable"),
    [
        (driver_error("serialization_failure", sqlstate="40001"), True),
        (driver_error("deadlock_detected", sqlstate="40P01"), True),
        (driver_error("deadlock_detected", pgcode="40P01"), True),
        (driver_error(1213, "Deadlock found"), True),
        (driver_error(1205, "Lock wait timeout exceeded"), True),
        (driver_error("database is locked", sqlite_errorcode=sqlite3.SQLITE_BUSY), True),
        (driver_error("snapshot", sqlite_errorcode=sqlite3.SQLITE_BUSY_SNAPSHOT), True),
        (driver_error("table is locked", sqlite_errorcode=sqlite3.SQLITE_LOCKED), True),
        (driver_error("constraint", sqlite_errorcode=sqlite3.SQLITE_CONSTRAINT), False),
        (driver_error("unique_violation", sqlstate="23505"), False),
        (driver_error(1062, "Duplicate entry"), False),
        (driver_error(), False),
        (ValueError(1213), False),
    ],
)
def test_is_retryable(error: BaseException, retryable: bool) -> None:
    assert is_retryable(error) is retryable


def test_summary_is_one_line_without_sql() -> None:
    assert summary(driver_error("first line\nsecond line")) == "Exception: first line"
    assert summary(ValueError()) == "ValueError: -"
