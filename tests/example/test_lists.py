"""Lists, a page at a time, and the export of everything."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from sqlalchemy import insert
from tornado.web import Application

from example_app import api
from example_app.database import write
from example_app.models import Transfer
from example_app.money import MAX_INTEGER
from tests.example.support import Books, checked_out
from tests.support import RawClient, until


async def add_transfers(books: Books, count: int) -> list[int]:
    """Make transfers of 1, 2, 3 and so on, between two accounts; return these accounts."""
    first, second = await books.open(10**9, 0)
    await books.add(
        *(
            Transfer(from_id=first, to_id=second, amount=amount, memo="")
            for amount in range(1, count + 1)
        )
    )
    return [first, second]


@pytest.mark.gen_test
async def test_lists_are_limited(books: Books, ask: Any) -> None:
    first, second = (await books.open(*[1000] * 201))[:2]
    for amount in range(1, 61):
        await books.add(Transfer(from_id=first, to_id=second, amount=amount, memo=""))
    for path in ("/accounts", "/transfers"):
        listed = (await ask("GET", path))[1][path[1:]]
        assert len(listed) == 50
    assert len((await ask("GET", "/accounts?limit=200"))[1]["accounts"]) == 200
    latest = (await ask("GET", "/transfers?limit=2"))[1]["transfers"]
    assert [transfer["amount"] for transfer in latest] == [60, 59]


@pytest.mark.parametrize("path", ["/", "/accounts", "/transfers"])
@pytest.mark.parametrize("driver", ["sqlite", "asyncpg"], indirect=True)
@pytest.mark.gen_test
async def test_a_bad_limit_is_refused(ask: Any, path: str) -> None:
    for limit in ("0", "201", "-1", "x", "", "1.0", "9" * 5000, "%D9%A3", "%00"):
        code, body = await ask("GET", f"{path}?limit={limit}")
        assert (code, body) == (400, {"error": "limit must be an integer from 1 to 200."})


@pytest.mark.gen_test
async def test_pages_lead_from_one_to_the_next(books: Books, fetch: Any) -> None:
    """And what is added meanwhile moves none of them."""
    first, second = await add_transfers(books, 7)
    seen: list[int] = []
    path = f"/transfers?limit=3&account={second}"
    while path:
        response = await fetch("GET", path)
        body = json.loads(response.body)
        seen += [transfer["amount"] for transfer in body["transfers"]]
        path = body.get("next", "")
        assert response.headers.get("Link", "") == (f'<{path}>; rel="next"' if path else "")
        await books.add(Transfer(from_id=first, to_id=second, amount=100, memo="meanwhile"))
    assert seen == [7, 6, 5, 4, 3, 2, 1]


@pytest.mark.gen_test
async def test_accounts_are_listed_from_behind_one(books: Books, ask: Any) -> None:
    ids = await books.open(1, 2, 3)
    code, body = await ask("GET", "/accounts?limit=2")
    assert [account["id"] for account in body["accounts"]] == ids[:2]
    code, body = await ask("GET", body["next"])
    assert (code, [account["id"] for account in body["accounts"]]) == (200, ids[2:])
    assert "next" not in body


@pytest.mark.parametrize("driver", ["sqlite"], indirect=True)
@pytest.mark.gen_test
async def test_a_bad_cursor_is_refused(ask: Any) -> None:
    for value in ("0", "-1", "x", "", "1.0", str(2**63), "9" * 5000, "%D9%A3"):
        for path in ("/accounts?after=", "/transfers?before=", "/transfers?account="):
            code, body = await ask("GET", path + value)
            assert code == 400
            assert f"must be an integer from 1 to {MAX_INTEGER}." in body["error"]


@pytest.mark.gen_test
async def test_transfers_of_one_account(books: Books, ask: Any) -> None:
    first, second = await add_transfers(books, 1)
    (third,) = await books.open(0)
    await books.add(Transfer(from_id=second, to_id=third, amount=9, memo=""))
    for account, amounts in (first, [1]), (second, [9, 1]), (third, [9]):
        listed = (await ask("GET", f"/transfers?account={account}"))[1]["transfers"]
        assert [transfer["amount"] for transfer in listed] == amounts


@pytest.mark.gen_test
async def test_the_export_has_every_transfer(
    books: Books, fetch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "EXPORT_ROWS", 10)  # several parts
    await add_transfers(books, 25)
    response = await fetch("GET", "/transfers.ndjson")
    assert response.headers["Content-Type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in response.body.splitlines()]
    assert [line["amount"] for line in lines] == list(range(1, 26))
    assert lines[0] == json.loads((await fetch("GET", f"/transfers/{lines[0]['id']}")).body)


@pytest.mark.gen_test
async def test_the_export_of_an_empty_ledger(fetch: Any) -> None:
    response = await fetch("GET", "/transfers.ndjson")
    assert (response.code, response.body) == (200, b"")


@pytest.mark.parametrize("driver", ["sqlite", "psycopg", "asyncpg"], indirect=True)
@pytest.mark.usefixtures("concurrent")
@pytest.mark.gen_test
async def test_the_export_waits_for_its_reader_and_notices_that_it_is_gone(
    app: Application, books: Books, http_server: Any, base_url: str
) -> None:
    """Otherwise all of it would be in memory. Its connection is back in the pool at once."""
    first, second = await books.open(10**9, 0)
    row = {"from_id": first, "to_id": second, "amount": 1, "memo": "x" * 200}
    await write(books.db, "test", lambda session: session.execute(insert(Transfer), [row] * 30_000))
    async with RawClient(base_url) as client:
        await client.send("GET /transfers.ndjson HTTP/1.1\nHost: x")
        assert await client.status() == 200
        await asyncio.sleep(0.3)
        assert checked_out(books.db) == 1  # still at it: the client does not read
    await until(lambda: checked_out(books.db) == 0)
