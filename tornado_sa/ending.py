"""The end of a session: its connection goes back clean, or not at all."""

from __future__ import annotations

import logging
from contextlib import suppress
from contextvars import ContextVar

from sqlalchemy import ExceptionContext
from sqlalchemy.orm import Session

from tornado_sa.after_commit import LaterCall, no_commit
from tornado_sa.changes import connections_of
from tornado_sa.responses import summary
from tornado_sa.scope import Scope

logger: logging.Logger = logging.getLogger("tornado_sa")

# True while a session is being ended in this context.
_ending: ContextVar[bool] = ContextVar("tornado_sa.ending", default=False)


def roll_back_and_close(session: Session) -> None:
    """End ``session`` so that its connection goes back clean, whatever state it is in.

    ``close()`` rolls back by itself, but not after a COMMIT that failed: it
    returns an SQLite connection with the transaction still open. So then the
    session is rolled back first, and expunged before that, because a rollback
    would expire objects that somebody may still read. Not always, because a
    rollback of a session costs a third as much as a query.
    """
    token = _ending.set(True)
    try:
        # Not after a failed two-phase commit: some branches are committed, others must be.
        if not session.is_active and not session.twophase:
            session.expunge_all()
            session.rollback()
        session.close()
    except BaseException:
        session.close()
        _let_go(session)
        raise
    finally:
        _ending.reset(token)


def commit_reads(session: Session) -> None:
    """End a transaction that has only read. COMMIT, because a rollback expires what was loaded."""
    expires, session.expire_on_commit = session.expire_on_commit, False
    try:
        with no_commit(session):
            session.commit()
    except BaseException:
        session.rollback()
        raise
    finally:
        session.expire_on_commit = expires


def _let_go(session: Session) -> None:
    """Discard what a failed ``close()`` has forgotten: the connections of the session."""
    for connection in connections_of(session):
        if not connection.closed:
            with suppress(Exception):
                connection.invalidate()
            connection.close()


def is_ending() -> bool:
    """True while a session is being ended in this context."""
    return _ending.get()


def discard_connection(context: ExceptionContext) -> None:
    """Discard a connection that fails while its session is ended, for nobody knows its state.

    An asyncpg connection that is still busy, say with a forgotten task's stream, refuses the
    rollback, and SQLAlchemy would then take it for clean and hand it out again.
    """
    if is_ending():
        context.is_disconnect = True
        context.invalidate_pool_on_disconnect = False


def log_failed_closing(scope: Scope, error: BaseException) -> None:
    """Log that a session could not be closed properly. One line: nobody can act on more."""
    logger.error("Closing the session of %s failed: %s", scope.label, summary(error))


def log_failed_call(label: str, call: LaterCall) -> None:
    """Log, with its traceback, the exception of a call that waited for a COMMIT."""
    logger.error("%s: after_commit(%s) failed", label, call.name, exc_info=True)
