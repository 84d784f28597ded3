"""Transactions: how a verb runs whose COMMIT comes before the first byte of its response."""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Session
from tornado.httputil import HTTPHeaders
from tornado.web import Finish

from tornado_sa.bridge import cross, is_bridged
from tornado_sa.changes import uncommitted
from tornado_sa.ending import commit_reads, logger
from tornado_sa.errors import ConfigurationError
from tornado_sa.responses import is_retryable, summary

if TYPE_CHECKING:
    from tornado_sa.request import RequestScope
    from tornado_sa.verbs import Transaction

# The longest pause before a verb is run again, in seconds, and the first. Each is drawn evenly
# from 0 to a limit that doubles ("full jitter": https://aws.amazon.com/blogs/architecture/
# exponential-backoff-and-jitter/), so that those who collided do not collide again.
_LONGEST_PAUSE = 0.1
_FIRST_PAUSE = 0.01


class Unit:
    """A transactional verb that is running: what holds its response back."""

    def __init__(self, handler: RequestScope, transaction: Transaction) -> None:
        self.handler = handler
        self.transaction = transaction
        #: True from the moment the verb is done: nobody should cancel a COMMIT.
        self.committing: bool = False
        #: True when the verb has called ``finish()``.
        self.finished: bool = False
        self._before = (
            handler._status_code,
            handler._reason,
            list(handler._headers.get_all()),  # copy() would parse them anew
            list(handler._write_buffer),
            copy.deepcopy(handler._new_cookie) if hasattr(handler, "_new_cookie") else None,
        )

    def finish(self, chunk: Any) -> asyncio.Future[None]:
        """What ``self.finish()`` does while the verb runs."""
        if chunk is not None:
            self.handler.write(chunk)
        # Private, and what makes Tornado refuse a later write() or finish() as it always does.
        self.handler._finished = self.finished = True
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    def flush(self) -> None:
        """What ``self.flush()`` does while the verb runs. Raises `.ConfigurationError`."""
        raise ConfigurationError(
            f"{self.handler._open_scope().label}: flush() would send a part of the response before"
            " the COMMIT, which can still fail. In a transactional verb leave it out; to stream,"
            " commit in the verb itself, without @transactional."
        )

    def let_go(self) -> bool:
        """Let the handler answer again; return True if the verb has called ``finish()``."""
        self.handler._sa_unit = None
        if self.finished:
            self.handler._finished = False
        return self.finished

    def undo(self) -> None:
        """Put the response back to what it was before the verb.

        By the private names of Tornado, here and nowhere else: ``clear()`` keeps the cookies, and
        forgets the headers that ``prepare()`` has set.
        """
        handler = self.handler
        status, reason, headers, buffer, cookies = self._before
        handler._status_code, handler._reason = status, reason
        handler._headers, handler._write_buffer = HTTPHeaders(), list(buffer)
        for name, value in headers:
            handler._headers.add(name, value)
        if cookies is not None:
            handler._new_cookie = copy.deepcopy(cookies)
        elif hasattr(handler, "_new_cookie"):
            del handler._new_cookie
        if self.finished:
            handler._finished = self.finished = False
        self.committing = False


async def run(
    handler: RequestScope,
    transaction: Transaction,
    method: Callable[..., Any],
    args: Any,
    kwargs: Any,
) -> None:
    """Run the verb ``method`` in a transaction, and answer if it has called ``finish()``.

    Under the bridge this coroutine runs there as well, and waits for nothing by itself.
    """
    unit = handler._sa_unit = Unit(handler, transaction)
    try:
        finish = await _try(handler, unit, method, args, kwargs)
    except Exception:
        raise
    except BaseException:  # cancelled
        unit.undo()
        raise
    finally:
        finished = unit.let_go()
    if finished:
        handler._finish_held()
    if finish is not None:
        try:
            raise finish
        finally:
            del finish  # its traceback holds this frame


async def _try(
    handler: RequestScope, unit: Unit, method: Callable[..., Any], args: Any, kwargs: Any
) -> Finish | None:
    """Run and commit, again if need be. Return the ``Finish`` that the verb raised, if any."""
    retries, level = unit.transaction.retries, unit.transaction.isolation_level
    loaded: list[Any] = []
    if retries and await _in_session(handler, uncommitted):
        retries = 0  # what was done before the verb would be lost
    if retries and not handler._sa_plain:  # an AsyncSession does not load by itself
        loaded = await _in_session(handler, _loaded) or []
    tries = 0
    while True:
        tries += 1
        try:
            if level is not None:
                await _in_session(handler, _begin_afresh, level, create=True)
            if tries > 1 and loaded:
                await _in_session(handler, _refresh, loaded)
            return await _once(handler, unit, method, args, kwargs)
        except Exception as error:
            again = is_retryable(error)
            if again or unit.committing or unit.finished:
                unit.undo()
            again = again and tries <= retries
            await _in_session(handler, _roll_back, handler._sa_plain or again)
            if not again:
                raise
            pause = random.uniform(0, min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**tries))
            logger.warning(
                "%s: try %d of %d failed, the verb runs again in %.0f ms: %s",
                handler._open_scope().label,
                tries,
                retries + 1,
                pause * 1000,
                summary(error),
            )
        await asyncio.sleep(pause)


async def _once(
    handler: RequestScope, unit: Unit, method: Callable[..., Any], args: Any, kwargs: Any
) -> Finish | None:
    finish = None
    try:
        result = method(handler, *args, **kwargs)
        if result is not None:
            await result
    except Finish as error:
        finish = error.with_traceback(None)  # which holds this frame
    if handler.should_commit():
        unit.committing = True
        await _in_session(handler, _commit)
    else:
        await _in_session(handler, _roll_back, handler._sa_plain)
    return finish


async def _in_session(
    handler: RequestScope, function: Callable[..., Any], *args: Any, create: bool = False
) -> Any:
    """Call ``function(session, *args)`` where the request's session may do I/O.

    Not at all if there is no session, unless it is to be created.
    """
    database = handler._find_database()
    scope = handler._open_scope()
    if not create and scope.get(database) is None:
        return None
    session = database.plain_session_in(scope)
    if database.needs_bridge and not (handler._sa_bridge and is_bridged()):
        return await cross(function, session, *args)
    return function(session, *args)


def _commit(session: Session) -> None:
    session.commit()


def _roll_back(session: Session, loads_again: bool) -> None:
    """Roll back. What was loaded is loaded again at its next use, or else stays as it is."""
    if not loads_again:  # an error page may show the current user, and cannot await in there
        session.expunge_all()
    session.rollback()


def _begin_afresh(session: Session, isolation_level: str) -> None:
    """Begin a transaction with ``isolation_level``, which one that has begun cannot change to."""
    lost = uncommitted(session)
    if lost is not None:
        raise ConfigurationError(
            f"A transaction with isolation_level={isolation_level!r} cannot begin while work waits"
            f" for a COMMIT: {lost}. Do it in the verb, or commit it before."
        )
    if session.in_transaction():
        commit_reads(session)
    bind = {"bind": session.bind} if session.bind is not None else None
    session.connection(bind, execution_options={"isolation_level": isolation_level})


def _loaded(session: Session) -> list[Any]:
    return list(session.identity_map.values())


def _refresh(session: Session, objects: list[Any]) -> None:
    """Load again what a rollback has expired."""
    for one in objects:
        with suppress(InvalidRequestError):  # the row is gone: the verb will find that out
            session.refresh(one)
