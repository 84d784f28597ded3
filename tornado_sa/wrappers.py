"""What wraps the entry points of a handler: one function for each kind of them.

Each takes a method and returns two wrappers, one for a plain method and one for an ``async def``
one. In both the handler's scope is the current one, and the bridge is crossed where there is one.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from types import CoroutineType
from typing import TYPE_CHECKING, Any

from tornado_sa.bridge import complete, cross, is_bridged
from tornado_sa.events import Event, wait_for_it, wait_or_abort
from tornado_sa.request import after
from tornado_sa.scope import Scope, current, enter, leave
from tornado_sa.transactions import run

if TYPE_CHECKING:
    from tornado_sa.handlers import BaseHandler

Method = Callable[..., Any]
Wrappers = tuple[Method, Method]  # for a plain method, for an `async def` one


async def _await_in(scope: Scope, awaitable: Awaitable[Any]) -> Any:
    previous = enter(scope)
    try:
        return await awaitable
    finally:
        leave(scope, previous)


# What runs under the bridge, for a method that is called there.
Crossing = Callable[["BaseHandler", Scope, Method, Any, Any], Any]


def wrap_call(
    method: Method, crossing: Crossing | None = None, commit: Method | None = None
) -> Wrappers:
    """The handler's scope is current while ``method`` runs, and the bridge is under it if need be.

    Outermost only: what an entry point calls itself, such as ``super().get()``, runs as it would
    without us. ``commit`` is called in place of ``method`` where a verb needs a transaction.
    """

    def plain(self: BaseHandler, *args: Any, **kwargs: Any) -> Any:
        scope = self._sa_scope or self._open_scope()
        call = method
        if commit and self._sa_unit is None and self.request.method in self._sa_transactions:
            call = commit
        if self._sa_bridge and crossing and not scope.entered:
            result = cross(crossing, self, scope, call, args, kwargs)
            return result if current.get() is scope else _await_in(scope, result)
        if current.get() is scope:  # as in the request's own task: straight through
            return call(self, *args, **kwargs)
        previous = enter(scope)
        try:
            result = call(self, *args, **kwargs)
        finally:
            leave(scope, previous)
        return _await_in(scope, result) if isinstance(result, CoroutineType) else result

    async def awaiting(self: BaseHandler, *args: Any, **kwargs: Any) -> Any:
        result = plain(self, *args, **kwargs)
        return result if result is None else await result

    return plain, awaiting


def _complete(handler: BaseHandler, scope: Scope, method: Method, args: Any, kwargs: Any) -> Any:
    """Call and wait for ``method``."""
    scope.entered = True
    try:
        result = method(handler, *args, **kwargs)
        return result if result is None else complete(result)
    finally:
        scope.entered = False


def _answer(handler: BaseHandler, scope: Scope, method: Method, args: Any, kwargs: Any) -> Any:
    """Call and wait for ``method``; answer what it raises here, where an error page may query."""
    try:
        return _complete(handler, scope, method, args, kwargs)
    except Exception as error:
        _answer_error(handler, error)
        return None


def _answer_and_finish(
    handler: BaseHandler, scope: Scope, method: Method, args: Any, kwargs: Any
) -> None:
    try:
        _complete(handler, scope, method, args, kwargs)
        if handler._auto_finish and not handler._finished:
            handler.finish()
    except Exception as error:
        _answer_error(handler, error)


def _answer_error(handler: BaseHandler, error: Exception) -> None:
    # What Tornado calls a moment later, outside the bridge. Private, but it is what people
    # override and instrument, and so better than a copy of what it does.
    handler._handle_request_exception(error)


def wrap_data_received(method: Method) -> Wrappers:
    """``data_received``: Tornado waits for it, and answers nothing if it raises."""
    return wrap_call(method, _complete)


def wrap_verb(method: Method) -> Wrappers:
    """A verb: Tornado waits for it, and answers what it raises. It may need a transaction."""

    def commit(self: BaseHandler, *args: Any, **kwargs: Any) -> Awaitable[None]:
        transaction = self._sa_transactions[self.request.method or ""]
        return run(self, transaction, method, args, kwargs)

    return wrap_call(method, _answer_and_finish, commit)


def wrap_initialize(method: Method) -> Wrappers:
    """``initialize``: the scope is current while it runs, and over if it raises."""
    return wrap_init(wrap_call(method)[0])


def wrap_init(method: Method) -> Wrappers:
    """``__init__``: when it raises, Tornado drops the request and calls nothing more."""

    def plain(self: BaseHandler, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except BaseException:
            if self._sa_scope is not None:
                self._end_request()
            raise

    return plain, plain


def wrap_prepare(method: Method) -> Wrappers:
    """``prepare``: opens the scope, which then stays current in the request's task."""
    call, awaiting_call = wrap_call(method, _answer)

    def plain(self: BaseHandler, *args: Any, **kwargs: Any) -> Any:
        wait = self._begin_request()
        if wait is not None:
            return after(wait, call, self, *args, **kwargs)
        return call(self, *args, **kwargs)

    async def awaiting(self: BaseHandler, *args: Any, **kwargs: Any) -> Any:
        wait = self._begin_request()
        if wait is not None:
            await wait
        return await awaiting_call(self, *args, **kwargs)

    return plain, awaiting


