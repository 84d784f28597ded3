"""What was measured, and what it is in relation to the reference."""

from collections import defaultdict
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Spread:
    median: float
    least: float
    most: float

    def __str__(self):
        return f"{self.median:.2f} ({self.least:.2f}-{self.most:.2f})"


class Figures:
    """The results of all rounds, by contestant, event loop and load; each with the reference's."""

    def __init__(self, names, loads):
        self.names = names
        self.loads = loads
        self._results = defaultdict(list)
        self._memory = defaultdict(list)

    def add(self, name, loop, load, result, of_the_reference):
        self._results[name, loop, load].append((result, of_the_reference))

    def add_memory(self, name, loop, mebibytes):
        self._memory[name, loop].append(mebibytes)

    def has(self, name, loop, load):
        return (name, loop, load) in self._results

    def loops(self):
        return sorted({loop for _, loop, _ in self._results})

    def rounds(self):
        return max(map(len, self._results.values()))

    def all(self, name, loop, load, figure):
        return [getattr(one, figure) for one, _ in self._results.get((name, loop, load), ())]

    def median(self, name, loop, load, figure):
        return median(self.all(name, loop, load, figure))

    def memory(self, name, loop):
        return median(self._memory[name, loop])

    def ratio(self, name, loop, load, figure="rate", to=None):
        """To the reference beside it; or to what the contestant ``to`` was in the same round."""
        ratios = self._ratios(name, loop, load, figure)
        if to is not None:
            others = self._ratios(to, loop, load, figure)
            ratios = [one / other for one, other in zip(ratios, others, strict=True)]
        return Spread(median(ratios), min(ratios), max(ratios))

    def _ratios(self, name, loop, load, figure):
        return [
            getattr(result, figure) / getattr(reference, figure)
            for result, reference in self._results[name, loop, load]
        ]

    def tail(self, name, loop, load):
        """By how much the 99th percentile is larger than the median."""
        tails = [result.p99 / result.p50 for result, _ in self._results[name, loop, load]]
        return Spread(median(tails), min(tails), max(tails))
