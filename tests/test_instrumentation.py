"""OpenTelemetry, a debugger, tracers and stacks: a bridged verb looks like an ordinary one.

Every test expects of the bridge what it expects of a `Database`, to the line and to the span, but
for the last ones, which say where the greenlet shows.
"""

from __future__ import annotations

import asyncio
import inspect
import io
import re
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pdb import Pdb
from types import CodeType, FrameType
from typing import Any

import pytest
from greenlet import getcurrent
from sqlalchemy import select, text

from tests.support import BRIDGED, SYNC, Flavour, Note, Reply, missing, only, until
from tests.test_tasks import SLOW

bridged = only(*BRIDGED)
ordinary_and_bridged = only(*SYNC, *BRIDGED)
both_kinds = pytest.mark.parametrize("method", ["GET", "POST"], ids=["def", "async def"])


@pytest.fixture
def two_replies(flavour: Flavour, io_loop: Any) -> None:
    rows = [Note(id=1, text="one"), Reply(note_id=1), Reply(note_id=1)]
    io_loop.run_sync(lambda: flavour.in_scope(lambda session: session.add_all(rows), commit=True))


# -- OpenTelemetry -------------------------------------------------------------


class Recorder:
    """What OpenTelemetry's instrumentation recorded."""

    def __init__(self, provider: Any, exporter: Any) -> None:
        self.tracer = provider.get_tracer("test")
        self.exporter = exporter

    async def traces(self) -> list[Any]:
        """Each a tree of ``(name, status, children)``, in the order of their beginnings."""
        await until(self.complete)  # an answer may arrive before the request is over
        below: dict[Any, list[Any]] = defaultdict(list)
        for span in sorted(self.exporter.get_finished_spans(), key=lambda span: span.start_time):
            below[span.parent and span.parent.span_id].append(span)

        def tree(span: Any) -> Any:
            # the name of a query ends with that of its database, where the driver tells it
            name = span.name.split()[0] if "db.statement" in span.attributes else span.name
            children = [tree(child) for child in below[span.context.span_id]]
            return name, span.status.status_code.name, children

        return [tree(span) for span in below[None]]

    def complete(self) -> bool:
        """True if every parent has ended, and every request of the client is a parent."""
        spans = self.exporter.get_finished_spans()
        parents = {span.parent.span_id for span in spans if span.parent}
        roots = {span.context.span_id for span in spans if not span.parent}
        return roots <= parents <= {span.context.span_id for span in spans}


@pytest.fixture
def recorder(flavour: Flavour) -> Iterator[Recorder]:
    try:
        from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor
        from opentelemetry.instrumentation.tornado import TornadoInstrumentor
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    except ImportError as error:
        missing("opentelemetry", error)
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    of_tornado: Any = TornadoInstrumentor  # untyped
    of_tornado, of_sqlalchemy = of_tornado(), SQLAlchemyInstrumentor()
    of_tornado.instrument(tracer_provider=provider)
    # 0.66b1 works with SQLAlchemy 2.1, and refuses to unless its check is skipped.
    of_sqlalchemy.instrument(
        engine=flavour.sync_engine, tracer_provider=provider, skip_dep_check=True
    )
    yield Recorder(provider, exporter)
    of_sqlalchemy.uninstrument()
    of_tornado.uninstrument()


def sql(*statements: str) -> list[Any]:
    """The spans of statements that one session sends, after that of its connection."""
    return [("connect", "UNSET", []), *((name, "UNSET", []) for name in statements)]


def trace_of(method: str, *children: Any, status: str = "UNSET") -> Any:
    """The span of the client, that of the server, and what happened in there."""
    return method, status, [(f"{method} /.*", status, list(children))]


