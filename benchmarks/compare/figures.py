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
    """The results of all rounds, by contestant, event loop and load."""

    def __init__(self, reference, names, loads):
        self.reference = reference
        self.names = names
        self.loads = loads
        self._results = defaultdict(dict)  # of each: {round: Result}
        self._memory = defaultdict(list)

    def add(self, round_, name, loop, load, result):
        self._results[name, loop, load][round_] = result

    def add_memory(self, name, loop, mebibytes):
        self._memory[name, loop].append(mebibytes)

    def has(self, name, loop, load):
        return (name, loop, load) in self._results

    def loops(self):
        return sorted({loop for _, loop, _ in self._results})

    def median(self, name, loop, load, figure):
        results = self._results[name, loop, load].values()
        return median(getattr(result, figure) for result in results)

    def worst(self, name, loop, load, figure):
        return max(getattr(one, figure) for one in self._results[name, loop, load].values())

    def memory(self, name, loop):
        return median(self._memory[name, loop])

    def ratio(self, name, loop, load, figure="rate", to=None):
        """To the reference, or to the contestant ``to``, of the same round, loop and load."""
        others = self._results[to or self.reference, loop, load]
        ratios = [
            getattr(result, figure) / getattr(others[round_], figure)
            for round_, result in self._results[name, loop, load].items()
        ]
        return Spread(median(ratios), min(ratios), max(ratios))

    def tail(self, name, loop, load):
        """By how much the 99th percentile is larger than the median."""
        tails = [one.p99 / one.p50 for one in self._results[name, loop, load].values()]
        return Spread(median(tails), min(tails), max(tails))
