"""The rules of the ledger: how accounts are opened and money moves.

Plain functions of a ``Session``: whoever calls them decides where the transaction begins and ends.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from http import HTTPStatus

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from tornado.escape import json_encode

from example_app.errors import Refused
from example_app.models import Account, Answer, Transfer
from example_app.money import MAX_INTEGER


@dataclass(frozen=True)
class Order:
    """What somebody wants moved."""

    from_id: int
    to_id: int
    amount: int
    memo: str

    def digest(self) -> str:
        """Equal for equal orders."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()


def open_account(
    session: Session, owner: str, currency: str, balance: int, limit: int = 0
) -> Account:
    """Open an account; it has its id. Raises `.Refused` if ``balance`` is below ``limit``."""
    if balance < limit:
        raise Refused(422, "balance must not be below limit.")
    account = Account(owner=owner, currency=currency, balance=balance, limit=limit)
    session.add(account)
    session.flush()  # for its id
    return account


def answer_once(session: Session, order: Order, key: str | None) -> Answer:
    """Carry out ``order``, or repeat what was answered when ``key`` came first.

    A refusal is an answer as well, and remembered: whoever asks again with the
    same key asks what became of the first request, and not for a second one.
    Without a key nothing is remembered.
    """
    answer = _first_answer(session, order, key) if key is not None else _unanswered(order, None)
    if answer.request != order.digest():
        raise Refused(422, "This Idempotency-Key was used for another request. Use a new one.")
    if not answer.status:
        _carry_out(session, order, answer)
    return answer


def transfer(session: Session, order: Order, key: str | None = None) -> Transfer:
    """Move money. Raises `.Refused`, and has changed nothing then."""
    source, target = _locked(session, order)
    if source.balance - order.amount < source.limit:
        raise Refused(422, f"Account {source.id} has insufficient funds.")
    if target.balance > MAX_INTEGER - order.amount:
        raise Refused(422, f"Account {target.id} cannot hold so much money.")
    source.balance -= order.amount
    target.balance += order.amount
    made = Transfer(**asdict(order), idempotency_key=key)
    session.add(made)
    session.flush()  # for its id
    return made


def _unanswered(order: Order, key: str | None) -> Answer:
    return Answer(key=key, request=order.digest(), status=0, body="")


def _first_answer(session: Session, order: Order, key: str) -> Answer:
    """The answer that ``key`` got; or one without a status, which takes the key."""
    known = session.get(Answer, key)
    if known is not None:
        return known
    answer = _unanswered(order, key)
    session.add(answer)
    try:
        # Whoever takes a key that another transaction has just taken waits here for its end.
        session.flush()
    except IntegrityError:
        session.rollback()
        return session.get_one(Answer, key)
    return answer


def _carry_out(session: Session, order: Order, answer: Answer) -> None:
    try:
        made = transfer(session, order, answer.key)
    except Refused as refused:
        answer.status = refused.status_code
        answer.body = json_encode({"error": refused.message})
    else:
        answer.status = HTTPStatus.CREATED
        answer.location = f"/transfers/{made.id}"
        answer.body = json_encode(made.as_json())


def _locked(session: Session, order: Order) -> tuple[Account, Account]:
    """Both accounts, as they are now, and nobody changes them before we are done."""
    wanted = (order.from_id, order.to_id)
    if order.from_id == order.to_id:
        raise Refused(422, "from and to are the same account.")
    found = session.scalars(
        select(Account)
        .where(Account.id.in_(wanted))
        # In this order, or two transfers in opposite directions wait for each other.
        .order_by(Account.id)
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    accounts = {account.id: account for account in found}
    for account_id in wanted:
        if account_id not in accounts:
            raise Refused(422, f"There is no account {account_id}.")
    source, target = accounts[order.from_id], accounts[order.to_id]
    if source.currency != target.currency:
        raise Refused(422, "The accounts are in different currencies.")
    return source, target
