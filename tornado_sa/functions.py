"""What a function is: of which kind, and what errors and logs call it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from tornado import gen


def name_of(function: Callable[..., Any]) -> str:
    """Its name, or that of its class. Without arguments: they may be confidential."""
    function = _innermost(function)
    name: str = getattr(function, "__qualname__", type(function).__qualname__)
    return name


def module_of(function: Callable[..., Any]) -> str:
    """The module it is defined in."""
    module: str = getattr(_innermost(function), "__module__", "?")
    return module


def is_coroutine_function(function: Callable[..., Any]) -> bool:
    """True for an ``async def``, a ``@gen.coroutine``, and an object that is called like these."""
    function = _code_of(function)
    return inspect.iscoroutinefunction(function) or gen.is_coroutine_function(function)


def is_generator_function(function: Callable[..., Any]) -> bool:
    """True for a ``def`` and an ``async def`` with ``yield``."""
    function = _code_of(function)
    return inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)


def _innermost(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _code_of(function: Any) -> Any:
    function = _innermost(function)
    is_plain = inspect.isroutine(function) or inspect.isclass(function)
    return function if is_plain else getattr(type(function), "__call__", function)  # noqa: B004
