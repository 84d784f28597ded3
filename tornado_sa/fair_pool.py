"""The fair pool: a connection that comes back goes to whoever has waited longest for one.

What its two kinds, in ``pool.py``, have in common: all but how one waits.
"""

from __future__ import annotations

import math
import threading
import time
from abc import abstractmethod
from collections import OrderedDict, deque
from typing import Any, cast

from sqlalchemy import Dialect, exc
from sqlalchemy.pool import ConnectionPoolEntry, Pool

from tornado_sa.turns import Grant, Turn


class FairPoolCore(Pool):
    """What `FairPool` and `AsyncFairPool` share: all that decides who gets which connection.

    Settings and figures are those of SQLAlchemy's ``QueuePool``, and one more: ``ping_after``.
    A connection that sat idle for that many seconds or more is checked before it is handed out,
    and replaced when it is dead; None means never. One that is handed from user to user is not
    checked, so a busy pool pays nothing.

    Each request takes its turn at the end of the line, even when nobody waits, and `_match` serves
    the line from its head. So no newcomer can overtake, and there is one place where a connection
    changes hands. What a turn was given stays in the turn until the request has it: whoever leaves
    the line, for whatever reason, gives back what is found there.

    Overrides ``_do_get`` and ``_do_return_conn``, as all of SQLAlchemy's own pools do: private by
    name, and the only way to write a pool.
    """

    # SQLAlchemy writes the log of a pool, and people look for it there. Private, and only a name.
    _sqla_logger_namespace = "sqlalchemy.pool.FairPool"

    def __init__(
        self,
        creator: Any,
        pool_size: int = 5,
        max_overflow: int = 10,
        timeout: float | None = 30.0,
        use_lifo: bool = False,
        ping_after: float | None = 30.0,
        **options: Any,
    ) -> None:
        super().__init__(creator, **options)
        self._size = pool_size
        self._max_overflow = max_overflow
        self._timeout = timeout
        self._lifo = use_lifo
        self._ping_after = ping_after
        self._limit = pool_size + max_overflow if pool_size and max_overflow >= 0 else math.inf
        self._keep = pool_size or math.inf  # connections to keep idle; 0 once disposed of
        self._total = 0  # connections that exist, are being made or are being closed
        self._idle: deque[Grant] = deque()
        self._line: OrderedDict[Turn, None] = OrderedDict()
        self._lock = threading.RLock()
        self._matching = False
        self._match_again = False

    def _do_get(self) -> ConnectionPoolEntry:
        with self._lock:
            # What follows would do the same. This is for speed: most requests find one at once.
            if self._idle and not self._line:
                _, since = self._idle[-1 if self._lifo else 0]
                if not self._was_idle(since):
                    return self._take_idle()[0]  # type: ignore[return-value]  # None: to be made
        turn = self._take_turn()
        try:
            self._line[turn] = None
            self._settle()
            waits = turn.grant is None
            if waits:
                self._wait(turn)
            if turn.grant is None:
                raise self._exhausted(f"none came back within {self._timeout:g} s.")
            record, since = turn.grant
            if record is None:
                return self._create_connection()
            if not waits and self._was_idle(since):  # who waited gets one that was just in use
                turn.grant = record, time.monotonic()
                self._check(record)
            return record
        except BaseException:  # a cancellation too
            self._leave(turn)
            raise

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        self._idle.append((record, time.monotonic()))
        if self._line or len(self._idle) > self._keep:
            self._settle()

    @abstractmethod
    def _take_turn(self) -> Turn:
        """A new turn, not in the line yet."""

    @abstractmethod
    def _wait(self, turn: Turn) -> None:
        """Return when ``turn`` has been given something or its time is up."""

    def _leave(self, turn: Turn) -> None:
        """Give up ``turn``, and pass on what it was given."""
        with self._lock:
            turn.left = True  # before it is looked at: nobody gives it anything from here on
            self._line.pop(turn, None)
            if turn.grant is not None:
                self._take_back(turn.grant)
        self._settle()

    def _settle(self, gone: int = 0) -> None:
        """Bring the pool in order after a change: serve who waits, close what is too much.

        ``gone`` is the number of connections that no longer exist. Waits for connections to close.
        """
        while (surplus := self._match(gone)) is not None:
            gone = 1
            try:
                surplus.close()
            except BaseException:
                self._match(gone, trim=False)
                raise

    def _match(self, gone: int, trim: bool = True) -> ConnectionPoolEntry | None:
        """Serve the line, then take out a connection to be closed, if there are too many.

        The garbage collector may return a connection between any two lines of this, in this very
        thread. The lock does not keep it out; it finds ``_matching`` set, and leaves it to the
        call that it interrupted to look again.
        """
        surplus = None
        with self._lock:
            self._total -= gone
            self._match_again = True
            while self._match_again and not self._matching:
                self._match_again, self._matching = False, True
                try:
                    while self._line and (self._idle or self._total < self._limit):
                        self._serve_first()
                    if trim and surplus is None and len(self._idle) > self._keep:
                        surplus = self._idle.pop()[0]
                finally:
                    self._matching = False
        return surplus

    def _serve_first(self) -> None:
        turn, _ = self._line.popitem(last=False)
        if not turn.waits():
            return
        if self._idle:
            turn.grant = self._take_idle()
        else:
            self._total += 1
            turn.grant = None, 0.0
        if not turn.wake():
            grant, turn.grant = turn.grant, None
            self._take_back(grant)

    def _take_idle(self) -> Grant:
        return self._idle.pop() if self._lifo else self._idle.popleft()

    def _take_back(self, grant: Grant) -> None:
        if grant[0] is None:
            self._total -= 1
        else:
            self._idle.append(grant)

    def _was_idle(self, since: float) -> bool:
        return self._ping_after is not None and time.monotonic() - since >= self._ping_after

    def _check(self, record: ConnectionPoolEntry) -> None:
        """Ping an idle connection; one that does not answer is replaced by SQLAlchemy's checkout.

        A dead connection that is noticed here is no error, nor is it worth a warning.
        """
        connection = record.dbapi_connection
        if connection is None or self._pre_ping:  # nothing to check; checked at every checkout
            return
        dialect = cast("Dialect", self._dialect)  # an engine's; without one there is no ping
        try:
            if not dialect.do_ping(connection):
                record.invalidate()
        except Exception as error:
            record.invalidate(error)
        except BaseException as error:
            # Cancelled in the middle of the conversation: the connection is not to be used again.
            # Soft, because closing it would wait for a server that may never answer.
            record.invalidate(error, soft=True)
            raise

    def _exhausted(self, why: str) -> exc.TimeoutError:
        return exc.TimeoutError(
            f"{type(self).__name__} limit of size {self._size} overflow {self.overflow()} reached"
            f" ({self.checkedout()} connections out, {self.waiting()} requests waiting): {why}",
            code="3o7r",
        )

    def size(self) -> int:
        """Number of connections that are kept when idle; 0 is no limit."""
        return self._size

    def checkedin(self) -> int:
        """Number of idle connections."""
        return len(self._idle)

    def checkedout(self) -> int:
        """Number of connections in use, those that are being made or closed among them."""
        return self._total - len(self._idle)

    def overflow(self) -> int:
        """Number of connections beyond `size`; negative while there are fewer."""
        return self._total - self._size if self._size else 0

    def waiting(self) -> int:
        """Number of requests that wait for a connection."""
        return len(self._line)

    def timeout(self) -> float | None:
        """How long a request waits, in seconds; None is for ever."""
        return self._timeout

    def status(self) -> str:
        """One line that describes the pool, for logs."""
        return (
            f"Pool size: {self.size()}  Connections in pool: {self.checkedin()}"
            f" Current Overflow: {self.overflow()}"
            f" Current Checked out connections: {self.checkedout()} Waiting: {self.waiting()}"
        )

    def recreate(self) -> FairPoolCore:
        """Make an empty pool with the same settings."""
        return type(self)(
            self._creator,
            pool_size=self._size,
            max_overflow=self._max_overflow,
            timeout=self._timeout,
            use_lifo=self._lifo,
            ping_after=self._ping_after,
            recycle=self._recycle,
            echo=self.echo,
            logging_name=self._orig_logging_name,
            reset_on_return=self._reset_on_return,
            pre_ping=self._pre_ping,
            _dispatch=self.dispatch,
            dialect=self._dialect,
        )

    def dispose(self) -> None:
        """Close the idle connections now, and the others as they come back.

        Requests that wait here still get theirs; the connection is closed after the last of them.
        """
        self._keep = 0
        self._settle()
        self.logger.info("Pool disposed. %s", self.status())
