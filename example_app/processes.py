"""Several processes that serve the same port, and the parent that looks after them."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from types import FrameType
from typing import NoReturn

from example_app.serving import GRACE, SIGNALS, Serving, serve

logger = logging.getLogger("example_app")

# A process that ends by itself is replaced, but not for ever: something is wrong then.
MAX_RESTARTS = 100

# How long the processes have to end, in seconds: to answer, and to close their connections.
PATIENCE = GRACE + 12.0


def serve_in_processes(serving: Serving, count: int) -> None:
    """Serve in ``count`` processes until a signal comes. Returns once all have ended.

    The signal is passed on to each of them. One that dies is replaced. If this
    process is killed, they end by themselves.
    """
    # A signal that comes while a child is made must reach either the child or its parent's list.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    children = _Children(serving)
    for _ in range(count):
        children.fork()
    for signum in SIGNALS:
        signal.signal(signum, children.end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    children.look_after()


class _Children:
    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._pids: set[int] = set()
        self._ending = False
        self._restarts = 0
        # Nobody ever writes to it: its end, with this process, is the message.
        self._pipe, self._our_end = os.pipe()

    def fork(self) -> None:
        """Start a process that serves."""
        pid = os.fork()
        if pid == 0:
            self._serve()
        self._pids.add(pid)

    def end(self, signum: int, _frame: FrameType | None) -> None:
        """Pass a signal on."""
        self._ending = True
        for sock in self._serving.sockets:  # or the system would go on accepting connections
            sock.close()
        for pid in self._pids:
            os.kill(pid, signum)
        # If one hangs, this process must not.
        signal.signal(signal.SIGALRM, self._kill)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)

    def look_after(self) -> None:
        """Wait until the processes have ended, and replace those that should not have."""
        failed = False
        while self._pids:
            pid, status = os.wait()
            self._pids.discard(pid)
            code = os.waitstatus_to_exitcode(status)
            failed = failed or code != 0
            if self._ending:
                continue
            logger.error("Process %d has ended by itself, with %d; another one starts", pid, code)
            self._restarts += 1
            if self._restarts > MAX_RESTARTS:
                self.end(signal.SIGTERM, None)
                sys.exit("Too many processes have ended by themselves")
            time.sleep(0.1)  # one that cannot start must not keep the machine busy
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            if not self._ending:
                failed = False
                self.fork()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if failed:
            sys.exit(1)

    def _kill(self, _signum: int, _frame: FrameType | None) -> None:
        logger.error("Killed, because they would not end: %s", sorted(self._pids))
        for pid in self._pids:
            os.kill(pid, signal.SIGKILL)

    def _serve(self) -> NoReturn:
        os.close(self._our_end)
        for signum in SIGNALS:  # this may be a fork of a process that has handlers already
            signal.signal(signum, signal.SIG_DFL)
        code = 1
        try:
            asyncio.run(serve(self._serving, lambda: None, self._pipe))
            code = 0
        except Exception:
            logger.exception("Process %d cannot serve", os.getpid())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # not to return into what the parent was doing
