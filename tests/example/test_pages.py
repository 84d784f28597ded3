"""The pages, as a browser without JavaScript sees and uses them."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, timedelta
from html import unescape
from typing import Any
from urllib.parse import urlencode

import pytest
from sqlalchemy import event

from example_app import books as ledger_books
from example_app import chart
from example_app.models import Account, Statement, Transfer
from tests.example.support import Books


@pytest.fixture(params=["sqlite", "asyncpg"])
def driver(request: pytest.FixtureRequest) -> Any:
    """Two will do: one blocks, and one is bridged."""
    return request.param


@pytest.fixture
def visit(fetch: Any) -> Any:
    """A person's browser: keeps cookies, and sends the hidden fields of the page's forms."""
    cookies: dict[str, str] = {}

    async def visit(path: str, typed: dict[str, Any] | None = None, page: str = "") -> Any:
        headers = {"Cookie": "; ".join(f"{name}={value}" for name, value in cookies.items())}
        headers["Accept"] = "text/html"
        body = None
        if typed is not None:
            form = page[page.index(f'action="{path}"') :]
            form = form[: form.index("</form>")]
            hidden = re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', form)
            body = urlencode({**dict(hidden), **typed})
            headers["Content-Type"] = "application/x-www-form-urlencoded"
        response = await fetch("GET" if typed is None else "POST", path, body, headers)
        for cookie in response.headers.get_list("Set-Cookie"):
            assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
            name, _, value = cookie.partition(";")[0].partition("=")
            cookies[name] = value
        response.page = response.body.decode()
        return response

    return visit


def alert(page: str) -> str:
    found = re.search(r'role="alert"[^>]*>([^<]*)<', page)
    return unescape(found[1]) if found else ""


@pytest.mark.gen_test
async def test_the_page_shows_accounts_and_transfers(books: Books, visit: Any) -> None:
    ada = Account(owner="<script>Ada", currency="EUR", balance=123456)
    bob = Account(owner="Bob", currency="EUR", balance=0)
    await books.add(ada, bob, Transfer(source=ada, target=bob, amount=5, memo="<b>&"))
    response = await visit("/")
    assert response.headers["Content-Type"].startswith("text/html")
    assert "&lt;script&gt;Ada" in response.page and "<script>" not in response.page
    for shown in ("1,234.56 EUR", "0.05 EUR", "&lt;b&gt;&amp;"):
        assert shown in response.page


@pytest.mark.gen_test
async def test_the_page_of_an_empty_ledger(visit: Any) -> None:
    assert (await visit("/")).page.count("None yet") == 2


@pytest.mark.gen_test
async def test_a_form_opens_an_account_and_another_moves_money(books: Books, visit: Any) -> None:
    page = (await visit("/")).page
    for owner, balance in ("Ada", "100"), ("Bob", ""):
        typed = {"owner": owner, "currency": "eur", "balance": balance, "limit": "-1"}
        opened = await visit("/open", typed, page)
        assert opened.code == 303
        page = (await visit(opened.headers["Location"])).page
        assert "is open." in page
    first, second = sorted(set(map(int, re.findall(r'href="/ledger/(\d+)"', page))))
    order = {"from": first, "to": second, "amount": "12.5", "memo": "lunch"}
    paid = await visit("/pay", order, page)
    assert paid.code == 303
    assert "is done." in (await visit(paid.headers["Location"])).page
    assert await books.balances() == [8750, 1250]
    # The same form again, by "back" or by pressing twice: it has the same key.
    again = await visit("/pay", order, page)
    assert again.headers["Location"] == paid.headers["Location"]
    assert await books.balances() == [8750, 1250]


@pytest.mark.gen_test
async def test_a_form_from_elsewhere_is_refused(
    books: Books, visit: Any, fetch: Any, expected_log: list[str]
) -> None:
    """Another site's page can send a form, and cannot know the token."""
    first, second = await books.open(100, 0)
    page = (await visit("/")).page
    theirs = re.search(r'name="_xsrf" value="([^"]*)"', (await fetch("GET", "/")).body.decode())
    assert theirs is not None
    pay = {"from": first, "to": second, "amount": "1"}
    opening = {"owner": "Eve", "currency": "EUR"}
    for path, typed in ("/pay", pay), ("/open", opening):
        expected_log.append("XSRF cookie does not match POST argument")
        assert (await visit(path, {**typed, "_xsrf": theirs[1]}, page)).code == 403
        expected_log.append("'_xsrf' argument missing from POST")
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        assert (await fetch("POST", path, urlencode(typed), form)).code == 403
    assert await books.rows() == (2, 0)


