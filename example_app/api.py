"""The JSON API: plain ``Session`` code, one unit of work per request."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from http import HTTPStatus
from typing import Any

from sqlalchemy import select
from tornado.escape import json_encode
from tornado.httputil import url_concat
from tornado.iostream import StreamClosedError

from example_app import books
from example_app.errors import Refused
from example_app.fields import Fields, idempotency_key, path_id
from example_app.handlers import LedgerHandler
from example_app.ledger import Order, open_account
from example_app.models import MAX_MEMO, MAX_OWNER, Account, Transfer
from example_app.money import MAX_INTEGER
from example_app.openapi import DESCRIPTION
from tornado_sa import AsyncDatabase, read_only, transactional

# Rows of the export that are in memory at a time.
EXPORT_ROWS = 500

# How long the database may take to answer a health check, in seconds.
HEALTH_TIMEOUT = 2.0


class ApiHandler(LedgerHandler):
    """The base of the API's handlers."""

    def check_xsrf_cookie(self) -> None:
        """Not checked: no cookie of ours lets anybody in here, so none can be abused.

        What keeps other sites' pages from writing here is `prepare`: a browser
        sends JSON to another site only after that site has allowed it, and
        without being asked it sends nothing but forms and plain text.
        """

    def prepare(self) -> None:
        """Take JSON only."""
        method = self.request.method
        kind = self.request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if method in ("POST", "PATCH") and method in self.verbs() and kind != "application/json":
            raise Refused(415, "The body must be JSON, and its Content-Type application/json.")

    def write_page(self, name: str, rows: Sequence[Any], limit: int, cursor: str) -> None:
        """Answer one page of a list, with a link to the next one if there may be more.

        ``rows`` has one more than ``limit`` then. ``cursor`` is the argument
        that says where a page begins.
        """
        body: dict[str, Any] = {name: [row.as_json() for row in rows[:limit]]}
        if len(rows) > limit:
            arguments = {key: self.get_query_argument(key) for key in self.request.query_arguments}
            arguments[cursor] = str(rows[limit - 1].id)
            body["next"] = url_concat(self.request.path, arguments)
            self.set_header("Link", f'<{body["next"]}>; rel="next"')
        self.write(body)


class AccountsHandler(ApiHandler):
    """All accounts."""

    def get(self) -> None:
        """List accounts, oldest first: ``?limit=50&after=7``."""
        query = self.query("limit", "after")
        limit = query.limit()
        rows = books.accounts_page(self.session, limit + 1, query.ident("after"))
        self.write_page("accounts", rows, limit, "after")

    @transactional
    def post(self) -> None:
        """Open an account: ``{"owner": "Ada", "currency": "EUR", "balance": 10000}``."""
        fields = Fields(self.request.body, "owner", "currency", "balance", "limit")
        account = open_account(
            self.session,
            owner=fields.text("owner", longest=MAX_OWNER),
            currency=fields.currency("currency"),
            balance=fields.integer("balance", least=0, default=0),
            limit=fields.integer("limit", least=-MAX_INTEGER, default=0),
        )
        self.set_status(HTTPStatus.CREATED)
        self.set_header("Location", f"/accounts/{account.id}")
        self.write(account.as_json())


class AccountHandler(ApiHandler):
    """One account."""

    def get(self, account_id: str) -> None:
        """Read the account."""
        self.query()
        self.write(self.get_or_404(Account, path_id(account_id)).as_json())

    @transactional(retries=3)
    def patch(self, account_id: str) -> None:
        """Change owner or limit: ``{"version": 1, "limit": -5000}``.

        ``version`` is that of the account as the client has read it. If it was
        changed since, the answer is 409: two people must not undo each other's
        work without a word.
        """
        fields = Fields(self.request.body, "version", "owner", "limit")
        version = fields.integer("version", least=1)
        account = self.get_or_404(Account, path_id(account_id), with_for_update=True)
        owner = fields.text("owner", longest=MAX_OWNER, default=account.owner)
        limit = fields.integer("limit", least=-MAX_INTEGER, default=account.limit)
        if version != account.version:
            raise Refused(409, f"version is {account.version} by now: the account was changed.")
        if limit > account.balance:
            raise Refused(422, "balance must not be below limit.")
        account.owner, account.limit, account.version = owner, limit, version + 1
        self.write(account.as_json())


class TransfersHandler(ApiHandler):
    """All transfers."""

    def get(self) -> None:
        """List transfers, latest first: ``?limit=50&before=7&account=1``."""
        query = self.query("limit", "before", "account")
        limit, account = query.limit(), query.ident("account")
        rows = books.transfers_page(self.session, limit + 1, query.ident("before"), account)
        self.write_page("transfers", rows, limit, "before")

    @transactional(retries=3)
    def post(self) -> None:
        """Move money: ``{"from": 1, "to": 2, "amount": 250, "memo": "lunch"}``."""
        fields = Fields(self.request.body, "from", "to", "amount", "memo")
        order = Order(
            from_id=fields.integer("from", least=1),
            to_id=fields.integer("to", least=1),
            amount=fields.integer("amount", least=1),
            memo=fields.text("memo", longest=MAX_MEMO, default=""),
        )
        key = idempotency_key(self.request.headers.get("Idempotency-Key"))
        answer = self.move_money(order, key)
        self.set_status(answer.status)
        if answer.location is not None:
            self.set_header("Location", answer.location)
        self.set_header("Content-Type", "application/json; charset=UTF-8")
        self.write(answer.body)

    def should_commit(self) -> bool:
        """A refusal is stored too, as the answer to its key; an exception is rolled back anyway."""
        return True


class TransferHandler(ApiHandler):
    """One transfer."""

    def get(self, transfer_id: str) -> None:
        """Read the transfer."""
        self.query()
        self.write(self.get_or_404(Transfer, path_id(transfer_id)).as_json())


class ExportHandler(ApiHandler):
    """All transfers in one answer, one per line."""

    @read_only(stream=True)
    async def get(self) -> None:
        """Stream the transfers as they stand at this moment, oldest first."""
        self.query()
        transfers = select(Transfer).order_by(Transfer.id).execution_options(yield_per=EXPORT_ROWS)
        self.set_header("Content-Type", "application/x-ndjson")
        self.set_header("Content-Disposition", 'attachment; filename="transfers.ndjson"')
        with self.session.scalars(transfers) as result, suppress(StreamClosedError):
            for some in result.partitions():
                self.write("".join(json_encode(one.as_json()) + "\n" for one in some))
                await self.flush()  # a client that reads slowly is waited for


class HealthHandler(ApiHandler):
    """For whoever watches the server."""

    async def get(self) -> None:
        """Ask the database whether it is there. If it is not, the answer is 503.

        The numbers are what this process is busy with, on the side that writes.
        """
        self.query()
        if isinstance(self.db, AsyncDatabase):
            await self.db.ping(HEALTH_TIMEOUT)
        else:
            await asyncio.to_thread(self.db.ping, HEALTH_TIMEOUT)
        status = self.db.status()
        self.write(
            {
                "status": "ok",
                "connections_out": status.checked_out,
                "units_of_work": len(status.open_scopes),
            }
        )


class OpenApiHandler(ApiHandler):
    """The description of this API, for programs."""

    def get(self) -> None:
        """Send it."""
        self.query()
        self.write(DESCRIPTION)
