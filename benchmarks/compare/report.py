"""Tables, as reStructuredText, and the plot."""

from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "performance.rst"
PLOT = DOCS / "performance.svg"
# How the bars of each event loop are drawn: where in their row, and how dense.
LOOPS = (("asyncio", 0.2, 1.0), ("uvloop", -0.2, 0.55))
BEGIN, END = ".. measured\n", ".. end of measured\n"


def tables(figures):
    """All tables, as text."""
    return "\n".join(text for loop in figures.loops() for text in _tables(figures, loop))


def _tables(figures, loop):
    asked = [one for one in figures.loads if not one.watched]
    rates = [one.name for one in asked if one.clients == 32]
    tails = [one.name for one in asked if one.clients == 64]
    watched = [one.name for one in figures.loads if one.watched]

    yield from _table(
        f"Requests per second, {loop}: ratio to the reference, median (least-most)",
        figures,
        loop,
        rates,
        {name: lambda who, load=name: figures.ratio(who, loop, load) for name in rates},
    )
    yield from _table(
        f"Server CPU per request, {loop}: ratio to the reference, median (least-most)",
        figures,
        loop,
        rates,
        {name: lambda who, load=name: figures.ratio(who, loop, load, "cpu") for name in rates},
    )
    yield from _table(
        f"Tail, {loop}: 64 clients, pool of 20: p50 / p99 in ms, p99 to p50; memory in MiB",
        figures,
        loop,
        tails,
        {
            **{
                name: lambda who, load=name: (
                    f"{figures.median(who, loop, load, 'p50'):.0f} /"
                    f" {figures.median(who, loop, load, 'p99'):.0f},"
                    f" {figures.tail(who, loop, load)}"
                )
                for name in tails
            },
            "memory": lambda who, load=None: f"{figures.memory(who, loop):.0f}",
        },
    )
    yield from _table(
        f"Waiting, {loop}: requests/s, failed ones, longest answer of /plain meanwhile (ms)",
        figures,
        loop,
        watched,
        {
            name: lambda who, load=name: (
                f"{figures.median(who, loop, load, 'rate'):.0f},"
                f" {max(figures.all(who, loop, load, 'failed'))} failed,"
                f" {figures.median(who, loop, load, 'gap'):.0f}"
            )
            for name in watched
        },
    )


def _table(title, figures, loop, loads, columns):
    """A table of those who have at least one of ``loads``; empty cells where they have not."""

    def cells(who):
        yield who
        for title, cell in columns.items():
            measured = title not in loads or figures.has(who, loop, title)
            yield str(cell(who)) if measured else "\\-"

    found = [who for who in figures.names if any(figures.has(who, loop, load) for load in loads)]
    rows = [["contestant", *columns], *(list(cells(who)) for who in found)]
    if len(rows) == 1:
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = "  ".join("=" * width for width in widths)
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    yield "\n".join([title, "", rule, lines[0], rule, *lines[1:], rule, ""])


def write(figures):
    """Put the tables into the page, and the plot beside it."""
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    rounds = f"Rounds: {figures.rounds()}."
    PAGE.write_text(f"{before}{BEGIN}\n{rounds}\n\n{tables(figures)}\n{END}{after}")
    _plot(figures)


def _plot(figures):
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "tornado_sa"  # the same file for the same figures
    from matplotlib import patches, pyplot

    loads = [one.name for one in figures.loads if one.clients == 32]
    drawn, [axes] = pyplot.subplots(
        1, len(loads), figsize=(13, 5.2), sharey=True, layout="constrained", squeeze=False
    )
    names = [
        name
        for name in reversed(figures.names)
        if "limit" not in name
        and any(figures.has(name, loop, load) for loop, *_ in LOOPS for load in loads)
    ]
    for load, axis in zip(loads, axes, strict=True):
        for loop, shift, alpha in LOOPS:
            for row, name in enumerate(names):
                if not figures.has(name, loop, load):
                    continue
                ratio = figures.ratio(name, loop, load)
                axis.barh(
                    row + shift,
                    ratio.median,
                    height=0.4,
                    color="#2468b4" if name.startswith("tornado_sa") else "#8a8a8a",
                    alpha=alpha,
                    xerr=[[ratio.median - ratio.least], [ratio.most - ratio.median]],
                    error_kw={"elinewidth": 0.8},
                )
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(load.split()[0])
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), names)
    loops = [patches.Patch(color="#2468b4", alpha=alpha, label=loop) for loop, _, alpha in LOOPS]
    drawn.legend(handles=loops, loc="outside lower right", ncols=2, title="event loop")
    drawn.supxlabel(
        "requests per second, as a ratio to the reference beside it; median, least and most"
    )
    drawn.savefig(PLOT, metadata={"Date": None})
