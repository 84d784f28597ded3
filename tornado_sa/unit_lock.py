"""The lock of an isolated database: one unit of work at a time, in the order in which they came.

Savepoints lie inside each other. Units that overlap on one connection would undo each other's
work, so each waits until the one before it has let go of the connection.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from concurrent.futures import CancelledError, Future

from tornado_sa.bridge import complete, is_bridged
from tornado_sa.errors import TornadoSAError
from tornado_sa.scope import Scope, current
from tornado_sa.turns import running_loop


class UnitLock:
    """A lock whose holder is a scope: any task or thread may give it back for it."""

    def __init__(self, name: str, timeout: float) -> None:
        #: The unit of work that has the connection.
        self.holder: Scope | None = None
        self._name = name
        self._timeout = timeout
        self._line: deque[tuple[Scope, Future[None]]] = deque()
        self._mutex = threading.RLock()
        self._is_over = False

    @property
    def waiting(self) -> list[Scope]:
        """The units of work that wait, in their order."""
        return [scope for scope, _ in list(self._line)]

    def join(self, scope: Scope) -> Future[None] | None:
        """Take a place in the line; None if ``scope`` has the lock now.

        Raises `.TornadoSAError` where the holder waits for the caller, and would for ever.
        """
        outer = current.get()
        with self._mutex:
            self._check_over(scope)
            holder = self.holder
            if holder is None:
                self.holder = scope
            if holder is None or holder is scope:
                return None
            if outer is holder:
                raise TornadoSAError(
                    f"{scope.label!r} was opened inside {holder.label!r}, and {self._name} has one"
                    " connection for both: units of work that see each other half way cannot be"
                    " tested like this. Use the outer one's session, db.session; or open the inner"
                    " one when the outer one is over; or test this without isolated()."
                )
            turn: Future[None] = Future()
            self._line.append((scope, turn))
            return turn

    async def wait(self, scope: Scope, turn: Future[None]) -> None:
        """Wait until ``scope`` has the lock.

        Raises `.TornadoSAError` when that takes too long.
        """
        try:
            async with asyncio.timeout(self._timeout):
                await asyncio.wrap_future(turn)
        except TimeoutError:
            raise self._leave_too_late(scope) from None
        except BaseException:  # a cancellation: what was given in the meantime is given back
            self.leave(scope)
            raise
        self._check_over(scope)

    def take(self, scope: Scope) -> None:
        """Take the lock for plain code, which can wait under the bridge and in threads.

        On the thread of an event loop it raises `.TornadoSAError` instead: who has the lock would
        not go on, either.
        """
        turn = self.join(scope)
        if turn is None:
            return
        if is_bridged():
            complete(self.wait(scope, turn))
            return
        if running_loop() is not None:
            holder = self.holder
            self.leave(scope)
            raise TornadoSAError(
                f"{scope.label!r} cannot begin: {_shown(holder)} has the one connection of"
                f" {self._name}, and waiting for it here would stop the event loop. Let that unit"
                " of work end first: await it, or leave its `with` block."
            )
        try:
            turn.result(self._timeout)
        except (TimeoutError, CancelledError):
            raise self._leave_too_late(scope) from None
        self._check_over(scope)

    def leave(self, scope: Scope) -> None:
        """Give the lock back, or the place in the line."""
        with self._mutex:
            if self.holder is scope:
                self.holder = None
                self._pass_on()
            else:
                self._line = deque(one for one in self._line if one[0] is not scope)

    def end(self) -> None:
        """Send away all who wait, with an error."""
        with self._mutex:
            self._is_over = True
            while self._line:
                _, turn = self._line.popleft()
                if turn.set_running_or_notify_cancel():
                    turn.set_result(None)

    def _pass_on(self) -> None:
        while self._line:
            scope, turn = self._line.popleft()
            if turn.set_running_or_notify_cancel():  # else its task was cancelled
                self.holder = scope
                turn.set_result(None)
                return

    def _check_over(self, scope: Scope) -> None:
        if self._is_over:
            raise TornadoSAError(
                f"{scope.label!r} wants to begin when {self._name} is over. Await what a test has"
                " started before it ends."
            )

    def _leave_too_late(self, scope: Scope) -> TornadoSAError:
        holder = self.holder
        self.leave(scope)
        return TornadoSAError(
            f"{scope.label!r} has waited {self._timeout:g} s for the one connection of"
            f" {self._name}, which {_shown(holder)} has. Is that waiting for this one? A test that"
            " awaits a request inside `with db.begin()` does: leave the block before the request."
            " Or test this without isolated()."
        )


def _shown(scope: Scope | None) -> str:
    return "nobody" if scope is None else f"{scope.label!r} ({scope.age:.1f} s)"
