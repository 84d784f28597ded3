"""What is to be done once a COMMIT has made it true: mail, messages, jobs.

The calls are kept with the session they wait for. A COMMIT makes them due, a ROLLBACK drops them,
and the end of the unit of work makes the calls: for a request, after its response.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction, sessionmaker

from tornado_sa.functions import name_of

_PENDING = "tornado_sa.after_commit.pending"
_DUE = "tornado_sa.after_commit.due"


class LaterCall:
    """A call that waits for a COMMIT."""

    def __init__(
        self, session: Session, function: Callable[..., Any], args: Any, kwargs: Any
    ) -> None:
        self._call = partial(function, *args, **kwargs)
        #: What the log calls it.
        self.name: str = name_of(function)
        # The savepoint it was asked for in, which takes it back when it is rolled back itself.
        self._savepoint = session.get_nested_transaction()

    def __call__(self) -> Any:
        return self._call()

    def is_within(self, transaction: SessionTransaction) -> bool:
        """True if it was asked for in ``transaction`` or in a savepoint inside it."""
        if transaction.parent is None:
            return True
        inner = self._savepoint
        while inner is not None and inner is not transaction:
            inner = inner.parent
        return inner is not None


def remember(session: Session, call: LaterCall) -> None:
    """Keep ``call`` until ``session`` commits."""
    session.info.setdefault(_PENDING, []).append(call)


def watch_commits(sessions: type[Session] | sessionmaker[Any]) -> None:
    """Notice how the transactions of these sessions end."""
    event.listen(sessions, "after_commit", _committed)
    event.listen(sessions, "after_soft_rollback", _rolled_back)


def _committed(session: Session) -> None:
    """Make what waits for ``session`` due."""
    if _PENDING in session.info and not session.in_nested_transaction():
        session.info.setdefault(_DUE, []).extend(session.info.pop(_PENDING))


def _rolled_back(session: Session, transaction: SessionTransaction) -> None:
    pending: list[LaterCall] | None = session.info.get(_PENDING)
    if pending:
        pending[:] = [call for call in pending if not call.is_within(transaction)]


@contextmanager
def no_commit(session: Session) -> Iterator[None]:
    """A COMMIT in here makes nothing true: what waits for one goes on waiting."""
    pending = session.info.pop(_PENDING, None)
    try:
        yield
    finally:
        if pending:
            session.info[_PENDING] = pending


def take_due(session: Session) -> list[LaterCall]:
    """Hand over the calls that are due; forget those that still wait."""
    session.info.pop(_PENDING, None)
    due: list[LaterCall] = session.info.pop(_DUE, [])
    return due
