"""Amounts of money: integers in the currency's minor unit, and how people write them."""

from __future__ import annotations

import re
from decimal import Decimal

from example_app.errors import Refused

#: The largest id, amount and balance: what a BIGINT column holds.
MAX_INTEGER = 2**63 - 1

# ISO 4217: how many digits the minor unit takes, where it is not two.
_MINOR_DIGITS = dict.fromkeys(
    "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF".split(), 0
) | dict.fromkeys("BHD IQD JOD KWD LYD OMR TND".split(), 3)


def money(amount: int, currency: str) -> str:
    """An amount for people to read: ``money(123456, "EUR")`` is ``"1,234.56 EUR"``."""
    digits = _MINOR_DIGITS.get(currency, 2)
    shown = f"{Decimal(amount).scaleb(-digits):,.{digits}f} {currency}"
    return shown.replace("-", "\N{MINUS SIGN}")


def minor_units(text: str, currency: str, what: str) -> int:
    """What a person typed: ``minor_units("1,234.56", "EUR", ...)`` is ``123456``.

    Raises `.Refused` with status 400, naming ``what`` was typed wrongly.
    """
    digits = _MINOR_DIGITS.get(currency, 2)
    typed = text.strip().replace("\N{MINUS SIGN}", "-")
    found = re.fullmatch(r"(-?)([0-9]{1,30}|[0-9]{1,3}(?:,[0-9]{3})*)(?:\.([0-9]*))?", typed)
    # Never rounded: nobody's money is what somebody else thinks they meant.
    if found is None or len(found[3] or "") > digits:
        places = f"with at most {digits} digits after the point" if digits else "in whole units"
        raise Refused(400, f"{what} must be a number {places}, such as {_example(digits)}.")
    value = int(found[2].replace(",", "") + (found[3] or "").ljust(digits, "0"))
    value = -value if found[1] else value
    if abs(value) > MAX_INTEGER:
        raise Refused(400, f"{what} is more than a ledger can hold.")
    return value


def _example(digits: int) -> str:
    return f"{Decimal(12345).scaleb(-digits):f}"
