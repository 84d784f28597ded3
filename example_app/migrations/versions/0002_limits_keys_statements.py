"""Limits, opening balances, idempotency keys, statements."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0002"
down_revision = "0001"

ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")
TIME = sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
KEY = sa.String(200).with_variant(
    mysql.VARCHAR(200, charset="ascii", collation="ascii_bin"), "mysql", "mariadb"
)

ADDED: dict[str, sa.types.TypeEngine[Any]] = {
    "balance_limit": sa.BigInteger(),
    "opening": sa.BigInteger(),
    "opened_at": TIME,
    "version": sa.Integer(),
}


def upgrade() -> None:
    """Add columns and tables, and fill the columns for the accounts that there are."""
    with op.batch_alter_table("account") as batch:
        for name, kind in ADDED.items():
            batch.add_column(sa.Column(name, kind, nullable=True))
    fill()
    with op.batch_alter_table("account") as batch:
        for name, kind in ADDED.items():
            batch.alter_column(name, existing_type=kind, nullable=False)
        batch.drop_constraint("account_balance_not_negative", type_="check")
        batch.create_check_constraint("account_within_limit", "balance >= balance_limit")
    op.add_column("transfer", sa.Column("idempotency_key", KEY, nullable=True))
    op.create_index("ix_transfer_idempotency_key", "transfer", ["idempotency_key"], unique=True)
    op.create_index("ix_transfer_created_at", "transfer", ["created_at"])
    op.create_table(
        "answer",
        sa.Column("idempotency_key", KEY, primary_key=True),
        sa.Column("request", sa.String(64), nullable=False),
        sa.Column("status", sa.Integer, nullable=False),
        sa.Column("location", sa.String(100), nullable=True),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        mysql_charset="utf8mb4",
    )
    op.create_table(
        "statement",
        sa.Column("account_id", ID, sa.ForeignKey("account.id"), primary_key=True),
        sa.Column("day", sa.Date, primary_key=True),
        sa.Column("received", sa.BigInteger, nullable=False),
        sa.Column("paid", sa.BigInteger, nullable=False),
        sa.Column("closing", sa.BigInteger, nullable=False),
    )


def fill() -> None:
    """Whatever no transfer accounts for is what an account was opened with."""
    account = sa.table("account", *map(sa.column, ["id", "balance", *ADDED]))
    account.c.opened_at.type = TIME
    transfer = sa.table("transfer", *map(sa.column, ["from_id", "to_id", "amount"]))
    moved = {
        side: sa.select(sa.func.coalesce(sa.func.sum(transfer.c.amount), 0))
        .where(transfer.c[side] == account.c.id)
        .scalar_subquery()
        for side in ("from_id", "to_id")
    }
    op.execute(
        account.update().values(
            balance_limit=0,
            opening=account.c.balance + moved["from_id"] - moved["to_id"],
            opened_at=first_moment(),
            version=1,
        )
    )


def first_moment() -> datetime:
    """Nobody noted when accounts were opened: before the first transfer, at the latest."""
    created_at = sa.column("created_at", TIME)
    found = op.get_bind().scalar(
        sa.select(sa.func.min(created_at)).select_from(sa.text("transfer"))
    )
    moment: datetime = found or datetime.now(UTC)
    if op.get_bind().dialect.name != "postgresql":
        moment = (
            moment.replace(tzinfo=None) if found else moment.astimezone(UTC).replace(tzinfo=None)
        )
    return moment
