"""Events: what happens on a WebSocket, each a unit of work of its own.

A socket outlives many units of work, and they can overlap, so a handler keeps no scope of theirs.
An event knows its handler instead, and a context variable says which event some code belongs to.
Not the variable of the current scope: ``with db.begin():`` inside an event is another scope, and
``self.session`` in there is still the event's.
"""

from __future__ import annotations

import asyncio
import sys
import weakref
from collections.abc import Awaitable, Coroutine
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from types import CoroutineType
from typing import TYPE_CHECKING, Any, cast

import tornado
from tornado.websocket import WebSocketHandler

from tornado_sa.async_database import AsyncDatabase
from tornado_sa.bridge import step_aside
from tornado_sa.errors import NoActiveScope
from tornado_sa.scope import Scope, current, enter, leave

if TYPE_CHECKING:
    from tornado_sa.request import RequestScope

_event: ContextVar[Event | None] = ContextVar("tornado_sa.event", default=None)


class Event(Scope):
    """The scope of one event. Used in a ``with`` statement, it is the current one in there."""

    __slots__ = ("_before", "handler")

    def __init__(self, handler: RequestScope, name: str) -> None:
        super().__init__("WS", handler.request.path, name)
        # Weak: a task that outlives its event must not keep the handler of a socket that is gone.
        self.handler: weakref.ref[RequestScope] = weakref.ref(handler)
        self._before: tuple[Scope | None, Event | None] = (None, None)

    def __enter__(self) -> None:
        self._before = enter(self), _event.get()
        _event.set(self)

    def __exit__(self, *error: object) -> None:
        (previous, event), self._before = self._before, (None, None)
        leave(self, previous)
        if _event.get() is self:  # else in another context, as with leave()
            _event.set(event)

    async def run(self, work: Awaitable[Any]) -> Any:
        """Wait for ``work``, and end with it.

        And wait for the end: one socket never holds two connections, however
        fast its messages come.
        """
        await step_aside()
        try:
            with self, self._known_to_dispose():
                return await work
        except GeneratorExit:  # a coroutine that is thrown away must not wait
            self.end()
            raise
        finally:
            for closing in self.end():
                await asyncio.shield(closing)

    def _known_to_dispose(self) -> AbstractContextManager[None]:
        handler = self.handler()
        database = None if handler is None else handler._database()
        return database._at_work() if isinstance(database, AsyncDatabase) else nullcontext()

    def end_with(self, _: asyncio.Future[Any]) -> None:
        """End, as the callback of a Future."""
        self.end()


class Outside(Event):
    """Stands in for the scope of an event where there is none: it has no session to give."""

    __slots__ = ()

    def __init__(self, handler: RequestScope) -> None:
        super().__init__(handler, "between events")
        self.closed = True

    def check(self) -> None:
        scope = current.get()
        here = f"code of {scope.label!r}" if scope and scope is not self else "code of no event"
        raise NoActiveScope(
            f"{self.label}: self.session of a WebSocket handler belongs to one event, such as one"
            f" on_message, and this is {here}. Here, write `with db.scope() as session:` (`async"
            " with` on an AsyncDatabase)."
        )


def _scope_of(handler: RequestScope) -> Scope | None:
    event = _event.get()
    if event is not None and event.handler() is handler:
        return event
    handshake = handler._sa_handshake
    if handshake is None or not handshake.closed or current.get() is handshake:
        return handshake
    return Outside(handler)


def _keep_handshake(handler: RequestScope, scope: Scope | None) -> None:
    handler._sa_handshake = scope


#: What ``_sa_scope`` is in a WebSocket handler: the scope that the code at hand belongs to.
EVENT_SCOPE = property(_scope_of, _keep_handshake)


# Tasks of handlers whose database keeps none: the loop itself refers to its tasks weakly.
_tasks: set[asyncio.Task[Any]] = set()


def wait_for_it(handler: RequestScope, event: Event, work: Awaitable[Any]) -> Awaitable[Any]:
    """For an event whose result Tornado waits for."""
    if asyncio.isfuture(work):  # a @gen.coroutine, which is no task, and is not made one here
        work.add_done_callback(event.end_with)
        return work
    return event.run(work)


def wait_or_abort(handler: RequestScope, event: Event, work: Awaitable[Any]) -> Awaitable[Any]:
    """For one whose failure closes the socket."""
    rest = wait_for_it(handler, event, work)
    return _abort_if_it_fails(handler, rest) if _LEAVES_OPEN and handler._sa_bridge else rest


# Tornado 6.5 closes the socket after the failure of a `def` method, which under the bridge is a
# coroutine. After that of a coroutine it leaves it open, and reads no more from it.
_LEAVES_OPEN = tornado.version_info < (6, 6)


async def _abort_if_it_fails(handler: RequestScope, work: Awaitable[Any]) -> Any:
    try:
        return await work
    except Exception:
        handler.log_exception(*sys.exc_info())
        connection = cast(WebSocketHandler, handler).ws_connection
        if connection is not None:
            connection._abort()  # private, and what Tornado itself does then


def start(handler: RequestScope, event: Event, work: Awaitable[Any]) -> Awaitable[Any]:
    """For one that it looks at, and does not wait for: a failure closes the socket."""
    rest = wait_or_abort(handler, event, work)
    return _start(handler, event, rest) if isinstance(rest, CoroutineType) else rest


def start_and_log(handler: RequestScope, event: Event, work: Awaitable[Any]) -> asyncio.Task[Any]:
    """For one whose result it drops."""
    return _start(handler, event, _log(handler, event.run(work)))


def _start(
    handler: RequestScope, event: Event, work: Coroutine[Any, Any, Any]
) -> asyncio.Task[Any]:
    database = handler._database()
    if isinstance(database, AsyncDatabase):
        return database._track(work, event.label)
    task = asyncio.get_running_loop().create_task(work, name=event.label)
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)
    return task


async def _log(handler: RequestScope, work: Awaitable[Any]) -> None:
    try:
        await work
    except Exception:
        handler.log_exception(*sys.exc_info())
