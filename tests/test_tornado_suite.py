"""Tornado's own test suite, with the mixin in every handler: nothing changes."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

# Tests that look at the class object, and so at ours instead of their own:
EXCEPTIONS = {
    # compares the list of tornado.web's public names, and finds our additions (Tornado 6.6)
    "tornado.test.api_test.APISnapshotTest.test_api_snapshot",
    # reads an attribute that prepare() sets on type(self), which is our subclass
    "tornado.test.web_test.CrossOriginProtectionBeforePrepareTest"
    ".test_websocket_upgrade_header_not_checked",
}

# In mode "bridged":
BRIDGED_EXCEPTIONS = (
    # cancels what is left in a loop of its own: aiosqlite, which closes by way of the loop
    "tornado.test.circlerefs_test.",
    # cancels every task, and an event under the bridge is one, also where it is a @gen.coroutine
    "tornado.test.websocket_test.WebSocketTest.test_websocket_close_buffered_data",
)


def is_exception(entry: str, mode: str) -> bool:
    test = entry.split()[0]
    return test in EXCEPTIONS or (mode == "bridged" and test.startswith(BRIDGED_EXCEPTIONS))


@cache
def run(mode: str) -> Any:
    script = Path(__file__).with_name("injected.py")
    root = script.parents[1]
    done = subprocess.run(
        [sys.executable, str(script), mode],
        stdout=subprocess.PIPE,
        check=True,
        cwd=root,
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin"},
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mode", ["above", "below", "bridged"])
def test_with_the_mixin_in_every_handler(mode: str) -> None:
    bare, ours = run("none"), run(mode)
    assert ours["run"] == bare["run"] > 500

    def expected(found: Any) -> Any:
        """Leave out the exceptions; both kinds of entries begin with the name of a test."""
        return {entry: found[entry] for entry in found if not is_exception(entry, mode)}

    assert expected(ours["failed"]) == {name: ours["failed"].get(name) for name in bare["failed"]}
    assert expected(ours["log"]) == expected(bare["log"])
    assert ours["checked_out"] == (None if mode == "bridged" else 0)  # None: it keeps none
    assert ours["open_scopes"] == []