def instrumented(flavour: Flavour, tracer: Any) -> Any:
    class Handler(flavour.Handler):
        def prepare(self) -> None:
            self.session.execute(text("SELECT 1"))

        def get(self) -> None:
            note = self.session.get(Note, 1)
            self.write(str(len(note.replies)))

        async def post(self) -> None:
            note = self.session.get(Note, 1)
            with tracer.start_as_current_span("block"):
                await asyncio.sleep(0.001)
                self.write(str(len(note.replies)))
                note.text = self.request.path
                self.session.flush()
            self.session.rollback()

        def delete(self) -> None:
            self.session.execute(text("INSERT nonsense"))

    return Handler


POST = sql("SELECT", "SELECT"), ("block", "UNSET", sql("SELECT", "UPDATE")[1:])


@ordinary_and_bridged
@pytest.mark.usefixtures("two_replies")
@pytest.mark.gen_test
async def test_spans_of_queries(flavour: Flavour, serve: Any, recorder: Recorder) -> None:
    """Queries are children of their request, and of a block around an `await` and a lazy load."""
    fetch = serve(instrumented(flavour, recorder.tracer))
    assert (await fetch()).body == (await fetch(method="POST")).body == b"2"
    queries, block = POST
    assert await recorder.traces() == [
        trace_of("GET", *sql("SELECT", "SELECT", "SELECT")),
        trace_of("POST", *queries, block),
    ]


@ordinary_and_bridged
@pytest.mark.usefixtures("two_replies")
@pytest.mark.gen_test
async def test_spans_of_concurrent_requests(
    flavour: Flavour, serve: Any, recorder: Recorder
) -> None:
    """No query, and no block, ends up below another request."""
    fetch = serve(instrumented(flavour, recorder.tracer))
    if "sqlite" in flavour.name:  # one writer at a time
        answers = await asyncio.gather(*(fetch() for _ in range(10)))
        expected = trace_of("GET", *sql("SELECT", "SELECT", "SELECT"))
    else:
        answers = await asyncio.gather(*(fetch(method="POST") for _ in range(10)))
        queries, block = POST
        expected = trace_of("POST", *queries, block)
    assert [answer.body for answer in answers] == [b"2"] * 10
    assert await recorder.traces() == [expected] * 10


@ordinary_and_bridged
@pytest.mark.gen_test
async def test_spans_of_an_error(
    flavour: Flavour, serve: Any, recorder: Recorder, expected_log: list[str]
) -> None:
    expected_log.append("Uncaught exception DELETE /")
    fetch = serve(instrumented(flavour, recorder.tracer))
    assert (await fetch(method="DELETE")).code == 500
    children = [*sql("SELECT"), ("INSERT", "ERROR", [])]
    assert await recorder.traces() == [trace_of("DELETE", *children, status="ERROR")]


@ordinary_and_bridged
@pytest.mark.gen_test
async def test_spans_of_on_finish(flavour: Flavour, serve: Any, recorder: Recorder) -> None:
    """Wherever the bridge runs it, its queries belong to the request."""
    done: list[bool] = []

    class Handler(flavour.Handler):
        def get(self) -> None:
            self.write("answer")

        def on_finish(self) -> None:
            self.session.scalar(select(1))
            done.append(True)

    assert (await serve(Handler)()).code == 200
    await until(lambda: done)
    assert await recorder.traces() == [trace_of("GET", *sql("SELECT"))]


@ordinary_and_bridged
@pytest.mark.usefixtures("two_replies")
@pytest.mark.gen_test
async def test_spans_of_a_subclass(flavour: Flavour, serve: Any, recorder: Recorder) -> None:
    """One made when its base was instrumented already has one span per request, as its base."""
    base: Any = instrumented(flavour, recorder.tracer)
    assert (await serve(base, "/base")("/base")).code == 200

    class Handler(base):
        def get(self) -> None:
            super().get()

    assert (await serve(Handler, "/sub")("/sub")).body == b"2"
    spans = sql("SELECT", "SELECT", "SELECT")
    assert await recorder.traces() == [
        ("GET", "UNSET", [(f"GET {path}", "UNSET", spans)]) for path in ("/base", "/sub")
    ]


# -- pdb -----------------------------------------------------------------------


