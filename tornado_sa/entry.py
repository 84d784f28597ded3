"""Entry points: where Tornado enters a handler's code.

Each method by which Tornado enters user code is wrapped when the handler class
is made, as ``wrappers.py`` has it. The wrapper makes the handler's scope the
current one, so that nothing depends on which task or context Tornado calls
from, nor on whether anybody calls ``super()``; where the handler has a plain
session of an `.AsyncDatabase` it also makes the call cross the bridge. What
Tornado and `.BaseHandler` define stays as it is, and so do the verbs of an
``AsyncSession``, unless they are transactions: they run in the request's own
task, where ``BaseHandler._execute`` has made the scope current.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import TYPE_CHECKING, Any

from tornado.web import RequestHandler
from tornado.websocket import WebSocketHandler

from tornado_sa.events import EVENT_SCOPE, start, start_and_log, wait_or_abort
from tornado_sa.wrappers import (
    Method,
    Wrappers,
    wrap_call,
    wrap_data_received,
    wrap_event,
    wrap_handshake_end,
    wrap_init,
    wrap_initialize,
    wrap_log_exception,
    wrap_on_connection_close,
    wrap_on_finish,
    wrap_prepare,
    wrap_verb,
)

if TYPE_CHECKING:
    from tornado_sa.handlers import BaseHandler


# Classes of these modules are the framework: user code is what overrides them.
_TORNADO = frozenset({"tornado.web", "tornado.websocket"})
_OURS = frozenset({"builtins", "tornado_sa.handlers", "tornado_sa.request", "tornado_sa.websocket"})

# Set on every wrapper, so that none is wrapped again.
_WRAPPER = "_tornado_sa_wrapper"


def wrap_entry_points(cls: type[BaseHandler]) -> None:
    """Wrap each entry point of ``cls`` that user code defines, as the MRO resolves it."""
    if issubclass(cls, WebSocketHandler):
        setattr(cls, "_sa_scope", EVENT_SCOPE)  # noqa: B010  (mypy: a property for an attribute)
    for name, wrap in _entry_points(cls):
        owner = next((base for base in cls.__mro__ if name in vars(base)), object)
        found = vars(owner).get(name)
        # A decorator's functools.wraps copies the mark of what it decorates, so that alone says
        # nothing: a wrapper is marked with itself.
        if _is_framework(owner, cls) or getattr(found, _WRAPPER, None) is found:
            continue
        method = _own(found) if owner is cls else _inherited(cls, name)
        wrapper = _like(getattr(cls, name), *wrap(method))
        setattr(wrapper, _WRAPPER, wrapper)
        setattr(cls, name, wrapper)


def _is_framework(owner: type, cls: type) -> bool:
    """True if the methods of ``owner`` stay as they are: Tornado's and our own.

    But not Tornado's where they hide ours, as in ``class H(ErrorHandler, SessionHandler)``.
    """
    if owner.__module__ not in _TORNADO:
        return owner.__module__ in _OURS
    return any(base.__module__ in _OURS for base in cls.__mro__[: cls.__mro__.index(owner)])


def _entry_points(cls: type[BaseHandler]) -> Iterator[tuple[str, Callable[[Method], Wrappers]]]:
    if issubclass(cls, WebSocketHandler):
        yield "open", wrap_event("open")
        yield "on_message", wrap_event("on_message", wait_or_abort)
        yield "on_pong", wrap_event("on_pong", wait_or_abort)
        yield "on_ping", wrap_event("on_ping", start)
        yield "on_close", wrap_event("on_close", start_and_log)
        yield "log_exception", wrap_log_exception
        yield "on_finish", wrap_handshake_end
    yield "__init__", wrap_init
    yield "set_default_headers", wrap_initialize
    yield "initialize", wrap_initialize
    yield "get_current_user", wrap_call
    yield "log_exception", wrap_call
    yield "write_error", wrap_call
    yield "prepare", wrap_prepare
    yield "on_finish", wrap_on_finish
    yield "on_connection_close", wrap_on_connection_close
    yield "data_received", wrap_data_received
    for verb in getattr(cls, "SUPPORTED_METHODS", RequestHandler.SUPPORTED_METHODS):
        # Else there is nothing to do: in the task of the request, its scope is the current one.
        if cls._sa_plain or verb in cls._sa_transactions:
            yield verb.lower(), wrap_verb


def _own(attribute: Any) -> Method:
    """A function that takes the handler first, for whatever the class body defines."""
    if isinstance(attribute, FunctionType):
        return attribute

    def call(self: BaseHandler, *args: Any, **kwargs: Any) -> Any:
        bind = getattr(attribute, "__get__", None)
        return (bind(self, type(self)) if bind else attribute)(*args, **kwargs)

    return call


def _inherited(cls: type, name: str) -> Method:
    """What ``cls`` would write itself as ``return super().get()``.

    Not the method that is inherited now: a subclass of ``cls`` may have other
    classes between the two.
    """

    def call(self: BaseHandler, *args: Any, **kwargs: Any) -> Any:
        return getattr(super(cls, self), name)(*args, **kwargs)

    return call


def _like(found: Any, plain: Method, awaiting: Method) -> Method:
    """Pick the wrapper of the kind that ``found`` is, plain or ``async def``, and name it so."""
    wrapper = awaiting if inspect.iscoroutinefunction(found) else plain
    return functools.wraps(found)(wrapper) if isinstance(found, FunctionType) else wrapper
