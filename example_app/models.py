"""What the ledger keeps: accounts, and the transfers between them.

Amounts of money are integers, in the currency's minor unit: 1234 EUR is €12.34.
"""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    DateTime,
    Dialect,
    ForeignKey,
    Integer,
    String,
    TypeDecorator,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

#: The largest id, amount and balance: what a BIGINT column holds.
MAX_INTEGER = 2**63 - 1

#: The longest text of each kind, in characters.
MAX_OWNER = 100
MAX_MEMO = 200

# ISO 4217: how many digits the minor unit takes, where it is not two.
_MINOR_DIGITS = dict.fromkeys(
    "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF".split(), 0
) | dict.fromkeys("BHD IQD JOD KWD LYD OMR TND".split(), 3)


class UTCDateTime(TypeDecorator[datetime]):
    """An aware ``datetime`` in UTC, also where the database knows no time zones."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """On its way to the database: SQLite would drop the time zone, so make it UTC first."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """On its way back: SQLite returns it naive, PostgreSQL in the server's time zone."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    """The base of the ledger's models."""


# SQLite numbers rows by itself only where the column is an INTEGER, which there has 64 bits too.
Id = Annotated[int, mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)]


class Account(Base):
    """Money of one owner in one currency."""

    __tablename__ = "account"
    # The last line of defence: handlers refuse an overdraft before the database has to.
    __table_args__ = (CheckConstraint("balance >= 0", name="account_balance_not_negative"),)

    id: Mapped[Id]
    owner: Mapped[str] = mapped_column(String(MAX_OWNER))
    currency: Mapped[str] = mapped_column(String(3))
    balance: Mapped[int] = mapped_column(BigInteger)

    def as_json(self) -> dict[str, Any]:
        """The account as clients of the API see it."""
        return {
            "id": self.id,
            "owner": self.owner,
            "currency": self.currency,
            "balance": self.balance,
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
    created_at: Mapped[datetime] = mapped_column(UTCDateTime, default=lambda: datetime.now(UTC))

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


def money(amount: int, currency: str) -> str:
    """An amount for people to read: ``money(123456, "EUR")`` is ``"1,234.56 EUR"``."""
    digits = _MINOR_DIGITS.get(currency, 2)
    return f"{Decimal(amount).scaleb(-digits):,.{digits}f} {currency}"
