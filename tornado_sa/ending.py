"""The end of a session: its connection goes back clean, or not at all."""

from __future__ import annotations

import logging
from contextvars import ContextVar

from sqlalchemy import ExceptionContext
from sqlalchemy.orm import Session

from tornado_sa.responses import summary
from tornado_sa.scope import Scope

logger: logging.Logger = logging.getLogger("tornado_sa")

# True while a session is being ended in this context.
_ending: ContextVar[bool] = ContextVar("tornado_sa.ending", default=False)


def roll_back_and_close(session: Session) -> None:
    """End ``session`` so that its connection goes back clean, whatever state it is in.

    Rolled back *before* it is closed: after a COMMIT that failed, ``close()``
    alone returns an SQLite connection with the transaction still open, and
    after a rollback that failed, ``close()`` makes the pool look at the
    connection again. Expunged before that, because a rollback would expire
    objects that somebody may still read.
    """
    token = _ending.set(True)
    try:
        if session.in_transaction():
            session.expunge_all()
            session.rollback()
    finally:
        try:
            session.close()
        finally:
            _ending.reset(token)


def discard_connection(context: ExceptionContext) -> None:
    """Discard a connection that fails while its session is ended, for nobody knows its state.

    An asyncpg connection that is still busy, say with a forgotten task's stream, refuses the
    rollback, and SQLAlchemy would then take it for clean and hand it out again.
    """
    if _ending.get():
        context.is_disconnect = True
        context.invalidate_pool_on_disconnect = False


def log_failed_closing(scope: Scope, error: BaseException) -> None:
    """Log that a session could not be closed properly. One line: nobody can act on more."""
    logger.error("Closing the session of %s failed: %s", scope.label, summary(error))
