"""Isolation: what is committed in a test, by handlers and by the test, is gone after it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import func, select
from tornado import gen

from tests.support import (
    ASYNC,
    BRIDGED,
    MARIADB,
    SYNC,
    Flavour,
    Note,
    only,
    settle,
)
from tornado_sa import transactional
from tornado_sa.testing import Isolation, isolated

everywhere = only(*SYNC, *ASYNC, *BRIDGED, *MARIADB)


@asynccontextmanager
async def isolation(flavour: Flavour, **options: Any) -> AsyncIterator[Isolation]:
    """``isolated(db)``, with the kind of `with` that the database wants."""
    if flavour.is_async:
        async with isolated(flavour.db, **options) as entered:
            yield entered
    else:
        with isolated(flavour.db, **options) as entered:
            yield entered


async def count(flavour: Flavour) -> int:
    found: int = await flavour.in_scope(lambda session: session.scalar(select(func.count(Note.id))))
    return found


@everywhere
@pytest.mark.gen_test
async def test_what_a_handler_commits_is_gone(flavour: Flavour, serve: Any) -> None:
    class Handler(flavour.Handler):
        @transactional
        async def post(self) -> None:
            self.session.add(Note(text="handler"))

    fetch = serve(Handler)
    for _ in range(2):  # entering again works
        async with isolation(flavour):
            assert (await fetch(method="POST")).code == 200
            await flavour.in_scope(lambda session: session.add(Note(text="test")), commit=True)
            assert await count(flavour) == 2
            assert flavour.texts() == []
        assert flavour.texts() == []
        assert await count(flavour) == 0
    assert (await fetch(method="POST")).code == 200
    assert flavour.texts() == ["handler"]


@everywhere
@pytest.mark.gen_test
async def test_a_request_that_fails_undoes_its_own_work_only(
    flavour: Flavour, serve: Any, expected_log: list[str]
) -> None:
    class Handler(flavour.Handler):
        @transactional
        async def post(self) -> None:
            self.session.add(Note(text="x"))
            await settle(self.session.flush())
            if self.get_argument("fail", None):
                self.send_error(400)

    fetch = serve(Handler)
    async with isolation(flavour):
        assert (await fetch(method="POST")).code == 200
        assert (await fetch("/?fail=1", method="POST")).code == 400
        assert await count(flavour) == 1
        assert (await fetch(method="POST")).code == 200
        assert await count(flavour) == 2
    assert flavour.texts() == []


@everywhere
@pytest.mark.gen_test
async def test_concurrent_requests_take_turns(flavour: Flavour, serve: Any) -> None:
    class Handler(flavour.Handler):
        async def post(self) -> None:
            self.session.add(Note(text="x"))
            await settle(self.session.flush())
            await gen.sleep(0.001)
            await settle(self.session.commit())

    fetch = serve(Handler)
    async with isolation(flavour):
        answers = await gen.multi([fetch(method="POST") for _ in range(8)])
        assert [answer.code for answer in answers] == [200] * 8
        assert await count(flavour) == 8
    assert flavour.texts() == []
