"""What can go wrong, and what to write instead."""


class TornadoSAError(Exception):
    """Base class of every error this package raises on its own account.

    Errors of SQLAlchemy and of the driver are never wrapped or renamed, but for
    the one that becomes a `.ReadOnlyViolation`: catch those as you always did.
    """


class ConfigurationError(TornadoSAError):
    """The application put together things that cannot work together.

    Raised as early as it can be known: when a `.Database` is constructed, when
    a handler first asks for its session.
    """


class NoActiveScope(TornadoSAError):
    """``db.session`` was used where no unit of work is open.

    A request, a ``with db.scope()`` block and a ``with db.begin()`` block each
    open one. Threads of ``run_in_executor`` do not inherit it.
    """


class ScopeClosed(TornadoSAError):
    """A session was asked for after its unit of work had ended.

    Typical causes are a background task that outlives its request, and work
    after an early ``finish()``. Such work needs a scope of its own:
    ``with db.scope() as session`` (``async with`` on an `.AsyncDatabase`).
    """


class UncommittedChanges(TornadoSAError):
    """Work would be lost: it was flushed or pending and never committed."""


class ReadOnlyViolation(TornadoSAError):
    """Something was written in a unit of work that only reads."""


class ConcurrentAccess(TornadoSAError):
    """Two tasks, or a task and a worker thread, used one session at the same time.

    A session is one conversation with the database. Give each branch of a
    ``gather`` its own: ``async with db.scope() as session``. Await
    ``db.to_thread()`` before using its session elsewhere.
    """
