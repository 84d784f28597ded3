"""Accounts over the API: opened, changed, read, and what is refused."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from example_app.money import MAX_INTEGER
from tests.example.support import Books


@pytest.mark.gen_test
async def test_an_account_is_opened_listed_and_read(fetch: Any, ask: Any) -> None:
    order = {"owner": "Ada", "currency": "EUR", "balance": 100, "limit": -50}
    created = await fetch("POST", "/accounts", order)
    assert created.code == 201
    account = json.loads(created.body)
    assert created.headers["Location"] == f"/accounts/{account['id']}"
    assert account == {"id": account["id"], **order, "version": 1}
    assert await ask("GET", created.headers["Location"]) == (200, account)
    assert await ask("GET", "/accounts") == (200, {"accounts": [account]})


@pytest.mark.gen_test
async def test_an_account_opens_empty_unless_told_otherwise(ask: Any) -> None:
    code, account = await ask("POST", "/accounts", {"owner": "Зоя 🦊", "currency": "JPY"})
    assert (code, account["owner"]) == (201, "Зоя 🦊")
    assert (account["balance"], account["limit"]) == (0, 0)


@pytest.mark.gen_test
async def test_the_largest_values_fit(books: Books, ask: Any) -> None:
    whole = {"owner": "x" * 100, "currency": "EUR", "balance": MAX_INTEGER}
    code, account = await ask("POST", "/accounts", whole)
    assert (code, account["balance"]) == (201, MAX_INTEGER)
    (other,) = await books.open(0)
    order = {"from": account["id"], "to": other, "amount": MAX_INTEGER, "memo": "x" * 200}
    assert (await ask("POST", "/transfers", order))[0] == 201
    assert await books.balances() == [0, MAX_INTEGER]


BAD_ACCOUNTS: list[tuple[str, list[Any]]] = [
    ("owner", [None, 1, True, "", " ", "x" * 101, "a\0b", "\ud800", ["Ada"], {}]),
    ("currency", [None, 978, "eur", "EURO", "EU", "EUR\n", "ÄÖÜ", "٣٣٣", "\0\0\0"]),
    ("balance", [None, -1, True, 1.0, 1e400, "1", 2**63, 10**400, [1]]),
    ("limit", [None, True, 1.0, "1", 2**63, -(2**63), {}]),
    ("colour", ["red"]),
    ("id", [1]),
]


@pytest.mark.parametrize(("field", "values"), BAD_ACCOUNTS)
@pytest.mark.parametrize("driver", ["sqlite", "asyncpg"], indirect=True)
@pytest.mark.gen_test
async def test_a_bad_account_is_refused(
    books: Books, ask: Any, field: str, values: list[Any]
) -> None:
    good = {"owner": "Ada", "currency": "EUR", "balance": 1}
    for value in values:
        code, body = await ask("POST", "/accounts", {**good, field: value})
        assert code == 400, value
        assert field in body["error"] or "unknown field" in body["error"]
    assert await books.rows() == (0, 0)


BAD_BODIES: list[str | bytes] = ["", "{", "{}", "[]", "null", "1", '"x"', "a=b", "[" * 50_000]
BAD_BODIES += ['{"balance": %s}' % ("9" * 5000), b"\xff\xfe", b'{"owner": "\xff"}']
BAD_BODIES += ['{"owner": "Ada", "owner": "Bob", "currency": "EUR"}', '{"amount": NaN}']


@pytest.mark.parametrize("path", ["/accounts", "/transfers"])
@pytest.mark.parametrize("driver", ["sqlite", "asyncpg"], indirect=True)
@pytest.mark.gen_test
async def test_a_bad_body_is_refused(books: Books, ask: Any, path: str) -> None:
    for body in BAD_BODIES:
        code, answer = await ask("POST", path, body)
        assert (code, list(answer)) == (400, ["error"]), body
    assert await books.rows() == (0, 0)


@pytest.mark.gen_test
async def test_a_missing_field_is_named(ask: Any) -> None:
    assert await ask("POST", "/accounts", {"owner": "Ada"}) == (
        400,
        {"error": "currency is missing."},
    )


@pytest.mark.parametrize("path", ["/accounts/", "/transfers/"])
@pytest.mark.gen_test
async def test_an_id_that_no_row_has_is_a_404(ask: Any, path: str) -> None:
    for ident in ("1", "0", "007", str(MAX_INTEGER), str(2**63), "9" * 5000, "x", "-1", "%00"):
        assert await ask("GET", path + ident) == (404, {"error": "Not Found"}), ident


# -- changes -------------------------------------------------------------------


@pytest.mark.gen_test
async def test_owner_and_limit_can_be_changed(books: Books, ask: Any) -> None:
    (ident,) = await books.open(100)
    code, account = await ask("PATCH", f"/accounts/{ident}", {"version": 1, "limit": -50})
    assert (code, account["limit"], account["owner"], account["version"]) == (200, -50, "Ada", 2)
    code, account = await ask("PATCH", f"/accounts/{ident}", {"version": 2, "owner": "Ada L."})
    assert (code, account["limit"], account["owner"], account["version"]) == (200, -50, "Ada L.", 3)
    assert await ask("GET", f"/accounts/{ident}") == (200, account)


@pytest.mark.usefixtures("concurrent")
@pytest.mark.gen_test
async def test_a_change_of_what_has_changed_is_a_409(books: Books, ask: Any) -> None:
    """Of several at the same time, one is made."""
    (ident,) = await books.open(100)
    changes = [{"version": 1, "owner": f"Ada {number}"} for number in range(5)]
    answers = await asyncio.gather(
        *(ask("PATCH", f"/accounts/{ident}", change) for change in changes)
    )
    assert sorted(code for code, _ in answers) == [200, 409, 409, 409, 409]
    (won,) = (account["owner"] for code, account in answers if code == 200)
    assert (await ask("GET", f"/accounts/{ident}"))[1]["owner"] == won


@pytest.mark.gen_test
async def test_a_limit_above_the_balance_is_refused(books: Books, ask: Any) -> None:
    (ident,) = await books.open(100)
    assert (await ask("PATCH", f"/accounts/{ident}", {"version": 1, "limit": 100}))[0] == 200
    code, body = await ask("PATCH", f"/accounts/{ident}", {"version": 2, "limit": 101})
    assert (code, body) == (422, {"error": "balance must not be below limit."})
    order = {"owner": "Ada", "currency": "EUR", "balance": 1, "limit": 2}
    assert (await ask("POST", "/accounts", order))[0] == 422
    assert await books.rows() == (1, 0)


@pytest.mark.gen_test
async def test_a_bad_change_is_refused(books: Books, ask: Any) -> None:
    (ident,) = await books.open(100)
    changes: list[Any] = [
        {"owner": "no version"},
        {"version": 0},
        {"version": 1, "owner": " "},
        {"version": 1, "owner": None},
        {"version": 1, "limit": "0"},
        {"version": 1, "balance": 1_000_000},
        [],
    ]
    for change in changes:
        code, body = await ask("PATCH", f"/accounts/{ident}", change)
        assert code == 400 and body["error"], change
    assert (await ask("PATCH", "/accounts/999999", {"version": 1}))[0] == 404
    assert (await ask("GET", f"/accounts/{ident}"))[1]["version"] == 1
