"""Forks: each process has connections of its own. Row 23."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request

import pytest

from tests.support import Flavour, only

FLAVOURS = ["psycopg", "asyncpg", "psycopg_async", "bridged_asyncpg", "sqlite", "aiosqlite"]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork there")


@pytest.mark.parametrize("how", ["os.fork", "fork_processes", "server.start"])
@only(*FLAVOURS)
def test_each_process_has_its_own_connections(flavour: Flavour, how: str) -> None:
    """Parent and two children use engine and reader, and the parent goes on with its own."""
    url = flavour.sync_engine.url.render_as_string(hide_password=False)
    program = subprocess.Popen(
        # Without -W error: asyncpg would stop at its warning, before it closes what is collected.
        # Python 3.12 warns of the thread that an aiosqlite connection has.
        [
            sys.executable,
            "-W",
            "ignore:This process:DeprecationWarning",
            "-m",
            "tests.forking",
            how,
            flavour.name,
            url,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that its children can be ended with it
    )
    assert program.stdout is not None
    lines = [program.stdout.readline().split()]
    if how == "server.start":
        _, port = program.stdout.readline().split()
        for _ in range(2):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20).close()
    try:
        out, errors = program.communicate(timeout=30)
    finally:
        if program.poll() is None:
            os.killpg(program.pid, signal.SIGKILL)
    assert (program.returncode, errors) == (0, "")
    lines += [line.split() for line in out.splitlines()]

    names = [line[0] for line in lines]
    assert sorted(names) == ["after", "before", "child0", "child1"]
    assert names[0] == "before" and names[-1] == "after"
    numbers = sorted(int(line[1]) for line in lines)
    assert numbers[0] == 1 and numbers[-1] == 4  # nobody's note is lost
    if flavour.dialect == "postgresql":
        backends = {name: set(pids) for name, _, *pids in lines}
        used = [backends[name] for name in ("before", "child0", "child1")]
        assert len(set.union(*used)) == 6
        if how == "os.fork" or not flavour.is_async:  # else its loop, and they with it, are gone
            assert backends["after"] == backends["before"]