class Debugger(Pdb):
    """``pdb`` with somebody at the keyboard."""

    def __init__(self) -> None:
        self.output = io.StringIO()
        self.keyboard = io.StringIO()
        super().__init__(stdin=self.keyboard, stdout=self.output, nosigint=True, readrc=False)
        self.prompt = ""

    def type(self, *commands: str) -> None:
        self.keyboard.write("".join(f"{command}\n" for command in (*commands, "continue")))
        self.keyboard.seek(0)

    def shown(self) -> list[str]:
        """What it printed since the first breakpoint was set, without paths and numbers."""
        _, _, shown = self.output.getvalue().partition("Breakpoint ")
        noise = re.compile(r"[> ] \S+\(\d+\)|Deleted breakpoint")
        return [line for line in shown.splitlines()[1:] if not noise.match(line)]


@pytest.fixture
def debugger() -> Iterator[Debugger]:
    tracer = sys.gettrace()
    debugger = Debugger()
    yield debugger
    debugger.clear_all_breaks()
    sys.settrace(tracer)


SEVEN = text("SELECT 7")


def line_of(function: Callable[..., Any], code: str) -> int:
    lines, first = inspect.getsourcelines(function)
    return first + next(number for number, line in enumerate(lines) if code in line)


def debugged(flavour: Flavour, debugger: Debugger) -> Any:
    """A handler that stops in ``prepare()``; what is typed goes on from there."""

    def helper(handler: Any) -> int:
        found = handler.session.scalar(SEVEN)
        return int(found)

    class Handler(flavour.Handler):
        def prepare(self) -> None:
            if self.request.path == "/debugged":
                debugger.set_trace()

        def get(self) -> None:
            note = self.session.get(Note, 1)
            count = len(note.replies)
            count += helper(self)
            self.write(str(count))

        async def post(self) -> None:
            await asyncio.sleep(0.001)
            note = self.session.get(Note, 1)
            await asyncio.sleep(0.001)
            count = len(note.replies)
            count += helper(self)
            self.write(str(count))

    return Handler


def stop_at(verb: Callable[..., Any], code: str) -> tuple[str, str]:
    condition = 'self.request.path == "/debugged"'
    return f"tbreak {__file__}:{line_of(verb, code)}, {condition}", "continue"


@ordinary_and_bridged
@both_kinds
@pytest.mark.usefixtures("two_replies")
@pytest.mark.gen_test
async def test_pdb_next(flavour: Flavour, serve: Any, debugger: Debugger, method: str) -> None:
    """`next` goes over a query or an `await` to the next line, whatever other requests do.

    But ``pdb``'s `next` in a coroutine stops at the end of every other one, so no others then.
    """
    Handler = debugged(flavour, debugger)
    verb = Handler.get if method == "GET" else Handler.post
    debugger.type(*stop_at(verb, "note = "), *["next"] * (3 if method == "GET" else 4))
    fetch = serve(Handler)
    paths = ["/debugged", *(["/other"] * 3 if method == "GET" else [])]
    answers = await asyncio.gather(*(fetch(path, method=method) for path in paths))
    assert {answer.body for answer in answers} == {b"9"}
    assert debugger.shown() == [
        "-> note = self.session.get(Note, 1)",
        *(["-> await asyncio.sleep(0.001)"] if method == "POST" else []),
        "-> count = len(note.replies)",
        "-> count += helper(self)",
        "-> self.write(str(count))",
    ]


@ordinary_and_bridged
@both_kinds
@pytest.mark.usefixtures("two_replies")
@pytest.mark.gen_test
async def test_pdb_queries_at_the_prompt(
    flavour: Flavour, serve: Any, debugger: Debugger, method: str
) -> None:
    """A query and a lazy load work at the prompt, and stepping goes on after them."""
    Handler = debugged(flavour, debugger)
    verb = Handler.get if method == "GET" else Handler.post
    ask = ("p [reply.note.text for reply in note.replies]", "p self.session.scalar(select(5))")
    debugger.type(*stop_at(verb, "count = "), *ask, "next", *ask, "p count", "next")
    assert (await serve(Handler)("/debugged", method=method)).body == b"9"
    assert debugger.shown() == [
        "-> count = len(note.replies)",
        "['one', 'one']",
        "5",
        "-> count += helper(self)",
        "['one', 'one']",
        "5",
        "2",
        "-> self.write(str(count))",
    ]


