"""What a handler says of its verbs: that they run in a transaction, or that they only read."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeVar, overload

from tornado.web import RequestHandler

from tornado_sa.errors import ConfigurationError
from tornado_sa.scope import ReadOnly

if TYPE_CHECKING:
    from tornado_sa.request import RequestScope

VerbT = TypeVar("VerbT", bound=Callable[..., Any])

# Set on the verbs that were decorated. What wraps one, with functools.wraps, has it too.
_TRANSACTIONAL = "_tornado_sa_transactional"
_READ_ONLY = "_tornado_sa_read_only"


@dataclass(frozen=True)
class Transaction:
    """How a verb is run in a transaction."""

    retries: int = 0
    isolation_level: str | None = None

    def __post_init__(self) -> None:
        retries, level = self.retries, self.isolation_level
        if not isinstance(retries, int) or isinstance(retries, bool) or retries < 0:
            raise ConfigurationError(
                f"@transactional(retries={retries!r}): give the number of times that the verb may"
                " run again, 0 or more."
            )
        if level is not None and (not isinstance(level, str) or level.upper() == "AUTOCOMMIT"):
            raise ConfigurationError(
                f"@transactional(isolation_level={level!r}): give the name of an isolation level,"
                ' such as "SERIALIZABLE".'
            )


@overload
def transactional(verb: VerbT, /) -> VerbT: ...
@overload
def transactional(
    *, retries: int = 0, isolation_level: str | None = None
) -> Callable[[VerbT], VerbT]: ...
def transactional(
    verb: Any = None, /, *, retries: int = 0, isolation_level: str | None = None
) -> Any:
    """Run a verb in a transaction: COMMIT, and only then the response.

    ::

        class Transfers(SessionHandler):
            @transactional(retries=3, isolation_level="SERIALIZABLE")
            def post(self):
                self.session.add(Transfer(...))
                self.redirect("/transfers")

    When the verb returns, or raises ``tornado.web.Finish``, and
    ``self.should_commit()`` agrees, the session is committed. On any other
    exception it is rolled back. The response goes out afterwards. Until then
    ``finish()``, ``render()``, ``redirect()`` and ``send_error()`` are held
    back, and ``flush()`` is refused. When the COMMIT fails, nothing is left of
    the response the verb prepared, and the error is answered like any other.

    ``retries``
        How many times the verb is run again after a serialization failure, a
        deadlock or a locked SQLite file, after a pause of at most 0.1 seconds.
        Each time the response is as it was before the verb; attributes that the
        verb sets on ``self`` are not. A verb that joins work which was not
        committed, say of `prepare`, is not run again, for that work is lost.
    ``isolation_level``
        Of this transaction, such as ``"SERIALIZABLE"``. A transaction that has
        only read before, say in `prepare`, is ended for it.

    Only the verb that Tornado calls counts: one that is reached by
    ``super().post()`` or ``self.post()`` is part of its caller's transaction.
    Other databases than the handler's own commit by themselves.

    Raises `.ConfigurationError` for wrong options, for what is no function,
    where the method is no verb, and where the handler is not one of ours.
    """
    transaction = Transaction(retries, isolation_level)

    def mark(verb: Any) -> Any:
        marked = _refused_elsewhere(_function(verb, "transactional"))
        setattr(marked, _TRANSACTIONAL, transaction)
        return marked

    return mark if verb is None else mark(verb)


@overload
def read_only(verb: VerbT, /) -> VerbT: ...
@overload
def read_only(*, stream: bool = False) -> Callable[[VerbT], VerbT]: ...
def read_only(verb: Any = None, /, *, stream: bool = False) -> Any:
    """Say of a verb that it only reads: ``@read_only``, or ``@read_only(stream=True)``.

    The session of the whole request, from ``prepare()`` on, then uses the
    database's reader: connections in autocommit mode, which the server keeps
    read-only. There is no BEGIN and no ROLLBACK, which saves two round trips,
    and no snapshot: each statement sees what was committed before it. For a
    whole class, see ``read_only_methods``; for other code than verbs,
    ``db.scope(read_only=True)``.

    A write raises `.ReadOnlyViolation`, whether it comes from the ORM, from Core
    or as text, and if the verb lets it pass, the response is a 500. There are
    no savepoints, so no ``begin_nested()``.

    ``stream``
        Use a transaction on the reader all the same: server-side cursors,
        by ``yield_per`` or ``stream()``, need one.

    Only the verb that Tornado calls counts: one that is reached by
    ``super().get()`` or ``self.get()`` runs in the unit of work of its caller.

    Raises `.ConfigurationError` for what is no function, and, as the class is
    made, if the method is no verb.
    """

    reading = ReadOnly(stream=bool(stream))

    def mark(verb: VerbT) -> VerbT:
        setattr(_function(verb, "read_only"), _READ_ONLY, reading)
        return verb

    return mark if verb is None else mark(verb)


def _function(verb: Any, decorator: str) -> Any:
    if not isinstance(verb, FunctionType):
        raise ConfigurationError(
            f"@{decorator} is for the verbs of a handler, such as get(), not {verb!r}. Write"
            f" `@{decorator}` above `def get(self):`, and its options by name, as in"
            " `@transactional(retries=3)` or `@read_only(stream=True)`."
        )
    return verb


def _refused_elsewhere(verb: Callable[..., Any]) -> Callable[..., Any]:
    """``verb``, refused in a handler where nobody would commit."""
    if inspect.iscoroutinefunction(verb):

        @functools.wraps(verb)
        async def call_async(self: RequestScope, *args: Any, **kwargs: Any) -> Any:
            _check_handler(self, verb)
            return await verb(self, *args, **kwargs)

        return call_async

    @functools.wraps(verb)
    def call(self: RequestScope, *args: Any, **kwargs: Any) -> Any:
        _check_handler(self, verb)
        return verb(self, *args, **kwargs)

    return call


def _check_handler(handler: object, verb: Callable[..., Any]) -> None:
    if not hasattr(handler, "_sa_transactions"):
        raise ConfigurationError(
            f"@transactional {verb.__qualname__}: {type(handler).__name__} is no handler of"
            " tornado_sa, so nobody would commit. Mix in BaseHandler, or subclass SessionHandler."
        )


def note_verbs(cls: type[RequestScope]) -> None:
    """Note which verbs of ``cls`` run in a transaction and which only read.

    What a verb is decorated with counts for more than the sets of names on the
    class. Raises `.ConfigurationError` for a name that is no verb's, and for a
    verb that is said to be both.
    """
    supported = getattr(cls, "SUPPORTED_METHODS", RequestHandler.SUPPORTED_METHODS)
    _check_names(cls, {verb.lower() for verb in supported})
    transactions, marked_transactions = _said_of(
        cls, supported, _TRANSACTIONAL, "transactional_methods", Transaction()
    )
    reading, marked_reading = _said_of(
        cls, supported, _READ_ONLY, "read_only_methods", ReadOnly(stream=False)
    )
    both = (set(transactions) & set(reading)) | (set(marked_transactions) & set(marked_reading))
    both -= set(marked_transactions) ^ set(marked_reading)
    if both:
        raise ConfigurationError(
            f"{cls.__name__}: {', '.join(sorted(both))} cannot be transactional and read-only. What"
            " only reads has nothing to commit: leave out one of the two."
        )
    cls._sa_transactions = {**_without(transactions, marked_reading), **marked_transactions}
    cls._sa_reading = {**_without(reading, marked_transactions), **marked_reading}


def _without(table: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    return {name: table[name] for name in table if name not in names}


def _said_of(
    cls: type[RequestScope], supported: Any, mark: str, attribute: str, default: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is said by the names on the class, and what by decorators, by HTTP method."""
    named = getattr(cls, attribute)
    if isinstance(named, str) or not set(named) <= set(supported):
        raise ConfigurationError(
            f"{cls.__name__}.{attribute} is a set of HTTP methods in upper case, such as"
            f" frozenset({{'GET', 'HEAD'}}), not {named!r}."
        )
    verbs = {verb: getattr(getattr(cls, verb.lower(), None), mark, None) for verb in supported}
    return dict.fromkeys(named, default), {verb: how for verb, how in verbs.items() if how}


def _check_names(cls: type, verbs: set[str]) -> None:
    for name, method in [item for base in cls.__mro__ for item in vars(base).items()]:
        if name in verbs or not isinstance(method, FunctionType):
            continue
        if hasattr(method, _READ_ONLY):
            decorator, block = "@read_only", "db.scope(read_only=True)"
        elif hasattr(method, _TRANSACTIONAL):
            decorator, block = "@transactional", "db.begin()"
        else:
            continue
        raise ConfigurationError(
            f"{cls.__name__}.{name}() is no verb, and {decorator} is for verbs. Open a unit of work"
            f" in it, `with {block} as session:` (`async with` on an AsyncDatabase)."
        )
