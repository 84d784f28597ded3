"""Fixtures for pytest, over a fixture ``db`` that the application's tests define.

They need no plugin for event loops, and work with any: a connection is made in the loop that runs
when it is first needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

# pytest imports this module in every run: what only some tests need is imported where they do.
if TYPE_CHECKING:
    from tornado_sa.after_commit import LaterCall
    from tornado_sa.isolation import Isolation


@pytest.fixture
def isolation_options() -> dict[str, Any]:
    """The options of `tornado_sa.testing.isolated` for `isolated_db`. Override it to set some."""
    return {}


@pytest.fixture
def nothing_left_out() -> bool:
    """Whether a test fails that leaves a connection or a unit of work open, or a task at work.

    It does; override this with a fixture that returns False to do without.
    """
    return True


@pytest.fixture
def tornado_sa_isolation(
    db: Any,
    request: pytest.FixtureRequest,
    nothing_left_out: bool,
    isolation_options: dict[str, Any],
) -> Iterator[Isolation]:
    """What ``isolated(db)`` yields, for a test that is isolated as by `isolated_db`."""
    from tornado_sa.leftovers import end_anywhere
    from tornado_sa.testing import isolated

    if "io_loop" in request.fixturenames:  # pytest-tornado closes it after those who asked for it
        request.getfixturevalue("io_loop")
    isolation = isolated(db, **isolation_options).switch_on()
    yield isolation
    end_anywhere(isolation, nothing_left_out)


@pytest.fixture
def isolated_db(db: Any, tornado_sa_isolation: Isolation) -> Any:
    """The database ``db``, isolated: what is committed in the test is rolled back after it."""
    return db


@pytest.fixture
def after_commit_calls(tornado_sa_isolation: Isolation) -> list[LaterCall]:
    """The calls of ``after_commit`` whose work was committed. They are kept, and not made."""
    tornado_sa_isolation.captures = True
    return tornado_sa_isolation.calls
