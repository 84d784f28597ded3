"""The two kinds of fair pool: threads wait in the one, tasks in the other."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import deque
from contextlib import suppress
from typing import Any, cast

from sqlalchemy import Dialect
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.util import await_only

from tornado_sa.fair_pool import FairPoolCore
from tornado_sa.home import Home
from tornado_sa.turns import TaskTurn, ThreadTurn, Turn, running_loop, wake_up

# Where the loop in which it was made is found in the info of a record.
_HOME = "tornado_sa.home"


class FairPool(FairPoolCore):
    """The pool of a `.Database`. Threads wait in it; the event loop's thread never does.

    There it raises ``sqlalchemy.exc.TimeoutError`` at once: waiting would stop the very handlers
    that could give a connection back.
    """

    def _take_turn(self) -> Turn:
        return ThreadTurn()

    def _wait(self, turn: Turn) -> None:
        if running_loop() is not None:
            raise self._exhausted(
                "a Database never waits for one on the event loop's thread, where waiting would"
                " stop the handlers that could give one back. Set a larger pool_size in"
                " engine_options, use AsyncDatabase, or do the work in a thread with"
                f" db.to_thread(), where it may wait for pool_timeout ({self._timeout} s)."
            )
        assert isinstance(turn, ThreadTurn)
        gate = threading.Lock()
        gate.acquire()
        turn.gate = gate
        if turn.grant is None:  # else it came before there was a gate to open
            gate.acquire(timeout=-1 if self._timeout is None else self._timeout)


class AsyncFairPool(FairPoolCore):
    """The pool of an `.AsyncDatabase`. The tasks of one event loop wait in it: of its `.Home`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._home = Home()
        self._alarm_is_set = False  # and the handle not kept: it refers to the pool

    def _do_get(self) -> ConnectionPoolEntry:
        if not self._home.is_here():
            self._move()
        return super()._do_get()

    def dispose(self) -> None:
        if not self._home.is_here():
            self._move()
        super().dispose()

    def _create_connection(self) -> ConnectionPoolEntry:
        record = super()._create_connection()
        cast("Any", record).record_info[_HOME] = self._home.loop
        return record

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        if cast("Any", record).record_info[_HOME] is self._home.loop:
            super()._do_return_conn(record)
        else:
            self._drop(record)

    def _move(self) -> None:
        """Begin anew in the loop that runs here: nothing of the old one will come to an end."""
        with self._lock:
            self._home.move(is_empty=self._total == 0)
            stranded, self._idle = self._idle, deque()
            self._line.clear()
            self._total = 0
            self._alarm_is_set = False
        for record, _ in stranded:
            self._drop(record)

    def _drop(self, record: ConnectionPoolEntry | None) -> None:
        """Close a connection of another loop as well as can be done from here.

        Where the driver cannot, the garbage collector closes the socket.
        """
        if record is not None and record.dbapi_connection is not None:
            with suppress(Exception):
                cast("Dialect", self._dialect).do_close(record.dbapi_connection)

    def _take_turn(self) -> Turn:
        loop = self._home.loop
        if loop is None or self._timeout is None:
            return TaskTurn(loop, math.inf)
        return TaskTurn(loop, loop.time() + self._timeout)

    def _leave(self, turn: Turn) -> None:
        assert isinstance(turn, TaskTurn)
        if turn.home is self._home.loop:
            super()._leave(turn)
        elif turn.grant is not None:  # a task of a closed loop is collected: see `_move`
            self._drop(turn.grant[0])

    def _wait(self, turn: Turn) -> None:
        assert isinstance(turn, TaskTurn)
        loop = asyncio.get_running_loop()
        if turn.until <= loop.time():
            return
        turn.future = loop.create_future()
        if not self._alarm_is_set and turn.until < math.inf:
            self._set_alarm(loop, turn.until)
        if turn.grant is None:  # else another thread gave it before there was a future
            await_only(turn.future)

    def _set_alarm(self, loop: asyncio.AbstractEventLoop, until: float) -> None:
        """Set the one alarm for all who wait: for the first in line, whose time is up first.

        A timer for each, set and cancelled, would cost as much as everything else here.
        """
        self._alarm_is_set = True
        loop.call_at(until, self._ring, loop)

    def _ring(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wake up whose time is up, and set the alarm for the next."""
        if loop is not self._home.loop:  # the pool has moved, and nobody waits here
            return
        self._alarm_is_set = False
        for turn in cast("list[TaskTurn]", list(self._line)):
            if turn.until > loop.time():
                self._set_alarm(loop, turn.until)
                break
            if turn.future is not None:
                wake_up(turn.future)
