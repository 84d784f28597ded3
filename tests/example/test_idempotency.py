"""A repeated ``Idempotency-Key``: the first answer again, and nothing moves."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.example.support import Books

KEY = {"Idempotency-Key": "b5d1-one"}


def told(response: Any) -> tuple[Any, ...]:
    """All of an answer that a client can tell from another one."""
    headers = response.headers
    return response.code, response.body, headers.get("Location"), headers["Content-Type"]


@pytest.mark.gen_test
async def test_a_repeated_request_gets_the_first_answer(books: Books, fetch: Any) -> None:
    first, second = await books.open(100, 0)
    order = {"from": first, "to": second, "amount": 30, "memo": "Miete für März 🦊"}
    answers = [told(await fetch("POST", "/transfers", order, KEY)) for _ in range(3)]
    assert answers[0][0] == 201 and answers[0][2].startswith("/transfers/")
    assert answers[0] == answers[1] == answers[2]
    # The same request, written differently.
    reordered = '{"memo":"Miete f\\u00fcr M\\u00e4rz 🦊","amount":30,"to":%d,"from":%d}'
    assert told(await fetch("POST", "/transfers", reordered % (second, first), KEY)) == answers[0]
    assert await books.balances() == [70, 30]
    assert await books.rows() == (2, 1)


@pytest.mark.usefixtures("concurrent")
@pytest.mark.gen_test
async def test_repeated_at_the_same_time_it_moves_money_once(books: Books, fetch: Any) -> None:
    first, second = await books.open(100, 0)
    order = {"from": first, "to": second, "amount": 30}
    answers = await asyncio.gather(*(fetch("POST", "/transfers", order, KEY) for _ in range(8)))
    assert len({told(answer) for answer in answers}) == 1
    assert answers[0].code == 201
    assert await books.balances() == [70, 30]
    assert await books.rows() == (2, 1)


@pytest.mark.gen_test
async def test_a_refusal_is_an_answer_too(books: Books, fetch: Any) -> None:
    """What was refused stays refused, although there is money by now. With a new key it is not."""
    first, second = await books.open(10, 100)
    order = {"from": first, "to": second, "amount": 30}
    refused = told(await fetch("POST", "/transfers", order, KEY))
    assert refused[0] == 422 and b"insufficient funds" in refused[1]
    await fetch("POST", "/transfers", {"from": second, "to": first, "amount": 50})
    assert told(await fetch("POST", "/transfers", order, KEY)) == refused
    assert await books.balances() == [60, 50]
    again = await fetch("POST", "/transfers", order, {"Idempotency-Key": "b5d1-two"})
    assert again.code == 201
    assert await books.balances() == [30, 80]
    await books.check()


@pytest.mark.parametrize("change", [{"amount": 31}, {"memo": "other"}, {"to": 0}, {"from": 0}])
@pytest.mark.gen_test
async def test_the_key_of_another_request_is_a_422(
    books: Books, fetch: Any, change: dict[str, Any]
) -> None:
    first, second, third = await books.open(100, 100, 100)
    order = {"from": first, "to": second, "amount": 30, "memo": ""}
    assert (await fetch("POST", "/transfers", order, KEY)).code == 201
    other = {**order, **{name: value or third for name, value in change.items()}}
    response = await fetch("POST", "/transfers", other, KEY)
    assert response.code == 422 and b"another request" in response.body
    assert await books.balances() == [70, 130, 100]
    assert (await fetch("POST", "/transfers", order, KEY)).code == 201


@pytest.mark.usefixtures("concurrent")
@pytest.mark.gen_test
async def test_of_two_requests_with_one_key_at_the_same_time_one_is_done(
    books: Books, fetch: Any
) -> None:
    first, second, third = await books.open(100, 100, 100)
    orders = [{"from": first, "to": target, "amount": 10} for target in (second, third)] * 3
    answers = await asyncio.gather(*(fetch("POST", "/transfers", order, KEY) for order in orders))
    assert sorted(answer.code for answer in answers) == [201] * 3 + [422] * 3
    assert await books.rows() == (3, 1)


@pytest.mark.gen_test
async def test_a_request_that_cannot_be_understood_takes_no_key(books: Books, fetch: Any) -> None:
    first, second = await books.open(100, 0)
    order: dict[str, Any] = {"from": first, "to": second, "amount": 30}
    assert (await fetch("POST", "/transfers", {**order, "amount": "30"}, KEY)).code == 400
    assert (await fetch("POST", "/transfers", order, KEY)).code == 201


@pytest.mark.gen_test
async def test_keys_differ_in_every_character(books: Books, fetch: Any) -> None:
    first, second = await books.open(100, 0)
    order = {"from": first, "to": second, "amount": 1}
    for key in ("a", "A", "a!", "a" * 200):
        assert (await fetch("POST", "/transfers", order, {"Idempotency-Key": key})).code == 201
    assert await books.balances() == [96, 4]


@pytest.mark.gen_test
async def test_a_bad_key_is_refused(books: Books, fetch: Any) -> None:
    first, second = await books.open(100, 0)
    order = {"from": first, "to": second, "amount": 1}
    for key in ("", "two words", "x" * 201, "schlüssel", "tab\tbed"):
        response = await fetch("POST", "/transfers", order, {"Idempotency-Key": key})
        assert response.code == 400 and b"Idempotency-Key must be" in response.body, key
    assert await books.rows() == (2, 0)
