"""Litestar on uvicorn, and the AsyncSession that advanced-alchemy's plugin provides."""

import asyncio
import random

import options
import serve
import world
from advanced_alchemy.extensions.litestar import (
    AsyncSessionConfig,
    EngineConfig,
    SQLAlchemyAsyncConfig,
    SQLAlchemyPlugin,
)
from litestar import Litestar, get
from sqlalchemy.ext.asyncio import AsyncSession
from world import World


@get("/plain")
async def plain() -> dict[str, str]:
    return {"message": "Hello, world"}


@get("/db")
async def db(db_session: AsyncSession) -> dict[str, int]:
    return (await db_session.get(World, world.any_id())).as_dict()


@get("/queries")
async def queries(db_session: AsyncSession, n: int) -> dict[str, list[dict[str, int]]]:
    return {"rows": [(await db_session.get(World, one)).as_dict() for one in world.any_ids(n)]}


@get("/update")
async def update(db_session: AsyncSession) -> dict[str, int]:
    row = await db_session.get(World, world.any_id())
    row.number = random.randint(1, world.ROWS)
    await db_session.commit()
    return row.as_dict()


@get("/slow")
async def slow(db_session: AsyncSession) -> dict[str, bool]:
    await db_session.execute(world.SLEEP)
    return {"slept": True}


@get("/hold")
async def hold(small_session: AsyncSession) -> dict[str, bool]:
    await small_session.execute(world.ONE)
    await asyncio.sleep(world.HELD)
    await small_session.execute(world.ONE)
    return {"held": True}


session_config = AsyncSessionConfig(expire_on_commit=False)
config = SQLAlchemyAsyncConfig(
    connection_string=options.ASYNC_URL,
    session_config=session_config,
    engine_config=EngineConfig(**world.POOL),
)
small_config = SQLAlchemyAsyncConfig(
    connection_string=options.ASYNC_URL,
    session_config=session_config,
    engine_config=EngineConfig(**world.SMALL_POOL),
    session_dependency_key="small_session",
    engine_dependency_key="small_engine",
    bind_key="small",
)
serve.asgi(
    Litestar(
        [plain, db, queries, update, slow, hold],
        plugins=[SQLAlchemyPlugin(config=[config, small_config])],
        openapi_config=None,
    )
)
