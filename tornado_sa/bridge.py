"""The bridge: plain ``Session`` code over an async driver, without blocking the loop.

As in SQLAlchemy's own ``AsyncSession.run_sync``, a function runs in a greenlet, out of which a
query of the plain ``Session`` may switch to the event loop and back. Here a whole entry point of a
handler runs in one such greenlet: a function as it is, a coroutine with each of its steps. One
greenlet for all steps, because a session that is awaited in there, as ``await db.run_sync(...)``
does, starts a greenlet of its own, which goes on returning to the one that it was started from.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from asyncio import Task
from collections.abc import Awaitable, Callable, Generator
from types import CoroutineType, coroutine
from typing import Any, ParamSpec, TypeVar, cast

from greenlet import GreenletExit, getcurrent, greenlet

# Not documented, and the only way to wait for something other than a query: "await" for code that
# runs in SQLAlchemy's greenlet.
from sqlalchemy.util import await_only

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
    if _EAGER_TASKS:  # asked here too: without them, no coroutine for each crossing
        await step_aside()
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
    return task_that_may_wait(getcurrent())


def task_that_may_wait(here: greenlet) -> Task[Any] | None:
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
    """Leave the greenlet of another task, before code that may start one of its own.

    With ``asyncio.eager_task_factory`` the first step of a task runs right where the task is
    created, and so in its creator's greenlet. One that is started in there would go on returning
    to it.
    """
    if _EAGER_TASKS:
        task = asyncio.current_task()
        if _task_of(getcurrent(), task) is not task:
            await asyncio.sleep(0)
