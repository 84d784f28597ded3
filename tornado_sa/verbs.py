"""Verbs that only read: how a handler says so, and what its scopes are told."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeVar, overload

from tornado.web import RequestHandler

from tornado_sa.scope import ReadOnly

if TYPE_CHECKING:
    from tornado_sa.request import RequestScope

VerbT = TypeVar("VerbT", bound=Callable[..., Any])

# Set on the verbs that were decorated. What wraps one, with functools.wraps, has it too.
_MARK = "_tornado_sa_read_only"


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

    Raises ``TypeError`` for what is no function, and, as the class is made, if
    the method is no verb.
    """

    def mark(verb: VerbT) -> VerbT:
        if not isinstance(verb, FunctionType):
            raise TypeError(
                f"@read_only is for the verbs of a handler, such as get(), not {verb!r}. Write"
                " `@read_only` or `@read_only(stream=True)` above `def get(self):`."
            )
        setattr(verb, _MARK, ReadOnly(stream=bool(stream)))
        return verb

    return mark if verb is None else mark(verb)


def verbs_that_read(cls: type[RequestScope]) -> dict[str, ReadOnly]:
    """The verbs of ``cls`` that only read, by the name of the HTTP method.

    Raises ``TypeError`` for a name that is no verb's.
    """
    supported = getattr(cls, "SUPPORTED_METHODS", RequestHandler.SUPPORTED_METHODS)
    named = cls.read_only_methods
    if isinstance(named, str) or not set(named) <= set(supported):
        raise TypeError(
            f"{cls.__name__}.read_only_methods is a set of HTTP methods in upper case, such as"
            f" frozenset({{'GET', 'HEAD'}}), not {named!r}."
        )
    verbs = {verb.lower() for verb in supported}
    for name, method in [item for base in cls.__mro__ for item in vars(base).items()]:
        if isinstance(method, FunctionType) and hasattr(method, _MARK) and name not in verbs:
            raise TypeError(
                f"{cls.__name__}.{name}() is no verb, and @read_only is for verbs. Open a unit of"
                " work in it, `with db.scope(read_only=True) as session:` (`async with` on an"
                " AsyncDatabase)."
            )
    reading = dict.fromkeys(named, ReadOnly(stream=False))
    for verb in supported:
        how = getattr(getattr(cls, verb.lower(), None), _MARK, None)
        if how is not None:
            reading[verb] = how
    return reading
