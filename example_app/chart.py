"""Balances as lines: SVG, drawn on the server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

Points = Sequence[tuple[datetime, int]]


@dataclass(frozen=True)
class Chart:
    """A line of steps: a balance stays what it is until the next transfer."""

    width: int
    height: int
    line: str
    area: str
    zero: float | None
    lowest: int
    highest: int
    since: datetime


def draw(points: Points, width: int, height: int, now: datetime) -> Chart:
    """The chart of ``points``, in order of time and not empty, up to ``now``."""
    since = points[0][0]
    # Many transfers in a moment would hide behind each other on an axis of time alone: half of
    # the way goes by time, half by count.
    span = max((now - since).total_seconds(), 1e-6)
    balances = [balance for _, balance in points]
    lowest, highest = min([*balances, 0]), max([*balances, 0])
    scale = height / (highest - lowest) if highest > lowest else 0.0

    def x(index: int, at: datetime) -> float:
        by_time = min(max((at - since).total_seconds() / span, 0.0), 1.0)
        return round(width * (by_time + index / len(points)) / 2, 1)

    def y(balance: int) -> float:
        return round(height - (balance - lowest) * scale, 1) if scale else height / 2

    steps = [f"M{x(0, since)},{y(balances[0])}"]
    for index, (at, balance) in enumerate(points[1:], start=1):
        steps.append(f"H{x(index, at)}V{y(balance)}")
    line = "".join(steps) + f"H{width}"
    ground = y(0)
    return Chart(
        width=width,
        height=height,
        line=line,
        area=f"{line}V{ground}H{x(0, since)}Z",
        zero=ground if lowest < 0 else None,
        lowest=lowest,
        highest=highest,
        since=since,
    )
