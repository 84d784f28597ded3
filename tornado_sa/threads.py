"""Threads: the blocking work of a plain ``Session``, away from the event loop."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from inspect import iscoroutine
from typing import Any, ParamSpec, TypeVar, cast

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from tornado_sa import workers
from tornado_sa.core import DatabaseCore
from tornado_sa.errors import ConfigurationError
from tornado_sa.functions import is_coroutine_function, name_of
from tornado_sa.memory import SharedPool
from tornado_sa.scope import current_scope

P = ParamSpec("P")
R = TypeVar("R")

# How many worker threads there may be where the pool has no limit to go by: as many as a PostgreSQL
# server takes connections, unless it is told otherwise. A thread is only started when none is idle.
_MANY_WORKERS = 100


class ThreadedDatabase(DatabaseCore[Session]):
    """The part of `.Database` that works in threads."""

    engine: Engine

    def __init__(self, *args: Any) -> None:
        self._workers = workers.Workers()
        super().__init__(*args)

    async def to_thread(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call ``fn(*args, **kwargs)`` in a worker thread and return what it returned.

        For work of the current scope that would block the event loop::

            def total(year):
                return db.session.scalar(select(func.sum(Sale.amount)).filter_by(year=year))

            self.write({"total": await db.to_thread(total, 2024)})

        The context variables are carried over, so ``db.session`` in ``fn`` is
        the session of the scope. Calls of one scope run one after the other, in
        their order, and until they are done the session is the worker's: any
        other thread that asks for it gets `.ConcurrentAccess`. A session that
        somebody got before cannot be watched like that; leave it alone until
        ``to_thread`` returns.

        There are as many threads as the pool may have connections, and as many
        again for scopes that have their connection already. On in-memory SQLite,
        one connection for all, there are none, and ``fn`` is called in place.

        A worker is never interrupted, nor is its statement. If the calling task
        is cancelled, by ``asyncio.wait_for`` for one, ``CancelledError`` is
        raised when ``fn`` has returned; what it returned is dropped, what it
        raised is logged. If the scope ends, its session is rolled back and
        closed by the worker when ``fn`` has returned. A call that still waits
        for its turn or for a thread is cancelled at once and never made.

        Raises what ``fn`` raises, `.NoActiveScope`, `.ScopeClosed`, and
        `.ConfigurationError` for a coroutine function.
        """
        scope = current_scope()
        if is_coroutine_function(fn):
            raise _must_be_awaited(fn)
        # In place where a worker would wait for itself, in an event loop that another `fn` runs;
        # and in memory, where a worker and the loop would undo each other's work: their
        # transactions are one.
        if workers.is_worker(scope) or any(
            isinstance(engine.pool, SharedPool) for engine in self._engines
        ):
            result: Any = copy_context().run(fn, *args, **kwargs)
        else:
            call = workers.Call(fn, args, kwargs)
            connected = _is_connected(scope.get(self))
            result = await self._workers.run(scope, call, self._worker_threads(), connected)
        if iscoroutine(result):
            result.close()  # or Python would warn that it was never awaited
            raise _must_be_awaited(fn)
        return cast(R, result)

    def _worker_threads(self) -> int:
        """As many as the pool may have connections."""
        size = getattr(self.engine.pool, "size", None)
        # _max_overflow: private, but there is no public way to ask. -1 means without limit.
        overflow = getattr(self.engine.pool, "_max_overflow", 0)
        return max(1, size() + overflow) if callable(size) and overflow >= 0 else _MANY_WORKERS

    def _after_fork(self) -> None:
        super()._after_fork()
        self._workers = workers.Workers()


def _must_be_awaited(fn: Callable[..., Any]) -> ConfigurationError:
    name = name_of(fn)
    return ConfigurationError(
        f"{name} is a coroutine function, and db.to_thread() is for plain functions, which block."
        f" Write `await {name}(...)`, without db.to_thread()."
    )


def _is_connected(session: Session | None) -> bool:
    """True if ``session`` holds a connection, which others may be waiting for."""
    # _connections: private, but there is no public way to ask; in_transaction() is true after a
    # mere add().
    transaction = session.get_transaction() if session is not None else None
    return bool(getattr(transaction, "_connections", None))
