"""The pages for people: what a browser shows, and the forms that it sends."""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select

from example_app import books, chart
from example_app.errors import Refused
from example_app.fields import DEFAULT_LIMIT, Arguments, currency, idempotency_key, path_id, text
from example_app.handlers import LedgerHandler
from example_app.ledger import Order, open_account
from example_app.models import MAX_MEMO, MAX_OWNER, Account
from example_app.money import minor_units, money
from tornado_sa import transactional

# Transfers that the chart of an account goes back.
CHART_TRANSFERS = 200


class PageHandler(LedgerHandler):
    """The base of the pages. Their forms carry Tornado's XSRF token, which Tornado checks.

    They have to: a page of another site can make a browser send a form, and the
    browser alone, running where the ledger trusts it, is all the authority there is.
    """

    def check_xsrf_cookie(self) -> None:
        """Checked where there is something to protect; what the page has no verb for is a 405."""
        if self.request.method in self.verbs():
            super().check_xsrf_cookie()

    def get_template_namespace(self) -> dict[str, Any]:
        """What templates may use."""
        return {**super().get_template_namespace(), "money": money}

    def form(self, *names: str) -> Arguments:
        """The fields of the form that was sent, of which ``names`` are known."""
        return Arguments(self.request.body_arguments, "_xsrf", *names)

    def show_ledger(
        self,
        limit: int,
        *,
        done: str = "",
        typed: dict[str, str] | None = None,
        refused: Refused | None = None,
    ) -> None:
        """Show accounts and latest transfers, what was ``done``, and what was ``typed``."""
        accounts = books.accounts_page(self.session, limit + 1)
        transfers = books.transfers_page(self.session, limit)
        now = datetime.now(UTC)
        self.render(
            "ledger.html",
            accounts=accounts[:limit],
            more_accounts=len(accounts) > limit,
            transfers=transfers,
            totals=books.totals(self.session),
            sparks={
                account.id: chart.draw(books.past_balances(account, transfers), 120, 28, now)
                for account in accounts[:limit]
            },
            done=done,
            typed=typed or {},
            refused=refused,
            key=uuid.uuid4().hex,
        )


class LedgerPageHandler(PageHandler):
    """The whole ledger, on one page."""

    def get(self) -> None:
        """Show it."""
        query = self.query("limit", "paid", "opened")
        done = ""
        if (paid := query.ident("paid")) is not None:
            done = f"Transfer {paid} is done."
        elif (opened := query.ident("opened")) is not None:
            done = f"Account {opened} is open."
        self.show_ledger(query.limit(), done=done)


class AccountPageHandler(PageHandler):
    """One account: its balance over time, its transfers, its statements."""

    def get(self, account_id: str) -> None:
        """Show it."""
        self.query()
        account = self.get_or_404(Account, path_id(account_id))
        transfers = books.transfers_page(self.session, CHART_TRANSFERS, account_id=account.id)
        points = books.past_balances(account, transfers)
        self.render(
            "account.html",
            account=account,
            transfers=transfers[:20],
            chart=chart.draw(points, 640, 200, datetime.now(UTC)),
        )


class FormHandler(PageHandler):
    """The base of what forms are sent to."""

    def refuse(self, refused: Refused, form: Arguments, *names: str) -> None:
        """Show the page again, with the error, and with what the person had typed."""
        self.set_status(refused.status_code)
        typed = {name: form.get(name) for name in names}
        self.show_ledger(DEFAULT_LIMIT, typed=typed, refused=refused)


class OpenHandler(FormHandler):
    """The form that opens an account."""

    FIELDS = ("owner", "currency", "balance", "limit")

    @transactional
    def post(self) -> None:
        """Open the account, and lead the browser back to the page."""
        form = self.form(*self.FIELDS)
        try:
            name = form.get("currency").strip().upper()
            account = open_account(
                self.session,
                owner=text("Owner", form.get("owner").strip(), longest=MAX_OWNER),
                currency=currency("Currency", name),
                balance=_not_negative(minor_units(form.get("balance") or "0", name, "Balance")),
                limit=minor_units(form.get("limit") or "0", name, "Limit"),
            )
        except Refused as refused:
            self.refuse(refused, form, *self.FIELDS)
        else:
            self.redirect(f"/?opened={account.id}", status=303)


class PayHandler(FormHandler):
    """The form that moves money."""

    FIELDS = ("from", "to", "amount", "memo")

    @transactional(retries=3)
    def post(self) -> None:
        """Move the money, and lead the browser back to the page.

        Once, however often the person presses the button: the page has given
        the form a key.
        """
        form = self.form("key", *self.FIELDS)
        try:
            answer = self.move_money(
                self.read_order(form), idempotency_key(form.get("key") or None)
            )
            if answer.location is None:
                raise Refused(answer.status, json.loads(answer.body)["error"])
        except Refused as refused:
            self.refuse(refused, form, *self.FIELDS)
        else:
            self.redirect(f"/?paid={answer.location.rpartition('/')[2]}", status=303)

    def read_order(self, form: Arguments) -> Order:
        """What the form asks for. The amount is in the currency of the account that pays."""
        source, target = form.ident("from"), form.ident("to")
        if source is None or target is None:
            raise Refused(400, "Choose the two accounts.")
        paying = self.session.scalar(select(Account.currency).where(Account.id == source))
        amount = minor_units(form.get("amount"), paying or "EUR", "Amount")
        if amount <= 0:
            raise Refused(400, "Amount must be more than zero.")
        memo = text("Memo", form.get("memo"), longest=MAX_MEMO, default="")
        return Order(from_id=source, to_id=target, amount=amount, memo=memo)

    def should_commit(self) -> bool:
        """A refusal is stored too, as the answer to the form's key."""
        return True


def _not_negative(balance: int) -> int:
    if balance < 0:
        raise Refused(400, "Balance must not be below zero.")
    return balance
