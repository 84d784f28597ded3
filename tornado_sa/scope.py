"""The scope: the object that stands for one unit of work.

A context variable points to the current scope, so that code anywhere below a
request finds the request's session without being handed it. The variable is
only the way to look the scope up. Its owner (a handler, a ``with`` block) ends
it, from whatever task, thread or context the end comes.
"""

from __future__ import annotations

import time
from asyncio import Task
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from tornado_sa.errors import NoActiveScope, ScopeClosed

#: Points to the current scope. Outside of this module, only looked at where speed matters.
current: ContextVar[Scope | None] = ContextVar("tornado_sa.scope", default=None)

# The path of a request can be as long as Tornado lets headers be, 64 KiB. A log line should not.
_LABEL_LENGTH = 200


@dataclass(frozen=True, slots=True)
class ReadOnly:
    """How a unit of work reads that only reads."""

    #: In a transaction, as server-side cursors need one.
    stream: bool


class SessionOwner(Protocol):
    """What a scope asks of the databases whose sessions it holds."""

    debug: bool

    def uncommitted(self, scope: Scope, session: Any) -> str | None:
        """What would be lost if ``session`` were rolled back now, in words."""

    def end_session(self, scope: Scope, session: Any) -> Task[None] | None:
        """Roll back and close; return the task that does so if it takes I/O. Never raises."""


class Scope:
    """One unit of work: a request, a WebSocket event, a job, a block of a script.

    A scope holds at most one session per database, made when it is first asked
    for, and ends exactly once. Scopes are made by handlers and by
    ``db.scope()`` and ``db.begin()``, not by calling this class.
    """

    __slots__ = (
        "__weakref__",
        "_label",
        "_sessions",
        "calls_back",
        "closed",
        "closings",
        "entered",
        "handler_name",
        "opened_at",
        "read_only",
    )

    def __init__(self, *label: str) -> None:
        # In pieces, for most are never shown. Joined here, they would cost an idle request more
        # than the rest of its scope.
        self._label = label
        #: True once the unit of work is over.
        self.closed: bool = False
        #: True while an entry point of its handler runs under the bridge.
        self.entered: bool = False
        #: The sessions that its owner closes when it goes on, each with its database. None if it
        #: does not: then closing one is a task at once.
        self.closings: list[tuple[Any, Any]] | None = None
        #: The class of the handler it belongs to, if it belongs to one.
        self.handler_name: str = ""
        #: True once `after_commit` was called in it.
        self.calls_back: bool = False
        #: When it was opened, in seconds of `time.monotonic`.
        self.opened_at: float = time.monotonic()
        #: Set if the unit of work only reads. Its sessions are made accordingly.
        self.read_only: ReadOnly | None = None
        self._sessions: dict[SessionOwner, Any] = {}

    def __repr__(self) -> str:
        return f"<Scope {self.label!r} {'closed' if self.closed else 'open'}>"

    @property
    def label(self) -> str:
        """What errors and logs call the unit of work, such as ``GET /notes/7``."""
        return " ".join(self._label)[:_LABEL_LENGTH]

    @property
    def full_label(self) -> str:
        """The label with the class of the handler, such as ``Notes, GET /notes/7``."""
        return f"{self.handler_name}, {self.label}" if self.handler_name else self.label

    @property
    def has_sessions(self) -> bool:
        """True if a session was opened in it."""
        return bool(self._sessions)

    def uncommitted(self) -> tuple[str | None, bool]:
        """What would be lost if it ended now, in words, and whether that is to be an error."""
        lost, is_error = [], False
        for owner, session in list(self._sessions.items()):
            found = owner.uncommitted(self, session)
            if found is not None:
                lost.append(found)
                is_error |= owner.debug
        return ", ".join(lost) or None, is_error

    @property
    def age(self) -> float:
        """Seconds since the scope was opened."""
        return time.monotonic() - self.opened_at

    def check(self) -> None:
        """Raise `.ScopeClosed` if the unit of work is over."""
        if self.closed:
            raise ScopeClosed(
                f"The unit of work {self.label!r} is over, and its session with it. Work that"
                " outlives it, such as a background task or anything after finish(), needs a"
                " scope of its own: `with db.scope() as session:`, or `async with` on an"
                " AsyncDatabase."
            )

    def get(self, owner: SessionOwner) -> Any | None:
        """The session of ``owner`` in this scope, or None if it has none yet."""
        return self._sessions.get(owner)

    def put(self, owner: SessionOwner, session: Any) -> Any:
        """Keep ``session``, unless another thread was first; return the one that is kept.

        Raises `.ScopeClosed`.
        """
        kept = self._sessions.setdefault(owner, session)
        if self.closed:  # looked at after the insertion: end() sets it before it empties the dict
            self.drop(owner)
            self.check()
        return kept

    def drop(self, owner: SessionOwner) -> None:
        """Forget the session of ``owner``, which has been closed by other means."""
        self._sessions.pop(owner, None)

    def end(self) -> list[Task[None]]:
        """End the unit of work: roll back what was not committed, and close.

        Never raises, and does nothing the second time. Sessions are closed in
        the reverse of the order in which they were opened, each whether or not
        another one failed. Returns the tasks that finish closings which take
        I/O on the event loop; their databases keep track of them, so a caller
        may wait for them or drop them.
        """
        self.closed = True
        if not self._sessions:
            return []
        closings: list[Task[None]] = []
        while self._sessions:  # popitem is atomic: no session is ever closed by two threads
            owner, session = self._sessions.popitem()
            try:
                closing = owner.end_session(self, session)
            except BaseException:  # cancelled, where it waits under the bridge
                self.end()
                raise
            if closing is not None:
                closings.append(closing)
        return closings


def current_scope() -> Scope:
    """The scope of the unit of work that this code belongs to.

    This is the ``scopefunc`` of every ``db.session``.

    Raises `.NoActiveScope` where no unit of work is open, and `.ScopeClosed`
    where it is over.
    """
    scope = current.get()
    if scope is None:
        raise NoActiveScope(
            "No unit of work is open here, so there is no current session. A handler opens one"
            " for its request; elsewhere write `with db.scope() as session:` or `with db.begin()"
            " as session:` (`async with` on an AsyncDatabase). A thread started with"
            " run_in_executor inherits no scope; one started with asyncio.to_thread does."
        )
    if scope.closed:
        scope.check()
    return scope


def enter(scope: Scope) -> Scope | None:
    """Make ``scope`` the current one; return the one that was."""
    previous = current.get()
    if previous is not scope:  # the first value in a context costs more than all the rest
        current.set(scope)
    return previous


def leave(scope: Scope, previous: Scope | None) -> None:
    """Make ``previous`` the current scope again.

    No token is used: a coroutine can be closed, and a fixture finished, in
    another context than the one it began in. There ``reset`` would raise, and
    a variable that points elsewhere is none of our business.
    """
    if previous is not scope and current.get() is scope:
        current.set(previous)