@ordinary_and_bridged
@both_kinds
@pytest.mark.usefixtures("two_replies")
@pytest.mark.gen_test
async def test_pdb_step_up_and_return(
    flavour: Flavour, serve: Any, debugger: Debugger, method: str
) -> None:
    """`step`, `up`, `down`, `return` and `until` lead into a function that queries, and back."""
    Handler = debugged(flavour, debugger)
    verb = Handler.get if method == "GET" else Handler.post
    debugger.type(
        *(*stop_at(verb, "count += "), "step", "next", "up", "p count", "down"),
        *("next", "p found", "return", "next"),
    )
    assert (await serve(Handler)("/debugged", method=method)).body == b"9"
    assert debugger.shown() == [
        "-> count += helper(self)",
        "--Call--",
        "-> def helper(handler: Any) -> int:",
        "-> found = handler.session.scalar(SEVEN)",
        "-> count += helper(self)",
        "2",
        "-> found = handler.session.scalar(SEVEN)",
        "-> return int(found)",
        "7",
        "--Return--",
        "-> return int(found)",
        "-> self.write(str(count))",
    ]


@ordinary_and_bridged
@pytest.mark.usefixtures("two_replies")
@pytest.mark.gen_test
async def test_pdb_in_later_requests(flavour: Flavour, serve: Any, debugger: Debugger) -> None:
    """A breakpoint that was set in one request stops the next ones, at the same line."""
    Handler = debugged(flavour, debugger)
    stop = f"break {__file__}:{line_of(Handler.post, 'self.write')}"
    debugger.type(stop, *["continue", "p self.request.path"] * 3)
    fetch = serve(Handler)
    for path in ("/debugged", "/second", "/third"):
        assert (await fetch(path, method="POST")).body == b"9"
    line = "-> self.write(str(count))"
    assert debugger.shown() == [line, "'/debugged'", line, "'/second'", line, "'/third'"]


# -- tracers -------------------------------------------------------------------

Lines = list[tuple[str, int]]  # name of a function, number of the line in it