def wrap_on_finish(method: Method) -> Wrappers:
    """``on_finish``: the scope is over after it."""
    return _wrap_hook(method, "_end_request")


def wrap_on_connection_close(method: Method) -> Wrappers:
    """``on_connection_close``: what the client's leaving means is not left to ``super()``."""
    return _wrap_hook(method, "_client_gone")


def wrap_handshake_end(method: Method) -> Wrappers:
    """``on_finish`` of a WebSocket: a task, for Tornado detaches the stream in the same step."""
    return _wrap_hook(method, "_end_request", at_once=False)


def _wrap_hook(method: Method, afterwards: str, at_once: bool = True) -> Wrappers:
    """A method whose result Tornado drops: under the bridge it is a task that the scope outlives.

    Unless it is called by code that is under the bridge already, as ``on_finish`` is where a verb
    calls ``finish()``: there it runs at once.
    """
    call, _ = wrap_call(method)

    def plain(self: BaseHandler) -> Any:
        scope = self._sa_scope or self._open_scope()
        try:
            bridge = self._sa_bridge
            if bridge is None:
                return call(self)
            if at_once and current.get() is scope and is_bridged():
                with bridge._at_work():
                    return call(self)
            return self._run_hook(bridge, cross(_complete, self, scope, method, (), {}))
        finally:
            getattr(self, afterwards)()

    return plain, plain


def _complete_and_end(
    handler: BaseHandler, scope: Scope, method: Method, args: Any, kwargs: Any
) -> Any:
    try:
        return _complete(handler, scope, method, args, kwargs)
    finally:
        scope.end()  # here it takes no task


def wrap_event(
    name: str,
    hand_over: Callable[[BaseHandler, Event, Awaitable[Any]], Awaitable[Any]] = wait_for_it,
    crossing: Crossing | None = _complete_and_end,
    waits: bool = True,
) -> Callable[[Method], Wrappers]:
    """An event of a WebSocket: a unit of work, which ends with the method or its coroutine.

    ``waits``: for its turn, in an isolated database.
    """

    def wrap(method: Method) -> Wrappers:
        call, _ = wrap_call(method, crossing)

        def plain(self: BaseHandler, *args: Any, **kwargs: Any) -> Any:
            scope = self._sa_scope or self._open_scope()
            if isinstance(scope, Event) and not scope.closed:
                return call(self, *args, **kwargs)
            event = Event(self, name)
            try:
                wait = self._wait_for(event) if waits else None
                if wait is not None:
                    return hand_over(self, event, after(wait, call, self, *args, **kwargs))
                with event:
                    result = call(self, *args, **kwargs)
            except BaseException:
                event.end()
                raise
            if inspect.isawaitable(result):
                return hand_over(self, event, result)
            event.end()
            return result

        async def awaiting(self: BaseHandler, *args: Any, **kwargs: Any) -> Any:
            result = plain(self, *args, **kwargs)
            return result if result is None else await result

        return plain, awaiting if hand_over in (wait_for_it, wait_or_abort) else plain

    return wrap


def wrap_log_exception(method: Method) -> Wrappers:
    """``log_exception`` of a WebSocket: Tornado calls it when the event that failed is over."""
    call, _ = wrap_call(method)
    event, _ = wrap_event("log_exception", crossing=None, waits=False)(method)

    def plain(self: BaseHandler, *args: Any, **kwargs: Any) -> Any:
        scope = self._sa_scope or self._open_scope()
        return (event if scope.closed else call)(self, *args, **kwargs)

    return plain, plain
