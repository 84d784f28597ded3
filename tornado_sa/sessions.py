"""The sessions of an `.AsyncDatabase`: a plain one, and the ``AsyncSession`` around it."""

from __future__ import annotations

import asyncio
import functools
import threading
from asyncio import Task
from collections.abc import Awaitable, Callable
from types import FunctionType
from typing import Any, ClassVar, TypeVar

import sqlalchemy.ext.asyncio.session
from greenlet import getcurrent, greenlet
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from tornado_sa.bridge import cross, task_that_may_wait
from tornado_sa.ending import is_ending
from tornado_sa.errors import ConcurrentAccess, TornadoSAError
from tornado_sa.scope import current

T = TypeVar("T")


def outside() -> TornadoSAError:
    """The error for a plain session that is asked for I/O where it would block the loop."""
    scope = current.get()
    try:
        task = asyncio.current_task()
        where = f"task {task.get_name()!r}" if task else "a callback"
    except RuntimeError:
        where = f"thread {threading.current_thread().name!r}"
    return TornadoSAError(
        f"The plain session of an AsyncDatabase was asked for I/O outside the bridge, in {where}"
        f"{f' of {scope.label}' if scope else ''}. The bridge holds for the `def` and `async def`"
        " code that a SessionHandler runs itself. Write `async def` instead of @gen.coroutine; in"
        " another task or a callback, `await db.run_sync(function)` or `async with db.scope() as"
        " session`. With an AsyncSession, load what you need beforehand, with selectinload() or"
        " `await session.refresh(note, ['replies'])`."
    )


class BridgedSession(Session):
    """The plain session of an `.AsyncDatabase`, also inside each of its ``AsyncSession`` objects.

    It does I/O under the bridge only, and knows which tasks are inside it at this moment. One
    that is closed while another task waits for its query loses its connection: asyncpg refuses
    the ROLLBACK, and SQLAlchemy leaves the connection checked out. So whoever closes must know.
    """

    _debug: ClassVar[bool] = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        #: The tasks inside, by the greenlet that each of them is inside with.
        self.users: dict[greenlet, Task[Any]] = {}
        #: The greenlet that began a COMMIT, and the number of its journey.
        self.committer: tuple[greenlet, int] | None = None
        self._is_dead = False
        self._dies = kwargs.get("close_resets_only") is False
        super().__init__(*args, **kwargs)

    @property
    def committing(self) -> bool:
        """True while a COMMIT is in progress."""
        if self.committer is None:
            return False
        # One that failed is over when its greenlet is, for no event tells.
        here, journey = self.committer
        return not here.dead and getattr(here, "journeys", 0) == journey

    def close(self) -> None:
        here = None
        if not is_ending() and self.in_transaction():
            here = getcurrent()
            if here in self.users:
                here = None
            else:
                self._enter(here)
        try:
            super().close()
        finally:
            self._is_dead = self._dies
            if here is not None:
                self.users.pop(here, None)

    def invalidate(self) -> None:
        super().invalidate()
        self._is_dead = self._dies

    def _enter(self, here: greenlet) -> None:
        task = task_that_may_wait(here)
        if task is None:
            if self._is_dead:
                return  # for SQLAlchemy's own error
            raise outside()
        if self._debug and self.users and not is_ending():
            other = next(reversed(self.users.values()))
            if other is not task:
                raise ConcurrentAccess(
                    f"Task {task.get_name()!r} used a session while task {other.get_name()!r} was"
                    " using it."
                    " Give each branch of a gather its own session: `async with db.scope() as"
                    " session:`."
                )
        self.users[here] = task


@event.listens_for(BridgedSession, "before_commit")
def _commit_begins(session: BridgedSession) -> None:
    # An event, because `with session.begin():` commits without going through the session.
    here = getcurrent()
    session.committer = here, getattr(here, "journeys", 0)


@event.listens_for(BridgedSession, "after_commit")
@event.listens_for(BridgedSession, "after_rollback")
def _commit_ended(session: BridgedSession) -> None:
    session.committer = None


# All that does I/O. What is not here, such as get(), a Query or a lazy load, uses what is.
_METHODS = (
    "bulk_insert_mappings bulk_save_objects bulk_update_mappings commit connection execute flush"
    " prepare rollback scalar scalars"
).split()


def bridged_class(base: type[Session], debug: bool) -> type[BridgedSession]:
    """A class like ``base`` whose sessions know where they are used."""
    bases = (BridgedSession,) if base is Session else (BridgedSession, base)
    methods = {name: _track(getattr(base, name)) for name in _METHODS}
    return type(base.__name__, bases, {"_debug": debug, **methods})


def _track(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def tracked(self: BridgedSession, *args: Any, **kwargs: Any) -> Any:
        here = getcurrent()
        if here in self.users:  # called by a method that is tracked itself
            return method(self, *args, **kwargs)
        self._enter(here)
        try:
            return method(self, *args, **kwargs)
        finally:
            self.users.pop(here, None)

    return tracked


def crossing_class(base: type[AsyncSession]) -> type[AsyncSession]:
    """A class like ``base`` whose sessions cross the bridge in greenlets that are used again.

    SQLAlchemy starts a greenlet for each call, which maps memory and unmaps it. Without that, 12 %
    more requests of ten queries go through on asyncio, and 16 % on uvloop: docs/performance.rst.
    The methods are SQLAlchemy's own code, whatever its version has in it, with another
    ``greenlet_spawn`` among its globals; where it has none, they stay as they are. One that
    ``base`` overrides does, too, and what that one calls by ``super()``.
    """
    module = vars(sqlalchemy.ext.asyncio.session) | {"greenlet_spawn": _spawn}
    methods = {
        name: _with_globals(function, module)
        for name, function in vars(AsyncSession).items()
        if isinstance(function, FunctionType)
        and "greenlet_spawn" in function.__code__.co_names
        and getattr(base, name) is function
    }
    return type(base.__name__, (base,), methods)


def _with_globals(function: FunctionType, names: dict[str, Any]) -> Callable[..., Any]:
    copy = FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return functools.wraps(function)(copy)


def _spawn(
    function: Callable[..., T], *args: Any, _require_await: bool = False, **kwargs: Any
) -> Awaitable[T]:
    """What SQLAlchemy's ``greenlet_spawn`` does, for the callers it has among these methods."""
    return cross(function, *args, **kwargs)