@contextmanager
def settrace(lines: Lines) -> Iterator[None]:
    """As coverage.py does it by default before Python 3.14."""

    def local(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            lines.append((frame.f_code.co_name, frame.f_lineno - frame.f_code.co_firstlineno))
        return local

    before = sys.gettrace()
    sys.settrace(lambda frame, *_: local if frame.f_code.co_filename == __file__ else None)
    yield
    sys.settrace(before)


@contextmanager
def monitoring(lines: Lines) -> Iterator[None]:
    """As coverage.py does it by default from Python 3.14."""
    monitor: Any = vars(sys)["monitoring"]  # unknown to type checkers of Python 3.11

    def line_begins(code: CodeType, line: int) -> None:
        if code.co_filename == __file__:
            lines.append((code.co_name, line - code.co_firstlineno))

    monitor.use_tool_id(4, "test")
    monitor.register_callback(4, monitor.events.LINE, line_begins)
    monitor.set_events(4, monitor.events.LINE)
    yield
    monitor.free_tool_id(4)


since_312 = pytest.mark.skipif(sys.version_info < (3, 12), reason="came with Python 3.12")


@ordinary_and_bridged
@pytest.mark.parametrize("tracer", [settrace, pytest.param(monitoring, marks=since_312)])
@pytest.mark.usefixtures("two_replies")
@pytest.mark.gen_test
async def test_traced_lines(flavour: Flavour, serve: Any, debugger: Debugger, tracer: Any) -> None:
    """Every line once, also those after a query, a lazy load and an `await`."""
    fetch = serve(debugged(flavour, debugger))
    lines: Lines = []
    with tracer(lines):
        assert (await fetch()).body == (await fetch(method="POST")).body == b"9"
    prepare, helper = [("prepare", 1)], [("helper", 1), ("helper", 2)]
    get, post = [[(verb, line) for line in range(1, 7)] for verb in ("get", "post")]
    names = {"prepare", "get", "post", "helper"}
    assert [line for line in lines if line[0] in names] == [
        *(*prepare, *get[:3], *helper, get[3]),
        *(*prepare, *post[:5], *helper, post[5]),
    ]


# -- stacks --------------------------------------------------------------------


def looking(flavour: Flavour, look: Callable[[], None]) -> Any:
    """A handler that calls ``look()`` after a query, below a verb."""

    class Handler(flavour.Handler):
        def below(self) -> None:
            self.session.scalar(select(1))
            look()

        def get(self) -> None:
            self.below()

        async def post(self) -> None:
            await asyncio.sleep(0.001)
            self.below()

    return Handler


@ordinary_and_bridged
@both_kinds
@pytest.mark.gen_test
async def test_stack_in_a_verb(flavour: Flavour, serve: Any, method: str) -> None:
    """The functions below the verb are there; the task's own stack leads from Tornado to it."""
    shown: list[list[str]] = []

    def look() -> None:
        printed = io.StringIO()
        traceback.print_stack(file=printed)
        shown.append(re.findall(r", in (\S+)", printed.getvalue()))
        shown.append([entry.function for entry in reversed(inspect.stack())])
        task: Any = asyncio.current_task()
        shown.append([frame.f_code.co_name for frame in task.get_stack()])

    assert (await serve(looking(flavour, look))(method=method)).code == 200
    printed, inspected, task = shown
    assert printed == inspected
    assert printed[-3:] == [method.lower(), "below", "look"]
    assert "run_forever" in task and task[-1] == "_execute"


@bridged
@both_kinds
@pytest.mark.gen_test
async def test_stack_under_the_bridge(flavour: Flavour, serve: Any, method: str) -> None:
    """A limit: the stack begins at the bridge. The rest is in the parent greenlet."""
    shown: list[list[str]] = []

    def look() -> None:
        beyond: Any = getcurrent().parent
        for frame in (None, beyond.gr_frame):
            shown.append([entry.name for entry in traceback.extract_stack(frame)])

    assert (await serve(looking(flavour, look))(method=method)).code == 200
    here, beyond = shown
    assert here[0] == "run" and "_execute" not in here
    assert "run_forever" in beyond and "_execute" in beyond and beyond[-1] == "cross"


@ordinary_and_bridged
@pytest.mark.gen_test
async def test_stack_of_a_waiting_request(flavour: Flavour, serve: Any) -> None:
    """As asyncio shows a task that waits: the outermost coroutine, which is Tornado's."""
    tasks: list[Any] = []
    go_on = asyncio.Event()

    class Handler(flavour.Handler):
        async def get(self) -> None:
            self.session.scalar(select(1))
            tasks.append(asyncio.current_task())
            await go_on.wait()

    answer = asyncio.ensure_future(serve(Handler)())
    await until(lambda: tasks)
    printed = io.StringIO()
    tasks[0].print_stack(file=printed)
    assert [frame.f_code.co_name for frame in tasks[0].get_stack()] == ["_execute"]
    assert re.findall(r", in (\S+)", printed.getvalue()) == ["_execute"]
    go_on.set()
    assert (await answer).code == 200


@bridged
@pytest.mark.gen_test
async def test_stack_of_a_request_in_a_query(flavour: Flavour, serve: Any) -> None:
    """A `def` verb that waits for the database has Tornado's coroutine too."""
    tasks: list[Any] = []

    class Handler(flavour.Handler):
        def get(self) -> None:
            tasks.append(asyncio.current_task())
            self.session.execute(text(SLOW[flavour.dialect]))

    answer = asyncio.ensure_future(serve(Handler)())
    await until(lambda: tasks)
    assert [frame.f_code.co_name for frame in tasks[0].get_stack()] == ["_execute"]
    assert (await answer).code == 200
