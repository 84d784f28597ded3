"""Workers: the threads that do the blocking work of a scope, one call after the other.

A scope has one worker at a time, whichever of its databases is asked for it. As long as it has
one, its sessions are the worker's: no other thread gets at them, and whoever ends the scope leaves
the closing to the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

from tornado_sa.ending import log_failed_closing, logger
from tornado_sa.errors import ConcurrentAccess
from tornado_sa.functions import name_of
from tornado_sa.responses import summary
from tornado_sa.scope import Scope

#: The scopes that have a worker, or will have one as soon as there is a thread for it.
lines: dict[Scope, _Line] = {}
# Reentrant, because the garbage collector may end a scope anywhere, also where the lock is held.
_lock = threading.RLock()
_of_the_parent: list[_Line] = []


class Call:
    """One call of ``to_thread``, made in the task that waits for it."""

    def __init__(self, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.name: str = name_of(function)
        self.result: Any = None
        self.error: BaseException | None = None
        self.done: asyncio.Event = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._work = partial(contextvars.copy_context().run, function, *args, **kwargs)

    def run(self, scope: Scope) -> None:
        """Call the function in this thread, and keep what comes of it."""
        try:
            scope.check()
            self.result = self._work()
        except BaseException as error:
            self.error = error

    def tell(self) -> None:
        """Wake the task that waits."""
        with contextlib.suppress(RuntimeError):  # its loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self.done.set)


class _Line:
    """The calls of one scope, in the order in which they were made, and their worker."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.waiting: deque[Call] = deque()
        self.running: Call | None = None
        self.thread: int | None = None
        self.since = 0.0  # when the running call began, in seconds of time.monotonic
        self.endings: list[Callable[[], None]] = []

    def withdraw(self, call: Call) -> bool:
        """Take out a call that waits for its turn; False if a worker has it, or had it."""
        with _lock:
            if call not in self.waiting:
                return False
            self.waiting.remove(call)
            if not self.waiting and self.running is None:
                del lines[self.scope]  # before the worker came; it will find nothing to do
            return True

    def work(self) -> None:
        """Make the calls, one after the other, in this thread."""
        call = self._next()
        while call is not None:
            call.run(self.scope)
            made, call = call, self._next()
            made.tell()  # last: the task that wakes up finds the sessions let go of
            del made

    def _next(self) -> Call | None:
        with _lock:
            self.running = self.waiting.popleft() if self.waiting else None
            self.thread, self.since = threading.get_ident(), time.monotonic()
            if self.running is None and lines.get(self.scope) is self:
                del lines[self.scope]  # from here on, whoever ends the scope does so himself
        while self.endings:
            try:
                self.endings.pop()()
            except Exception as error:
                log_failed_closing(self.scope, error)
        return self.running


class Workers:
    """The worker threads of one database, started as they are needed."""

    def __init__(self) -> None:
        self._executors: dict[bool, ThreadPoolExecutor] = {}
        self._busy: dict[Future[None], _Line] = {}

    async def run(self, scope: Scope, call: Call, threads: int, connected: bool) -> Any:
        """Let a worker make ``call`` when its turn comes; return or raise what comes of it.

        There are ``threads`` for the scopes that hold a connection and as many for those that
        will have to ask for one. Were they the same, they could all wait for connections, and
        the scopes that hold these wait for a thread to go on with.

        A cancellation is held back until the worker has let go of the session.
        """
        with _lock:
            line = lines.get(scope)
            if is_new := line is None:
                line = lines[scope] = _Line(scope)
            line.waiting.append(call)
        try:
            if is_new:
                self._start(line, threads, connected)
            await call.done.wait()
        except BaseException as stop:
            if not line.withdraw(call) and isinstance(stop, asyncio.CancelledError):
                while not call.done.is_set():
                    with contextlib.suppress(asyncio.CancelledError):
                        await call.done.wait()
                if call.error is not None:
                    why, call.error = summary(call.error), None
                    logger.error("%s: cancelled, then %s failed: %s", scope.label, call.name, why)
            raise
        error, call.error = call.error, None
        if error is None:
            return call.result
        try:
            raise error
        finally:
            del error  # whose traceback holds this frame

    def _start(self, line: _Line, threads: int, connected: bool) -> None:
        executor = self._executors.get(connected)
        if executor is None:
            name = f"tornado_sa worker{' (connected)' * connected}"
            executor = self._executors[connected] = ThreadPoolExecutor(threads, name)
        future = executor.submit(line.work)
        self._busy[future] = line
        future.add_done_callback(self._busy.pop)

    def dispose(self, timeout: float) -> str:
        """Wait at most ``timeout`` seconds; return what still runs. A later call starts afresh."""
        executors, self._executors = self._executors, {}
        wait(list(self._busy), timeout)
        for executor in executors.values():
            executor.shutdown(wait=False)  # what it has accepted runs to its end
        now = time.monotonic()
        running = [(line, line.running) for line in list(self._busy.values())]
        return ", ".join(
            f"{call.name} of {line.scope.label} ({now - line.since:.1f} s)"
            for line, call in running
            if call is not None
        )


def check(scope: Scope) -> None:
    """Raise `.ConcurrentAccess` if the sessions of ``scope`` belong to another thread, a worker."""
    line = lines.get(scope)
    if line is None or line.thread == threading.get_ident():
        return
    with _lock:
        call = line.running or (line.waiting[0] if line.waiting else None)
    if call is not None:
        scope.check()
        raise ConcurrentAccess(
            f"The session of {scope.label!r} was asked for in thread"
            f" {threading.current_thread().name!r} while it belongs to the worker thread of"
            f" db.to_thread({call.name}). Await that first, or give this branch a unit of work of"
            " its own: `with db.scope() as session:`."
        )


def is_worker(scope: Scope) -> bool:
    """True in the thread of the scope's worker."""
    line = lines.get(scope)
    return line is not None and line.thread == threading.get_ident()


def leave_ending(scope: Scope, end: Callable[[], None]) -> bool:
    """Leave the end of a session to the worker of its scope; False if there is none."""
    line = lines.get(scope)
    if line is None:
        return False
    with _lock:
        if lines.get(scope) is line:
            line.endings.append(end)
            return True
    return False


def _after_fork() -> None:
    """Forget the workers, threads of the parent; but keep their sessions, connections of its."""
    global _lock
    _lock = threading.RLock()
    _of_the_parent.extend(lines.values())
    lines.clear()


os.register_at_fork(after_in_child=_after_fork)
