"""The contestants, what they are asked, and the rounds in which it happens."""

import os
import random
import sys
from dataclasses import replace
from pathlib import Path

from claims import check
from figures import Figures
from growth import growth
from measure import LOAD_CORE, Contestant, Load, serving
from report import tables, write
from shares import shares, show

sys.path.insert(0, str(Path(__file__).parent / "contestants"))
import world

REFERENCE = Contestant("by hand, AsyncSession", "tornado_by_hand.py")
_NO_HOLD = ("/plain", "/db", "/queries", "/update", "/slow")
_READS = ("/db", "/queries", "/slow", "/hold")

CONTESTANTS = [
    Contestant("bare Tornado", "tornado_bare.py", paths=("/plain",)),
    Contestant("asyncpg, no ORM (the limit)", "tornado_asyncpg.py"),
    REFERENCE,
    Contestant(
        "by hand, answers before closing",
        "tornado_by_hand.py",
        ("--answer-first",),
        paths=("/slow",),
    ),
    Contestant("tornado_sa, bridge", "tornado_sa_plain.py"),
    Contestant(
        "tornado_sa, bridge, read-only", "tornado_sa_plain.py", ("--read-only",), paths=_READS
    ),
    Contestant("tornado_sa, AsyncSession", "tornado_sa_async.py"),
    Contestant(
        "tornado_sa, AsyncSession, r.-o.", "tornado_sa_async.py", ("--read-only",), paths=_READS
    ),
    Contestant("tornado_sa, Session", "tornado_sa_plain.py", ("--sync",)),
    Contestant(
        "tornado_sa, Session, read-only",
        "tornado_sa_plain.py",
        ("--sync", "--read-only"),
        paths=_READS,
    ),
    Contestant("by hand, Session", "tornado_by_hand_sync.py", paths=_NO_HOLD),
    Contestant("tornado-sqlalchemy", "tornado_sqlalchemy_mixin.py", paths=_NO_HOLD),
    Contestant("Starlette, by hand", "starlette_by_hand.py"),
    Contestant("FastAPI, Depends", "fastapi_depends.py"),
    Contestant("Litestar, advanced-alchemy", "litestar_advanced_alchemy.py"),
    Contestant("Flask-SQLAlchemy, gunicorn", "flask_sqlalchemy_gunicorn.py", loops=("asyncio",)),
]

LOADS = [
    Load("/plain", 32),
    Load("/db", 32),
    Load("/queries", 32, "?n=10"),
    Load("/update", 32),
    Load("/db", 64),
    Load("/update", 64),
    Load("/slow", 64, watched=True),
    Load("/hold", 16, watched=True),
]


def run(options):
    """Measure, print, and return the exit code."""
    world.create(options.database)
    try:
        if options.profile:
            return profile(options)
        if options.growth:
            return growth(options.database, options.growth)
        return compare(options)
    finally:
        world.drop(options.database)


def profile(options):
    """Print whose code takes the time of /db."""
    load = Load("/db", 32)
    for contestant in chosen(CONTESTANTS, options.only or ["tornado_sa, bridge, read-only"]):
        with started(contestant, "asyncio", options) as server:
            server.measure(load, 1)
            cpu = server.measure(load, 5).cpu
            show(f"{load.path}, {contestant.name}", shares(server, load, 60), cpu)
    return 0


def started(contestant, loop, options):
    """Start ``contestant`` as the command line has it."""
    more = ("--default-gc",) if options.default_gc else ()
    contestant = replace(contestant, options=contestant.options + more)
    return serving(contestant, loop, options.database)


def chosen(those, names):
    """Those with one of ``names``; all of them if no names are given."""
    unknown = set(names or ()) - {one.name for one in those}
    if unknown:
        known = "; ".join(one.name for one in those)
        raise SystemExit(f"There is no {', '.join(map(repr, sorted(unknown)))}. There are: {known}")
    return [one for one in those if not names or one.name in names]


def compare(options):
    os.sched_setaffinity(0, {LOAD_CORE})
    loads = chosen(LOADS, options.load)
    wanted = chosen(CONTESTANTS, options.only)
    figures = Figures([one.name for one in CONTESTANTS], loads)
    for loop in options.loop:
        for number in range(options.rounds):
            print(f"{loop}, round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
            with started(REFERENCE, loop, options) as reference:  # anew: processes have their luck
                warm_up(reference, loads)
                for contestant in random.sample(wanted, len(wanted)):
                    if loop in contestant.loops:
                        beside(reference, contestant, loop, loads, options, figures)
    print(tables(figures))
    if options.write:
        write(figures)
    return check(figures, options.smoke)


def beside(reference, contestant, loop, loads, options, figures):
    """Ask the reference and ``contestant`` in turn."""
    asked = [one for one in loads if one.path in contestant.paths]
    with started(contestant, loop, options) as server:
        warm_up(server, asked)
        for load in asked:
            there = reference.measure(load, options.seconds)
            here = server.measure(load, options.seconds)
            figures.add(contestant.name, loop, load.name, here, there)
        figures.add_memory(contestant.name, loop, server.memory())


def warm_up(server, loads):
    """Let it open its connections and fill its caches."""
    for load in {one.path: one for one in loads if not one.watched}.values():
        server.measure(load, 1)
