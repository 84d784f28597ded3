"""Amounts of money, as people write and read them."""

from __future__ import annotations

import pytest

from example_app.errors import Refused
from example_app.money import MAX_INTEGER, minor_units, money


@pytest.mark.parametrize(
    ("amount", "currency", "shown"),
    [
        (0, "EUR", "0.00 EUR"),
        (5, "EUR", "0.05 EUR"),
        (123456, "JPY", "123,456 JPY"),
        (1, "KWD", "0.001 KWD"),
        (MAX_INTEGER, "USD", "92,233,720,368,547,758.07 USD"),
    ],
)
def test_money_for_people(amount: int, currency: str, shown: str) -> None:
    assert money(amount, currency) == shown


@pytest.mark.parametrize(
    ("typed", "currency", "amount"),
    [
        ("12.50", "EUR", 1250),
        ("12.5", "EUR", 1250),
        ("12.", "EUR", 1200),
        (" 12 ", "EUR", 1200),
        ("1,234.56", "EUR", 123456),
        ("-5", "EUR", -500),
        ("\N{MINUS SIGN}5", "EUR", -500),
        ("12", "JPY", 12),
        ("0.001", "KWD", 1),
        ("92233720368547758.07", "EUR", MAX_INTEGER),
    ],
)
def test_what_people_type(typed: str, currency: str, amount: int) -> None:
    assert minor_units(typed, currency, "Amount") == amount


@pytest.mark.parametrize(
    ("typed", "currency"),
    [
        ("", "EUR"),
        ("x", "EUR"),
        ("1.234", "EUR"),  # one thousand, or one? Not for us to guess
        ("12,50", "EUR"),
        ("1.5", "JPY"),
        ("1e3", "EUR"),
        ("NaN", "EUR"),
        ("\N{ARABIC-INDIC DIGIT THREE}", "EUR"),
        ("92233720368547758.08", "EUR"),
        ("9" * 5000, "EUR"),
    ],
)
def test_what_cannot_be_understood_is_refused(typed: str, currency: str) -> None:
    with pytest.raises(Refused) as refused:
        minor_units(typed, currency, "Amount")
    assert refused.value.status_code == 400
    assert refused.value.message.startswith("Amount ")
