"""Entry points: where Tornado enters a handler's code.

Each method by which Tornado enters user code is wrapped when the handler class
is made. The wrapper makes the handler's scope the current one, so that nothing
depends on which task or context Tornado calls from, nor on whether anybody
calls ``super()``. What Tornado and `.BaseHandler` define stays as it is.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Iterator
from types import CoroutineType, FunctionType
from typing import TYPE_CHECKING, Any

from tornado.web import RequestHandler

from tornado_sa.scope import Scope, current, enter, leave

if TYPE_CHECKING:
    from tornado_sa.handlers import BaseHandler

Method = Callable[..., Any]
Wrappers = tuple[Method, Method]  # for a plain method, for an `async def` one

# Classes of these modules are the framework: user code is what overrides them.
_TORNADO = frozenset({"tornado.web", "tornado.websocket"})
_OURS = frozenset({"builtins", "tornado_sa.handlers"})

# Set on every wrapper, so that none is wrapped again.
_WRAPPER = "_tornado_sa_wrapper"


def wrap_entry_points(cls: type[BaseHandler]) -> None:
    """Wrap each entry point of ``cls`` that user code defines, as the MRO resolves it."""
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
    yield "__init__", _wrap_init
    yield "set_default_headers", _wrap_initialize
    yield "initialize", _wrap_initialize
    yield "get_current_user", _wrap_call
    yield "log_exception", _wrap_call
    yield "write_error", _wrap_call
    yield "prepare", _wrap_prepare
    yield "on_finish", _wrap_on_finish
    yield "on_connection_close", _wrap_on_connection_close
    yield "data_received", _wrap_call
    for verb in getattr(cls, "SUPPORTED_METHODS", RequestHandler.SUPPORTED_METHODS):
        yield verb.lower(), _wrap_call


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


async def _await_in(scope: Scope, awaitable: Awaitable[Any]) -> Any:
    previous = enter(scope)
    try:
        return await awaitable
    finally:
        leave(scope, previous)


def _wrap_call(method: Method) -> Wrappers:
    """A verb, or ``data_received``: the handler's scope is current while it runs."""

    def plain(self: BaseHandler, *args: Any, **kwargs: Any) -> Any:
        scope = self._sa_scope or self._open_scope()
        if current.get() is scope:  # the request's own task, after prepare(): straight through
            return method(self, *args, **kwargs)
        previous = enter(scope)
        try:
            result = method(self, *args, **kwargs)
        finally:
            leave(scope, previous)
        return _await_in(scope, result) if isinstance(result, CoroutineType) else result

    async def awaiting(self: BaseHandler, *args: Any, **kwargs: Any) -> Any:
        scope = self._sa_scope or self._open_scope()
        call = method if current.get() is scope else plain
        result = call(self, *args, **kwargs)
        return result if result is None else await result

    return plain, awaiting


def _wrap_initialize(method: Method) -> Wrappers:
    """``initialize``: the scope is current while it runs, and over if it raises."""
    return _wrap_init(_wrap_call(method)[0])


def _wrap_init(method: Method) -> Wrappers:
    """``__init__``: when it raises, Tornado drops the request and calls nothing more."""

    def plain(self: BaseHandler, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except BaseException:
            if self._sa_scope is not None:
                self._end_request()
            raise

    return plain, plain


def _wrap_prepare(method: Method) -> Wrappers:
    """``prepare``: opens the scope, which then stays current in the request's task."""

    def plain(self: BaseHandler, *args: Any, **kwargs: Any) -> Any:
        self._begin_request()
        return method(self, *args, **kwargs)

    async def awaiting(self: BaseHandler, *args: Any, **kwargs: Any) -> Any:
        self._begin_request()
        result = method(self, *args, **kwargs)
        return result if result is None else await result

    return plain, awaiting


def _wrap_on_finish(method: Method) -> Wrappers:
    """``on_finish``: the scope is current while it runs, and over after it."""
    call, _ = _wrap_call(method)

    def plain(self: BaseHandler) -> Any:
        try:
            return call(self)
        finally:
            self._end_request()

    return plain, plain


def _wrap_on_connection_close(method: Method) -> Wrappers:
    """``on_connection_close``: what the client's leaving means is not left to ``super()``."""
    call, _ = _wrap_call(method)

    def plain(self: BaseHandler) -> Any:
        try:
            return call(self)
        finally:
            self._client_gone()

    return plain, plain
