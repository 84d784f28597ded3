"""SQLAlchemy sessions for the Tornado web framework: one per unit of work."""

from tornado_sa.async_database import AsyncDatabase
from tornado_sa.database import Database
from tornado_sa.errors import (
    ConcurrentAccess,
    ConfigurationError,
    NoActiveScope,
    ReadOnlyViolation,
    ScopeClosed,
    TornadoSAError,
    UncommittedChanges,
)
from tornado_sa.handlers import AsyncSessionHandler, BaseHandler, SessionHandler
from tornado_sa.scope import Scope, current_scope
from tornado_sa.verbs import read_only, transactional
from tornado_sa.websocket import AsyncSessionWebSocketHandler, SessionWebSocketHandler

__all__ = [
    "AsyncDatabase",
    "AsyncSessionHandler",
    "AsyncSessionWebSocketHandler",
    "BaseHandler",
    "ConcurrentAccess",
    "ConfigurationError",
    "Database",
    "NoActiveScope",
    "ReadOnlyViolation",
    "Scope",
    "ScopeClosed",
    "SessionHandler",
    "SessionWebSocketHandler",
    "TornadoSAError",
    "UncommittedChanges",
    "current_scope",
    "read_only",
    "transactional",
]
