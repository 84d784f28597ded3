"""Transfers over the API: money moves, and nothing else does."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy.exc import IntegrityError

from example_app.models import Account, Transfer
from example_app.money import MAX_INTEGER
from tests.example.support import Books


@pytest.mark.gen_test
async def test_a_transfer_moves_money_and_is_read(books: Books, ask: Any) -> None:
    first, second = await books.open(100, 5)
    order = {"from": first, "to": second, "amount": 30, "memo": "lunch"}
    code, transfer = await ask("POST", "/transfers", order)
    assert code == 201
    assert transfer.items() >= order.items()
    assert transfer["created_at"].endswith("+00:00")
    assert await books.balances() == [70, 35]
    assert await ask("GET", f"/transfers/{transfer['id']}") == (200, transfer)
    assert await ask("GET", "/transfers") == (200, {"transfers": [transfer]})


@pytest.mark.parametrize(
    ("source", "target", "amount", "error"),
    [
        ("ada", "bob", 101, "insufficient funds"),
        ("bob", "ada", 1, "insufficient funds"),
        ("ada", "ada", 1, "same account"),
        ("ada", "yen", 1, "different currencies"),
        ("ada", "nobody", 1, "no account"),
        ("nobody", "ada", 1, "no account"),
        ("ada", "full", 1, "cannot hold"),
    ],
)
@pytest.mark.gen_test
async def test_the_ledger_refuses_what_would_not_add_up(
    books: Books, ask: Any, source: str, target: str, amount: int, error: str
) -> None:
    ada, bob, full = await books.open(100, 0, MAX_INTEGER)
    (yen,) = await books.open(100, currency="JPY")
    ids = {"ada": ada, "bob": bob, "full": full, "yen": yen, "nobody": MAX_INTEGER}
    order = {"from": ids[source], "to": ids[target], "amount": amount}
    code, body = await ask("POST", "/transfers", order)
    assert code == 422
    assert error in body["error"]
    assert await books.balances() == [100, 0, MAX_INTEGER, 100]
    assert await books.rows() == (4, 0)


BAD_TRANSFERS: list[tuple[str, list[Any]]] = [
    ("from", [None, "1", True, 1.0, 0, -1, 2**63]),
    ("to", [None, "1", True, 1.0, 0, -1, 2**63]),
    ("amount", [None, "1", True, 1.5, 0, -1, 2**63, 10**400]),
    ("memo", [None, 1, "x" * 201, "a\0b", "\udfff", []]),
    ("created_at", ["now"]),
]


@pytest.mark.parametrize(("field", "values"), BAD_TRANSFERS)
@pytest.mark.parametrize("driver", ["sqlite", "asyncpg"], indirect=True)
@pytest.mark.gen_test
async def test_a_bad_transfer_is_refused(
    books: Books, ask: Any, field: str, values: list[Any]
) -> None:
    first, second = await books.open(100, 100)
    good = {"from": first, "to": second, "amount": 1, "memo": ""}
    for value in values:
        code, body = await ask("POST", "/transfers", {**good, field: value})
        assert code == 400, value
        assert field in body["error"] or "unknown field" in body["error"]
    assert (await books.balances(), await books.rows()) == ([100, 100], (2, 0))


@pytest.mark.usefixtures("concurrent")
@pytest.mark.gen_test
async def test_concurrent_transfers_conserve_money(books: Books, ask: Any) -> None:
    """In both directions at once, and more than the accounts can pay."""
    first, second = await books.open(100, 100)
    orders = [{"from": first, "to": second, "amount": 30}] * 25
    orders += [{"from": second, "to": first, "amount": 7}] * 25
    answers = await asyncio.gather(*(ask("POST", "/transfers", order) for order in orders))
    assert {code for code, _ in answers} == {201, 422}
    assert sum(await books.balances()) == 200
    assert min(await books.balances()) >= 0
    assert await books.rows() == (2, [code for code, _ in answers].count(201))
    await books.check()


@pytest.mark.gen_test
async def test_a_balance_goes_down_to_its_limit_and_no_further(books: Books, ask: Any) -> None:
    (overdraft,) = await books.open(10, limit=-100)
    (reserve,) = await books.open(100, limit=90)
    for source, target, most in (overdraft, reserve, 110), (reserve, overdraft, 120):
        order = {"from": source, "to": target, "amount": most + 1}
        assert (await ask("POST", "/transfers", order))[0] == 422
        assert (await ask("POST", "/transfers", {**order, "amount": most}))[0] == 201
    assert await books.balances() == [20, 90]
    await books.check()


@pytest.mark.gen_test
async def test_the_database_checks_as_well(books: Books) -> None:
    """SQLite too: accounts that do not exist, and a balance below its limit."""
    (ident,) = await books.open(1)
    for broken in (
        Transfer(from_id=ident, to_id=ident + 1, amount=1, memo=""),
        Account(owner="Ada", currency="EUR", balance=-1),
    ):
        with pytest.raises(IntegrityError):
            await books.add(broken)
    assert await books.rows() == (1, 0)
