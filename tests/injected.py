"""Run Tornado's own test suite with BaseHandler in every handler. Prints a report as JSON.

Usage: ``python tests/injected.py none|above|below|bridged``

``above`` puts the mixin before each handler class as the application uses it; ``below`` puts it
under each, as the class that every handler of the suite inherits from; ``bridged`` is ``above``
with an AsyncDatabase, so that all code of the handlers runs under the bridge. Every request uses
its session and so holds a connection. A program of its own, because it replaces names in
``tornado.web`` before the suite imports them.
"""

import asyncio
import importlib.util
import json
import logging
import os
import sys
import tempfile
import time
import unittest
import weakref
from collections import Counter
from pathlib import Path

import tornado.web
import tornado.websocket
from sqlalchemy import NullPool, text
from tornado.test.runtests import TEST_MODULES
from tornado.testing import AsyncTestCase

from tornado_sa import AsyncDatabase, BaseHandler, Database


def make_mixin(database):
    class Touching(BaseHandler):
        """Uses its session in each request, and so holds a connection."""

        def prepare(self):
            self.session.execute(text("SELECT 1"))
            return super().prepare()

    Touching.database = database
    return Touching


def combine(mixin, handler):
    name = handler.__name__
    return type(name, (mixin, handler), {"__module__": handler.__module__, "__qualname__": name})


def inject_above(mixin):
    made = {}
    original = tornado.web.Application.get_handler_delegate

    def get_handler_delegate(self, request, target_class, *args, **kwargs):
        if target_class not in made:
            made[target_class] = combine(mixin, target_class)
        return original(self, request, made[target_class], *args, **kwargs)

    tornado.web.Application.get_handler_delegate = get_handler_delegate


def inject_below(mixin):
    original = tornado.web.RequestHandler
    handlers = [c for c in original.__subclasses__() if c.__module__.startswith("tornado.")]
    injected = combine(mixin, original)
    for handler in handlers:  # StaticFileHandler, WebSocketHandler and so on
        handler.__bases__ = tuple(injected if b is original else b for b in handler.__bases__)
    tornado.web.RequestHandler = injected


def wait_for_the_end(database):
    """Let requests end and connections go back after each test, for there the suite cancels all.

    Without a query, a handler that nobody waits for, such as the second one of
    ``test_pipelined_cancel``, is done before that.
    """
    original = AsyncTestCase.tearDown
    endless = weakref.WeakSet()  # requests that were waited for in vain

    def tear_down(self):
        def pending():
            tasks = {t for t in database._tasks if t.get_loop() is self.io_loop.asyncio_loop}
            return tasks | (set(database.status().open_scopes) - set(endless))

        async def wait():
            deadline = time.monotonic() + 1
            while pending() and time.monotonic() < deadline:  # noqa: ASYNC110  (no event tells)
                await asyncio.sleep(0.005)

        if pending():
            self.io_loop.run_sync(wait)
            endless.update(database.status().open_scopes)
        original(self)

    AsyncTestCase.tearDown = tear_down


def uses_handlers(module):
    spec = importlib.util.find_spec(module) if module.startswith("tornado.test.") else None
    return spec is not None and "Handler" in Path(spec.origin).read_text()


class Recorder(logging.Handler):
    """Counts log lines by test. Lines of the runs are compared, so no clocks and ports in them."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.current = "import"
        self.lines = Counter()

    def emit(self, record):
        self.lines[f"{self.current} {record.name} {record.levelname} {record.msg}"] += 1


class Result(unittest.TestResult):
    def __init__(self, recorder):
        super().__init__()
        self.recorder = recorder

    def startTest(self, test):
        super().startTest(test)
        self.recorder.current = test.id()


def main(mode):
    folder = tempfile.mkdtemp()
    path = Path(folder, "suite.db")
    if mode == "bridged":  # each test has a loop of its own, so no connection is kept
        database = AsyncDatabase(
            f"sqlite+aiosqlite:///{path}", engine_options={"poolclass": NullPool}
        )
    else:
        database = Database(f"sqlite:///{path}", engine_options={"pool_size": 50})
    if mode != "none":
        inject = inject_below if mode == "below" else inject_above
        inject(make_mixin(database))
    if mode == "bridged":
        wait_for_the_end(database)
    recorder = Recorder()
    logging.getLogger().addHandler(recorder)
    logging.getLogger("tornado.access").setLevel(logging.CRITICAL)
    result = Result(recorder)
    modules = [name for name in TEST_MODULES if uses_handlers(name)]
    unittest.defaultTestLoader.loadTestsFromNames(modules).run(result)
    status = database.status()
    report = {
        "run": result.testsRun,
        "failed": {test.id(): trace for test, trace in result.failures + result.errors},
        "log": recorder.lines,
        "checked_out": status.checked_out,
        "open_scopes": [scope.label for scope in status.open_scopes],
    }
    sys.stdout.write(json.dumps(report) + "\n")
    sys.stdout.flush()
    # Not by returning: where a test has cancelled the closing of an aiosqlite connection, its
    # thread waits for ever, and Python for it.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
