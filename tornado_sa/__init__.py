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

__all__ = [
    "AsyncDatabase",
    "AsyncSessionHandler",
    "BaseHandler",
    "ConcurrentAccess",
    "ConfigurationError",
    "Database",
    "NoActiveScope",
    "ReadOnlyViolation",
    "Scope",
    "ScopeClosed",
    "SessionHandler",
    "TornadoSAError",
    "UncommittedChanges",
    "current_scope",
]