@pytest.mark.parametrize(
    ("typed", "code", "said"),
    [
        ({"amount": "1.01"}, 422, "insufficient funds"),
        ({"amount": "x"}, 400, "Amount must be a number"),
        ({"amount": "0"}, 400, "more than zero"),
        ({"amount": "-1"}, 400, "more than zero"),
        ({"to": ""}, 400, "to must be an integer"),
        ({"from": "x"}, 400, "from must be an integer"),
        ({"memo": "x" * 201}, 400, "at most 200 characters"),
        ({"key": "two words"}, 400, "Idempotency-Key"),
        ({"to": "999999"}, 422, "There is no account 999999."),
    ],
)
@pytest.mark.gen_test
async def test_a_refused_transfer_is_shown_with_what_was_typed(
    books: Books, visit: Any, typed: dict[str, str], code: int, said: str
) -> None:
    first, second = await books.open(100, 0)
    page = (await visit("/")).page
    good = {"from": first, "to": second, "amount": "1", "memo": 'a "memo"'}
    response = await visit("/pay", {**good, **typed}, page)
    assert response.code == code
    assert said in alert(response.page)
    assert f'value="{typed.get("amount", "1")}"' in response.page
    assert await books.balances() == [100, 0]
    # Corrected, and sent again from the page with the error.
    assert (await visit("/pay", good, response.page)).code == 303
    assert await books.balances() == [0, 100]


@pytest.mark.parametrize(
    ("typed", "code", "said"),
    [
        ({"owner": " "}, 400, "Owner must not be blank."),
        ({"currency": "EURO"}, 400, "three letters"),
        ({"balance": "ten"}, 400, "Balance must be a number"),
        ({"balance": "-1"}, 400, "Balance must not be below zero."),
        ({"limit": "20"}, 422, "balance must not be below limit."),
        ({"colour": "red"}, 400, ""),
    ],
)
@pytest.mark.gen_test
async def test_a_refused_account_is_shown_with_what_was_typed(
    books: Books, visit: Any, typed: dict[str, str], code: int, said: str
) -> None:
    page = (await visit("/")).page
    good = {"owner": "Ada", "currency": "EUR", "balance": "10"}
    response = await visit("/open", {**good, **typed}, page)
    assert response.code == code
    assert said in alert(response.page)
    assert await books.rows() == (0, 0)


@pytest.mark.gen_test
async def test_an_account_has_a_page_with_its_statements(books: Books, visit: Any) -> None:
    """Which come by lazy relationships, in the template."""
    first, second = await books.open(100, 0)
    await books.add(
        Transfer(from_id=first, to_id=second, amount=30, memo="lunch"),
        Statement(account_id=first, day=date(2026, 3, 1), received=0, paid=777, closing=4242),
    )
    page = (await visit(f"/ledger/{first}")).page
    for shown in ("<svg", "lunch", "\N{MINUS SIGN}0.30 EUR", "1 Mar", "7.77", "42.42"):
        assert shown in page
    assert "+0.30 EUR" in (await visit(f"/ledger/{second}")).page
    assert (await visit("/ledger/999999")).code == 404


@pytest.mark.gen_test
async def test_a_hundred_accounts_are_not_a_hundred_queries(books: Books, visit: Any) -> None:
    ids = await books.open(*[100] * 40)
    await books.add(
        *(Transfer(from_id=ids[n], to_id=ids[n + 1], amount=1, memo="") for n in range(39))
    )
    statements: list[str] = []
    reader: Any = books.db.reader
    engine = getattr(reader, "sync_engine", reader)
    event.listen(engine, "before_cursor_execute", lambda *call: statements.append(call[2]))
    await visit("/")
    assert len(statements) <= 4, statements


def test_a_chart_is_the_past_of_a_balance() -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    account = Account(id=1, balance=70, opening=100, opened_at=start)
    latest_first = [
        Transfer(from_id=2, to_id=1, amount=20, created_at=start + timedelta(hours=2)),
        Transfer(from_id=1, to_id=2, amount=50, created_at=start + timedelta(hours=1)),
        Transfer(from_id=3, to_id=2, amount=50, created_at=start),
    ]
    points = ledger_books.past_balances(account, latest_first)
    assert [balance for _, balance in points] == [100, 50, 70]
    assert [at.hour for at, _ in points] == [0, 1, 2]
    drawn = chart.draw(points, 100, 100, start + timedelta(hours=4))
    assert drawn.line == "M0.0,0.0H29.2V50.0H58.3V30.0H100"
    assert (drawn.lowest, drawn.highest, drawn.zero) == (0, 100, None)


@pytest.mark.parametrize("balance", [0, 5, -5, 2**63 - 1, -(2**63)])
def test_a_chart_of_nothing_but_a_balance(balance: int) -> None:
    now = datetime.now(UTC)
    drawn = chart.draw([(now, balance)], 100, 100, now)
    assert drawn.line.startswith("M0.0,") and drawn.line.endswith("H100")
