"""Who holds a connection for long: one line in the log, when the connection comes back."""

from __future__ import annotations

import math
import os
import sys
import time
from types import CodeType, FrameType
from typing import Any

from greenlet import getcurrent
from sqlalchemy import Connection, Engine, ExceptionContext, event
from sqlalchemy.pool import ConnectionPoolEntry

from tornado_sa.ending import logger
from tornado_sa.errors import ConfigurationError
from tornado_sa.scope import current

# Whose frames are never the place where the application used its session.
_LIBRARIES = sys.stdlib_module_names | {"greenlet", "sqlalchemy", "tornado", "tornado_sa"}

# Below these, the stack is the one that started the event loop.
_LOOPS = frozenset(
    "asyncio.base_events asyncio.events asyncio.runners tornado.ioloop"
    " tornado.platform.asyncio".split()
)


def warn_of_long_holds(engine: Engine, seconds: float) -> None:
    """Log a warning for each connection of ``engine`` that is held longer than ``seconds``.

    The line comes when the connection goes back to the pool, is invalidated or
    detached. It names the unit of work, how long it held the connection, how
    much of that was spent in statements, and the line of the application that
    used it first. Fetching the rows of a streamed result, and COMMIT, do not
    count as statements.

    Raises `.ConfigurationError` if ``seconds`` is not a number greater than 0.
    """
    if (
        isinstance(seconds, bool)
        or not isinstance(seconds, int | float)
        or not (math.isfinite(seconds) and seconds > 0)
    ):
        raise ConfigurationError(
            "hold_warning is a number of seconds greater than 0, such as hold_warning=1.0, or None"
            f" for no warnings; not {seconds!r}."
        )
    watch = _Watch(seconds)
    event.listen(engine, "checkout", watch.goes_out)
    event.listen(engine, "checkin", watch.comes_back)
    # Its place in the pool is free again, and no checkin follows. So it is with an async
    # connection that the garbage collector found.
    event.listen(engine, "detach", watch.comes_back)
    event.listen(engine, "before_cursor_execute", watch.statement_begins)
    event.listen(engine, "after_cursor_execute", watch.statement_ends)
    event.listen(engine, "handle_error", watch.statement_fails)


def forget_hold(connection: Connection) -> None:
    """Do not watch ``connection``, which is out and belongs to no unit of work."""
    info = connection.connection.info
    for watch in [key for key in info if isinstance(key, _Watch)]:
        del info[watch]


class _Hold:
    """A connection that is out. Only its holder touches this, so it needs no lock."""

    __slots__ = ("in_sql", "label", "place", "since", "statement_since")

    def __init__(self) -> None:
        scope = current.get()
        # The label and no scope: the connection may be kept longer than the unit of work.
        self.label = "code outside of any unit of work" if scope is None else scope.label
        self.place = _place_of_use()
        self.in_sql = 0.0
        self.statement_since: float | None = None
        self.since = time.monotonic()

    def end_statement(self) -> None:
        if self.statement_since is not None:
            self.in_sql += time.monotonic() - self.statement_since
            self.statement_since = None


class _Watch:
    """The listeners of one engine.

    What they know of a connection is kept in its ``info``, which SQLAlchemy
    empties when it connects again. A connection that is not in there was not
    seen to go out, and is left alone.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._folder = os.getcwd() + os.sep  # now: a daemon goes elsewhere

    def goes_out(self, _dbapi: Any, record: ConnectionPoolEntry, _proxy: Any) -> None:
        record.info[self] = _Hold()

    def comes_back(self, _dbapi: Any, record: ConnectionPoolEntry) -> None:
        hold: _Hold | None = record.info.pop(self, None)
        if hold is None:
            return
        held = time.monotonic() - hold.since
        if held <= self._seconds:
            return
        hold.end_statement()  # one that was broken off
        where = ""
        if hold.place is not None:
            code, line = hold.place
            file = code.co_filename.removeprefix(self._folder)
            where = f"; first used at {file}:{line} in {code.co_name}"
        # To who waits for a slow statement, the advice would be a wrong one.
        advice = " Release it before a slow await: await self.release()."
        logger.warning(
            "%s held a connection for %.1f s, %.1f s of it in SQL%s.%s",
            hold.label,
            held,
            hold.in_sql,
            where,
            advice if hold.in_sql < held / 2 else "",
        )

    def statement_begins(self, connection: Connection, *_statement: Any) -> None:
        hold: _Hold | None = connection.info.get(self)
        if hold is not None:
            hold.statement_since = time.monotonic()

    def statement_ends(self, connection: Connection, *_statement: Any) -> None:
        hold: _Hold | None = connection.info.get(self)
        if hold is not None:
            hold.end_statement()

    def statement_fails(self, context: ExceptionContext) -> None:
        connection = context.connection
        # Asking an invalidated one for its info would connect again.
        if connection is not None and not connection.closed and not connection.invalidated:
            self.statement_ends(connection)


def _place_of_use() -> tuple[CodeType, int] | None:
    """The innermost line of the application that is being executed, if there is one.

    Under an async driver, SQLAlchemy runs in a greenlet. What called it is on
    the stack of the greenlet's parent.
    """
    greenlet = getcurrent()
    frame: FrameType | None = sys._getframe(1)
    while True:
        while frame is not None:
            module = str(frame.f_globals.get("__name__"))
            if module in _LOOPS:
                return None
            if module.partition(".")[0] not in _LIBRARIES:
                return frame.f_code, frame.f_lineno
            frame = frame.f_back
        if greenlet.parent is None:
            return None
        greenlet = greenlet.parent
        frame = greenlet.gr_frame
