"""The end of a test, for fixtures: what it has left out, and the end of its isolation.

A fixture ends when its test is over. By then the loop of the test may stand still, or be closed.
"""

from __future__ import annotations

import asyncio
import gc
import time
import warnings
from asyncio import AbstractEventLoop, Task
from collections.abc import Iterator
from types import CoroutineType
from typing import Any

from tornado_sa.bridge import cross
from tornado_sa.isolation import Isolation
from tornado_sa.scope import Scope
from tornado_sa.turns import running_loop

# How often it is looked whether what was about to end has ended, in seconds.
_PAUSE = 0.002

# Tasks of these are no test's own: the server's end of a connection outlives its requests.
_FRAMEWORKS = ("tornado", "asyncio", "anyio", "pytest_asyncio", "_pytest", "pytest_tornado")


def end_anywhere(isolation: Isolation, check: bool, moment: float = 1.0) -> None:
    """End ``isolation``, from plain code.

    Raises ``AssertionError``, if ``check``, for units of work, connections and tasks that are
    left. Those that are about to end have a ``moment`` for it, in seconds.
    """
    loop = isolation.loop
    if loop is not None and (loop.is_closed() or loop.is_running() or running_loop()):
        loop = None
    if loop is not None:
        loop.run_until_complete(_settle(isolation, moment))
    left = list(_left(isolation))
    _end_units(isolation, loop)
    isolation.switch_off()
    _roll_back(isolation, loop)
    if left and check:
        raise AssertionError(
            "The test has left out: " + "; ".join(left) + ". Await what it starts, and leave each"
            " `with` block. (To do without this check, override the fixture nothing_left_out.)"
        )


async def _settle(isolation: Isolation, moment: float) -> None:
    deadline = time.monotonic() + moment
    while any(_left(isolation)) and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(_PAUSE)


def _units(isolation: Isolation) -> list[Scope]:
    isolation.look_at_holder()
    return list(dict.fromkeys([*isolation.in_use, *isolation.database.status().open_scopes]))


def _end_units(isolation: Isolation, loop: AbstractEventLoop | None) -> None:
    """End what is left, or every test to come would fail as well."""

    async def end_and_wait() -> None:
        for scope in _units(isolation):
            await asyncio.gather(*scope.end())

    if loop is not None:
        loop.run_until_complete(end_and_wait())
    for scope in _units(isolation):
        if isolation.database.needs_bridge:  # nobody can close its session any more
            scope.drop(isolation.database)
            isolation.database._open_scopes.discard(scope)
        scope.end()


def _left(isolation: Isolation) -> Iterator[str]:
    database = isolation.database
    for scope in _units(isolation):
        yield f"the unit of work {scope.label!r} ({scope.age:.1f} s)"
    connections = isolation.others_connected()
    if connections > 0:
        yield f"{connections} connection{'s' * (connections > 1)} of the pool"
    known: set[Task[Any]] = set(database._tasks)
    if isolation.loop is not None and not isolation.loop.is_closed():
        known |= {task for task in asyncio.all_tasks(isolation.loop) if _is_users(task)}
        known -= set(isolation.tasks_before)
    for task in known:
        if not task.done() and task is not _current_task():
            yield f"the task {task.get_name()!r}"


def _current_task() -> Task[Any] | None:
    return None if running_loop() is None else asyncio.current_task()


def _is_users(task: Task[Any]) -> bool:
    """True if the code of ``task`` is not that of a framework."""
    coroutine = task.get_coro()
    frame = coroutine.cr_frame if isinstance(coroutine, CoroutineType) else None
    module = "" if frame is None else str(frame.f_globals.get("__name__"))
    return bool(module) and module.partition(".")[0] not in _FRAMEWORKS


def _roll_back(isolation: Isolation, loop: AbstractEventLoop | None) -> None:
    if not isolation.is_connected:
        return
    if not isolation.database.needs_bridge:
        isolation.roll_back()
    elif loop is None:
        # Nobody can talk to the server now. Its end of the connection rolls back when ours is
        # closed, which it is by the garbage collector; drivers warn of that.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            asyncio.run(cross(isolation.abandon))
            gc.collect()
    else:
        loop.run_until_complete(cross(isolation.roll_back))
