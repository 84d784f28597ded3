"""The sessions of an isolated database, by which SQLAlchemy is led to its one connection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from sqlalchemy import Connection, Engine, event
from sqlalchemy.orm import Session, SessionTransaction

if TYPE_CHECKING:
    from tornado_sa.isolation import Isolation


class IsolatedSession(Session):
    """A session on the connection of an `Isolation`, with a savepoint for its transaction."""

    _isolation: ClassVar[Isolation]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._dies = kwargs.get("close_resets_only") is False
        self._is_dead = False
        super().__init__(*args, **kwargs)
        # Set here, whatever a class of the user's gives to __init__().
        setattr(self, "join_transaction_mode", "create_savepoint")  # noqa: B010  (for pyright)

    def get_bind(self, *args: Any, **kwargs: Any) -> Any:
        bind = super().get_bind(*args, **kwargs)
        if self._is_dead or not isinstance(bind, Engine):  # dead: SQLAlchemy says so in a moment
            return bind
        return self._isolation.connection_for(self, bind)

    def connection(self, bind_arguments: Any = None, execution_options: Any = None) -> Connection:
        if bind_arguments and isinstance(bind_arguments.get("bind"), Engine):  # asks no get_bind()
            bind_arguments = {**bind_arguments, "bind": self.get_bind(**bind_arguments)}
        return super().connection(bind_arguments, execution_options)

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._is_dead = self._dies
            self._isolation.ended(self)

    def invalidate(self) -> None:
        try:
            super().invalidate()
        finally:
            self._is_dead = self._dies
            self._isolation.ended(self)


@event.listens_for(IsolatedSession, "after_begin")
def _began(
    session: IsolatedSession, transaction: SessionTransaction, connection: Connection
) -> None:
    if transaction.parent is None:
        session._isolation.began(session, connection)


@event.listens_for(IsolatedSession, "after_transaction_end")
def _ended(session: IsolatedSession, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        session._isolation.ended(session)
