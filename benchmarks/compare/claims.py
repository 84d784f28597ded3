"""What the comparison is to show, held against what was measured."""

BRIDGE = "tornado_sa, bridge"
READ_ONLY = "tornado_sa, bridge, read-only"
ASYNC = "tornado_sa, AsyncSession"
LONGEST_STALL = 250.0  # milliseconds; beside a Session that blocks the loop it is 2,000 and more


def claims(figures):
    """Each claim: what it says, what was found, whether it holds. Only of what was measured."""
    for loop in figures.loops():
        yield from _ratios(figures, loop)
        for name in (BRIDGE, READ_ONLY, ASYNC):
            for load in ("/db 64", "/update 64"):
                if figures.has(name, loop, load):
                    tail = figures.tail(name, loop, load)
                    yield f"{name}, {load}, {loop}: p99 at most 1.6 x p50", tail, tail.median <= 1.6
        for name in (BRIDGE, READ_ONLY, ASYNC):
            yield from _waiting(figures, loop, name)
    if figures.has(READ_ONLY, "uvloop", "/db 32"):
        ours = figures.median(READ_ONLY, "uvloop", "/db 32", "rate")
        others = {
            name: figures.median(name, loop, "/db 32", "rate")
            for name in figures.names
            for loop in figures.loops()
            if "no ORM" not in name and not name.startswith("tornado_sa,")
            if figures.has(name, loop, "/db 32")
        }
        best = max(others, key=others.get)
        found = f"{ours:.0f} requests/s, {best} {others[best]:.0f}"
        yield "ahead of all who use SQLAlchemy, on /db with uvloop", found, ours > others[best]


def _ratios(figures, loop):
    wanted = [
        (READ_ONLY, "/db 32", 1.30 if loop == "asyncio" else 1.40, None),
        (BRIDGE, "/queries 32", 1.15, None),
        (BRIDGE, "/update 32", 1.20, None),
    ]
    wanted += [(name, "/plain 32", 0.97, "bare Tornado") for name in (BRIDGE, ASYNC)]
    wanted += [(ASYNC, f"/{path} 32", 1.00, None) for path in ("plain", "db", "queries", "update")]
    for name, load, least, to in wanted:
        if figures.has(name, loop, load) and (to is None or figures.has(to, loop, load)):
            ratio = figures.ratio(name, loop, load, to=to)
            yield (
                f"{name}, {load}, {loop}: at least {least:.2f} of {to or 'the reference'}",
                ratio,
                (ratio.median >= least),
            )


def _waiting(figures, loop, name):
    for load in ("/slow 64", "/hold 16"):
        if figures.has(name, loop, load):
            gap = figures.median(name, loop, load, "gap")
            what = f"{name}, {load}, {loop}: /plain is answered within {LONGEST_STALL:.0f} ms"
            yield what, f"{gap:.0f} ms", gap <= LONGEST_STALL
            ratio = figures.ratio(name, loop, load)
            yield f"{name}, {load}, {loop}: as fast as the reference", ratio, ratio.median >= 0.97


def no_failures(figures):
    for name in figures.names:
        if name.startswith("tornado_sa"):
            failed = [
                count
                for loop in figures.loops()
                for load in figures.loads
                for count in figures.all(name, loop, load.name, "failed")
            ]
            if failed:
                yield f"{name}: no request fails", f"{sum(failed)} did", not any(failed)


def check(figures, smoke):
    """Print the claims; return 1 if one does not hold, else 0."""
    missed = 0
    for claim, found, holds in [*no_failures(figures), *([] if smoke else claims(figures))]:
        print(f"{'ok    ' if holds else 'MISSED'}  {claim}: {found}")
        missed += not holds
    return int(missed > 0)
