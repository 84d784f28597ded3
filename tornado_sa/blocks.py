"""Blocks of code that are one unit of work: ``with`` statements and decorators."""

from __future__ import annotations

import asyncio
import functools
import inspect
import sys
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Self, TypeVar, cast

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from tornado_sa.bridge import complete, is_bridged, step_aside
from tornado_sa.errors import ConfigurationError, TornadoSAError
from tornado_sa.functions import (
    is_coroutine_function,
    is_generator_function,
    module_of,
    name_of,
)
from tornado_sa.scope import ReadOnly, Scope, enter, leave

if TYPE_CHECKING:
    from tornado_sa.core import DatabaseCore

P = ParamSpec("P")
R = TypeVar("R")
SessionT = TypeVar("SessionT", bound=Session | AsyncSession)


class _Block(Generic[SessionT]):
    def __init__(
        self,
        database: DatabaseCore[SessionT],
        label: str | None,
        *,
        commit: bool = False,
        read_only: bool = False,
    ) -> None:
        self._database = database
        self._label = label
        self._commits = commit
        self._read_only = ReadOnly(stream=False) if read_only else None
        self._scope: Scope | None = None
        self._previous: Scope | None = None

    def _make_scope(self) -> Scope:
        if self._scope is not None:
            raise TornadoSAError(
                f"The block {self._scope.label!r} is open already. Each block is a unit of work of"
                " its own: call db.scope() or db.begin() again."
            )
        scope = Scope(self._label or _caller())
        scope.read_only = self._read_only
        return scope

    def _open(self, scope: Scope) -> SessionT:
        try:
            session = self._database.session_in(scope)
        except BaseException:
            scope.end()
            raise
        self._scope, self._previous = scope, enter(scope)
        return session

    def _leave(self) -> Scope:
        scope, self._scope = cast(Scope, self._scope), None
        leave(scope, self._previous)
        return scope

    def _to_commit(self, error: type[BaseException] | None) -> SessionT | None:
        """The session to COMMIT on leaving, if any."""
        scope = self._scope
        if not self._commits or error is not None or scope is None:
            return None
        # Asked of the database: a worker of Database.to_thread() may have it at this moment.
        return None if scope.get(self._database) is None else self._database.session_in(scope)

    def _for_call(self, function: Callable[..., Any]) -> Self:
        """Make a fresh block for one call of the decorated ``function``."""
        label = self._label or f"{module_of(function)}.{name_of(function)}"
        reads = self._read_only is not None
        return type(self)(self._database, label, commit=self._commits, read_only=reads)


class Block(_Block[Session]):
    """What ``Database.scope()`` and ``Database.begin()`` return."""

    def __enter__(self) -> Session:
        return self._open(self._make_scope())

    def __exit__(
        self,
        error: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            session = self._to_commit(error)
            if session is not None:
                session.commit()
        finally:
            self._leave().end()

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorate ``function``: each call is a unit of work, until its coroutine is done."""
        _refuse(function)
        if is_coroutine_function(function):

            @functools.wraps(function)
            async def call_async(*args: P.args, **kwargs: P.kwargs) -> Any:
                with self._for_call(function):
                    return await cast("Awaitable[Any]", function(*args, **kwargs))

            return cast("Callable[P, R]", call_async)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            with self._for_call(function):
                return _without_coroutine(function, function(*args, **kwargs))

        return call


class AsyncBlock(_Block[AsyncSession]):
    """What ``AsyncDatabase.scope()`` and ``AsyncDatabase.begin()`` return.

    ``async with`` yields the ``AsyncSession``. Under the bridge plain ``with``
    works too and yields the plain session, as it does on a `.Database`.
    """

    def __enter__(self) -> Session:
        if not is_bridged():
            raise TornadoSAError(
                f"`with` on an AsyncDatabase works under the bridge only, at {_caller()} it would"
                " block the loop. Write `async with`."
            )
        return self._open(self._make_scope()).sync_session

    def __exit__(
        self,
        error: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            session = self._to_commit(error)
            if session is not None:
                session.sync_session.commit()
        finally:
            closings = self._leave().end()
            if error is not GeneratorExit:
                for closing in closings:
                    complete(asyncio.shield(closing))

    async def __aenter__(self) -> AsyncSession:
        await step_aside()
        scope = self._make_scope()
        if self._database._isolation is not None:
            wait = self._database._isolation.begin(scope)
            if wait is not None:
                await wait
        return self._open(scope)

    async def __aexit__(
        self,
        error: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            session = self._to_commit(error)
            if session is not None:
                await session.commit()
        finally:
            closings = self._leave().end()
            if error is not GeneratorExit:  # a coroutine that is being closed must not wait
                for closing in closings:
                    await asyncio.shield(closing)

    def __call__(self, function: Callable[P, Awaitable[R]]) -> Callable[P, Awaitable[R]]:
        """Decorate a coroutine function: each call is a unit of work."""
        _refuse(function)
        if not is_coroutine_function(function):
            raise ConfigurationError(
                f"{name_of(function)} is a plain function, and the session of an AsyncDatabase"
                " has to be awaited. Write it with `async def`."
            )

        @functools.wraps(function)
        async def call(*args: P.args, **kwargs: P.kwargs) -> R:
            async with self._for_call(function):
                return await function(*args, **kwargs)

        return call


def _caller() -> str:
    """Where the ``with`` statement stands: its module and line."""
    frame = sys._getframe(1)
    between = {__name__, "contextlib"}  # an ExitStack
    while frame.f_globals.get("__name__") in between and frame.f_back is not None:
        frame = frame.f_back
    return f"{frame.f_globals.get('__name__', '?')}:{frame.f_lineno}"


def _refuse(function: Callable[..., Any]) -> None:
    if isinstance(function, classmethod | staticmethod):
        kind = type(function).__name__
        raise ConfigurationError(
            f"{name_of(function.__func__)} is a {kind} when it is decorated. Write @{kind} first,"
            " and `@db.scope()` or `@db.begin()` below it."
        )
    if is_generator_function(function):
        raise ConfigurationError(
            f"{name_of(function)} is a generator: its scope would end before its first line"
            " runs. Open the scope inside it, with `with db.scope() as session:`."
        )


def _without_coroutine(function: Callable[..., Any], result: R) -> R:
    """``result`` of a plain function, unless it is a coroutine, which would run too late."""
    if inspect.iscoroutine(result):
        result.close()  # or Python would warn that it was never awaited
        raise ConfigurationError(
            f"{name_of(function)} is a plain function and returned a coroutine, which would run"
            " when its unit of work is over. Write it with `async def`, and await that in there."
        )
    return result
