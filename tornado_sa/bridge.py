"""The bridge: plain ``Session`` code over an async driver, without blocking the loop.

As in SQLAlchemy's own ``AsyncSession.run_sync``, a function runs in a greenlet, out of which a
query of the plain ``Session`` may switch to the event loop and back. Here a whole entry point of a
handler runs in one such greenlet: a function as it is, a coroutine with each of its steps. One
greenlet for all steps, because a session that is awaited in there, as ``await db.run_sync(...)``
does, starts a greenlet of its own, which goes on returning to the one that it was started from.
"""

from __future__ import annotations

import asyncio
import functools
import sys
import threading
from asyncio import Task
from collections.abc import Awaitable, Callable, Generator
from types import CoroutineType, coroutine
from typing import Any, ClassVar, ParamSpec, TypeVar, cast

from greenlet import GreenletExit, getcurrent, greenlet
from sqlalchemy import event
from sqlalchemy.orm import Session

# Not documented, and the only way to wait for something other than a query: "await" for code that
# runs in SQLAlchemy's greenlet.
from sqlalchemy.util import await_only

from tornado_sa.ending import is_ending
from tornado_sa.errors import ConcurrentAccess, TornadoSAError
from tornado_sa.scope import current

P = ParamSpec("P")
T = TypeVar("T")

# What a greenlet says to the one that carries it on: it has come to its end.
_DONE = object()

# With these, a task can take its first step inside the greenlet of another one.
_EAGER_TASKS = sys.version_info >= (3, 12)

# How many greenlets are kept for the next to cross, in each thread.
_KEPT = 100


class _Carrier(greenlet):
    """A greenlet that carries one function after another across.

    SQLAlchemy starts a new one for each. That takes 8 µs more, on Python 3.11, which maps memory
    for the stack of every greenlet and unmaps it again.
    """

    # By this, SQLAlchemy knows a greenlet that may wait.
    __sqlalchemy_greenlet_provider__ = True

    def __init__(self) -> None:
        super().__init__()
        #: The task that crosses; None where nobody would wait for it any more.
        self.task: Task[Any] | None = None
        #: How many times it has crossed.
        self.journeys = 0
        # No argument of switch(): greenlet keeps those of the first one as long as the carrier.
        self.load: tuple[Callable[..., Any], Any, Any] | None = None
        self.result: Any = None
        self.failure: BaseException | None = None

    def run(self) -> None:
        while self.load is not None:
            function, args, kwargs = self.load
            self.load = None
            try:
                self.result = function(*args, **kwargs)
            except GreenletExit:  # nobody refers to this greenlet any more
                raise
            except BaseException as error:
                self.failure = error
            del function, args, kwargs  # or it would keep them alive until its next journey
            assert self.parent is not None
            self.parent.switch(_DONE)

    def unload(self) -> tuple[Any, BaseException | None]:
        """Return what came of it, and forget everything."""
        result, failure = self.result, self.failure
        self.task = self.result = self.failure = self.gr_context = None
        self.journeys += 1
        assert self.parent is not None
        while self.parent.parent is not None:  # two, nested either way round, would make a ring
            self.parent = self.parent.parent
        return result, failure


class _Idle(threading.local):
    """The carriers of a thread that wait for a load: greenlets never change threads."""

    def __init__(self) -> None:
        self.carriers: list[_Carrier] = []


_idle = _Idle()


async def cross(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Call ``function`` under the bridge: in it, a plain session may do I/O."""
    here, carriers = getcurrent(), _idle.carriers
    carrier = carriers.pop() if carriers else _Carrier()
    carrier.parent, carrier.gr_context = here, here.gr_context
    carrier.task = asyncio.current_task()
    carrier.load = (function, args, kwargs)
    waited = carrier.switch()
    while waited is not _DONE:
        try:
            value = await waited
        except BaseException:
            waited = carrier.throw(*sys.exc_info())
        else:
            waited = carrier.switch(value)
            value = None
    result: T
    result, error = carrier.unload()
    if len(carriers) < _KEPT:
        carriers.append(carrier)
    else:
        carrier.switch()  # with no load: it comes to its end
    if error is not None:
        try:
            raise error
        finally:
            error = None  # holds this frame by its traceback
    return result


def complete(awaitable: Awaitable[T]) -> T:
    """Wait for ``awaitable`` under the bridge; a coroutine's own code runs under the bridge too.

    Everything else, such as the Future of a ``@gen.coroutine``, runs where it always did.
    """
    if not isinstance(awaitable, CoroutineType):
        return await_only(awaitable)
    value, error = None, None
    while True:
        try:
            waited = awaitable.send(value) if error is None else awaitable.throw(error)
        except StopIteration as stop:
            return cast(T, stop.value)
        finally:
            error = None  # holds this frame by its traceback
        try:
            value = await_only(_hand_on(waited))
        except GeneratorExit:
            # The task is being thrown away. What its coroutine does now, it does without I/O,
            # for nobody would wait for that.
            cast(_Carrier, getcurrent()).task = None
            awaitable.close()
            raise
        except BaseException as caught:
            error = caught


@coroutine
def _hand_on(waited: Any) -> Generator[Any, Any, Any]:
    """Yield to the loop what the coroutine yielded."""
    return (yield waited)


def is_bridged() -> bool:
    """True where a plain session of an `.AsyncDatabase` may do I/O."""
    return bridged_task() is not None


def bridged_task() -> Task[Any] | None:
    """The current task, if this is under its bridge."""
    return _task_that_may_wait(getcurrent())


def _task_that_may_wait(here: greenlet) -> Task[Any] | None:
    """The current task, if ``here`` is under its bridge."""
    if type(here) is _Carrier and not _EAGER_TASKS:  # what it carries runs, so its task does
        return here.task
    if not getattr(here, "__sqlalchemy_greenlet_provider__", False):  # SQLAlchemy's own mark
        return None
    current_task = asyncio.current_task()
    return current_task if _task_of(here, current_task) is current_task else None


def _task_of(here: greenlet | None, otherwise: Task[Any] | None) -> Task[Any] | None:
    """The task for which ``here``, or the greenlet it is nested in, crossed the bridge.

    ``otherwise``, if none of them crossed it.
    """
    while here is not None:
        if isinstance(here, _Carrier):
            return here.task
        here = here.parent
    return otherwise


async def step_aside() -> None:
    """Leave the greenlet of another task.

    With ``asyncio.eager_task_factory`` the first step of a task runs right where the task is
    created, and so in its creator's greenlet. One that is started in there would go on returning
    to it.
    """
    task = asyncio.current_task()
    if _task_of(getcurrent(), task) is not task:
        await asyncio.sleep(0)


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
        task = _task_that_may_wait(here)
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
