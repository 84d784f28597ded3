"""What the ledger keeps: accounts, the transfers between them, and what was said about both.

Amounts of money are integers, in the currency's minor unit: 1234 EUR is €12.34. For every account,
and at any time, ``balance == opening + received - paid``: that is how the books are checked.
"""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Annotated, Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Date,
    DateTime,
    Dialect,
    ForeignKey,
    Integer,
    String,
    Text,
    TypeDecorator,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.types import TypeEngine

#: The longest text of each kind, in characters.
MAX_OWNER = 100
MAX_MEMO = 200
MAX_KEY = 200


class UTCDateTime(TypeDecorator[datetime]):
    """An aware ``datetime`` in UTC, also where the database knows no time zones."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """MariaDB keeps whole seconds unless it is told otherwise."""
        if dialect.name in ("mysql", "mariadb"):
            return dialect.type_descriptor(mysql.DATETIME(fsp=6))
        return dialect.type_descriptor(DateTime(timezone=True))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """On its way to the database: SQLite would drop the time zone, so make it UTC first."""
        if value is None or dialect.name == "postgresql":
            return value
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """On its way back: SQLite returns it naive, PostgreSQL in the server's time zone."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    """The base of the ledger's models."""


def _now() -> datetime:
    return datetime.now(UTC)


def _opening_balance(context: Any) -> int:
    balance: int = context.get_current_parameters()["balance"]
    return balance


# SQLite numbers rows by itself only where the column is an INTEGER, which there has 64 bits too.
Id = Annotated[int, mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)]

# Compared byte by byte: MariaDB would take "a" and "A" for the same key.
_KEY = String(MAX_KEY).with_variant(
    mysql.VARCHAR(MAX_KEY, charset="ascii", collation="ascii_bin"), "mysql", "mariadb"
)


class Account(Base):
    """Money of one owner in one currency."""

    __tablename__ = "account"
    # The last line of defence: handlers refuse an overdraft before the database has to.
    __table_args__ = (CheckConstraint("balance >= balance_limit", name="account_within_limit"),)

    id: Mapped[Id]
    owner: Mapped[str] = mapped_column(String(MAX_OWNER))
    currency: Mapped[str] = mapped_column(String(3))
    balance: Mapped[int] = mapped_column(BigInteger)
    #: The balance never goes below it: 0, or less for an overdraft. (LIMIT is a word of SQL's.)
    limit: Mapped[int] = mapped_column("balance_limit", BigInteger, default=0)
    #: The balance it was opened with, which no transfer accounts for. Never changes.
    opening: Mapped[int] = mapped_column(BigInteger, default=_opening_balance)
    opened_at: Mapped[datetime] = mapped_column(UTCDateTime, default=_now)
    #: Counts the changes that people make to owner and limit, so that none undoes another's.
    version: Mapped[int] = mapped_column(Integer, default=1)

    statements: Mapped[list[Statement]] = relationship(order_by="Statement.day.desc()")

    def as_json(self) -> dict[str, Any]:
        """The account as clients of the API see it."""
        return {
            "id": self.id,
            "owner": self.owner,
            "currency": self.currency,
            "balance": self.balance,
            "limit": self.limit,
            "version": self.version,
        }


class Transfer(Base):
    """Money that moved from one account to another. Never changed, never deleted."""

    __tablename__ = "transfer"
    __table_args__ = (CheckConstraint("amount > 0", name="transfer_amount_positive"),)

    id: Mapped[Id]
    from_id: Mapped[int] = mapped_column(ForeignKey("account.id"), index=True)
    to_id: Mapped[int] = mapped_column(ForeignKey("account.id"), index=True)
    amount: Mapped[int] = mapped_column(BigInteger)
    memo: Mapped[str] = mapped_column(String(MAX_MEMO))
    created_at: Mapped[datetime] = mapped_column(UTCDateTime, default=_now, index=True)
    idempotency_key: Mapped[str | None] = mapped_column(_KEY, unique=True, index=True)

    source: Mapped[Account] = relationship(foreign_keys=[from_id])
    target: Mapped[Account] = relationship(foreign_keys=[to_id])

    def as_json(self) -> dict[str, Any]:
        """The transfer as clients of the API see it."""
        return {
            "id": self.id,
            "from": self.from_id,
            "to": self.to_id,
            "amount": self.amount,
            "memo": self.memo,
            "created_at": self.created_at.isoformat(),
        }


class Answer(Base):
    """What was answered to the request that first came with an ``Idempotency-Key``."""

    __tablename__ = "answer"

    key: Mapped[str] = mapped_column("idempotency_key", _KEY, primary_key=True)
    #: What was asked for: a digest, to tell a repetition from another request.
    request: Mapped[str] = mapped_column(String(64))
    status: Mapped[int] = mapped_column(Integer)
    location: Mapped[str | None] = mapped_column(String(100))
    body: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UTCDateTime, default=_now)


class Statement(Base):
    """What one day, in UTC, has done to one account."""

    __tablename__ = "statement"

    account_id: Mapped[int] = mapped_column(ForeignKey("account.id"), primary_key=True)
    day: Mapped[date] = mapped_column(Date, primary_key=True)
    received: Mapped[int] = mapped_column(BigInteger)
    paid: Mapped[int] = mapped_column(BigInteger)
    closing: Mapped[int] = mapped_column(BigInteger)
