"""The handlers: plain ``Session`` code, one unit of work per request.

A verb that writes is ``@transactional``: its COMMIT comes before the response, so
that no client is told of something that was not stored. A verb that raises has
its work rolled back.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, cast

from sqlalchemy import CursorResult, select, update
from sqlalchemy.orm import joinedload
from tornado.web import HTTPError

from example_app.fields import DEFAULT_LIMIT, Fields, Refused, path_id, row_limit
from example_app.models import MAX_INTEGER, MAX_MEMO, MAX_OWNER, Account, Transfer, money
from tornado_sa import SessionHandler, transactional


class LedgerHandler(SessionHandler):
    """What the handlers share: how lists are limited, and how errors are told."""

    def set_default_headers(self) -> None:
        """Keep browsers from taking an answer for something that it is not."""
        self.set_header("X-Content-Type-Options", "nosniff")

    def limit(self) -> int:
        """How many rows the client wants at most: ``?limit=``."""
        return row_limit(self.get_query_argument("limit", str(DEFAULT_LIMIT)))

    def write_created(self, path: str, body: dict[str, Any]) -> None:
        """Answer 201 with what was created, and say where it is."""
        self.set_status(HTTPStatus.CREATED)
        self.set_header("Location", path)
        self.write(body)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Answer ``{"error": "..."}``, with no detail unless the error was the client's."""
        error = kwargs.get("exc_info", (None, None))[1]
        message = error.message if isinstance(error, Refused) else HTTPStatus(status_code).phrase
        self.finish({"error": message})


class NotFoundHandler(LedgerHandler):
    """Answers on paths that nobody else answers on."""

    def prepare(self) -> None:
        """Answer 404, whatever the verb."""
        raise HTTPError(404)


class IndexHandler(LedgerHandler):
    """The page for people."""

    def get(self) -> None:
        """Show the accounts and the latest transfers."""
        rows = self.limit()
        accounts = self.session.scalars(select(Account).order_by(Account.id).limit(rows))
        transfers = self.session.scalars(
            select(Transfer)
            .options(joinedload(Transfer.source), joinedload(Transfer.target))
            .order_by(Transfer.id.desc())
            .limit(rows)
        )
        self.render("index.html", accounts=accounts.all(), transfers=transfers.all(), money=money)


class AccountsHandler(LedgerHandler):
    """All accounts."""

    def get(self) -> None:
        """List accounts, oldest first."""
        accounts = self.session.scalars(select(Account).order_by(Account.id).limit(self.limit()))
        self.write({"accounts": [account.as_json() for account in accounts]})

    @transactional
    def post(self) -> None:
        """Open an account: ``{"owner": "Ada", "currency": "EUR", "balance": 10000}``."""
        fields = Fields(self.request.body, "owner", "currency", "balance")
        account = Account(
            owner=fields.text("owner", longest=MAX_OWNER),
            currency=fields.currency("currency"),
            balance=fields.integer("balance", least=0, default=0),
        )
        self.session.add(account)
        self.session.flush()  # for its id
        self.write_created(f"/accounts/{account.id}", account.as_json())


class AccountHandler(LedgerHandler):
    """One account."""

    def get(self, account_id: str) -> None:
        """Read the account."""
        self.write(self.get_or_404(Account, path_id(account_id)).as_json())


class TransfersHandler(LedgerHandler):
    """All transfers."""

    def get(self) -> None:
        """List transfers, latest first."""
        transfers = self.session.scalars(
            select(Transfer).order_by(Transfer.id.desc()).limit(self.limit())
        )
        self.write({"transfers": [transfer.as_json() for transfer in transfers]})

    @transactional(retries=3)
    def post(self) -> None:
        """Move money: ``{"from": 1, "to": 2, "amount": 250, "memo": "lunch"}``."""
        fields = Fields(self.request.body, "from", "to", "amount", "memo")
        transfer = Transfer(
            from_id=fields.integer("from", least=1),
            to_id=fields.integer("to", least=1),
            amount=fields.integer("amount", least=1),
            memo=fields.text("memo", longest=MAX_MEMO, default=""),
        )
        self.check_accounts(transfer)
        self.move_money(transfer)
        self.session.add(transfer)
        self.session.flush()  # for its id
        self.write_created(f"/transfers/{transfer.id}", transfer.as_json())

    def check_accounts(self, transfer: Transfer) -> None:
        """Refuse accounts that no money can move between. What is asked here never changes."""
        wanted = (transfer.from_id, transfer.to_id)
        if transfer.from_id == transfer.to_id:
            raise Refused(422, "from and to are the same account.")
        found = self.session.execute(
            select(Account.id, Account.currency).where(Account.id.in_(wanted))
        )
        currencies = {account_id: currency for account_id, currency in found}
        for account_id in wanted:
            if account_id not in currencies:
                raise Refused(422, f"There is no account {account_id}.")
        if currencies[transfer.from_id] != currencies[transfer.to_id]:
            raise Refused(422, "The accounts are in different currencies.")

    def move_money(self, transfer: Transfer) -> None:
        """Change both balances, or refuse. The check and the change are one statement.

        A balance that is read first and written later may have changed in
        between, and not every database can lock the row it reads.
        """
        changes = [(transfer.from_id, -transfer.amount), (transfer.to_id, transfer.amount)]
        # In the order of the ids, or two transfers in opposite directions wait for each other.
        for account_id, change in sorted(changes):
            result = self.session.execute(
                update(Account)
                .where(
                    Account.id == account_id,
                    Account.balance >= max(0, -change),
                    Account.balance <= MAX_INTEGER - max(0, change),
                )
                .values(balance=Account.balance + change)
            )
            if cast("CursorResult[Any]", result).rowcount != 1:
                what = "has insufficient funds" if change < 0 else "cannot hold so much money"
                raise Refused(422, f"Account {account_id} {what}.")


class TransferHandler(LedgerHandler):
    """One transfer."""

    def get(self, transfer_id: str) -> None:
        """Read the transfer."""
        self.write(self.get_or_404(Transfer, path_id(transfer_id)).as_json())
