"""Starlette on uvicorn, and `async with async_sessionmaker()` in each endpoint."""

import asyncio
import random

import options
import serve
import world
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from world import World

make_session = async_sessionmaker(create_async_engine(options.ASYNC_URL, **world.POOL))
make_small = async_sessionmaker(create_async_engine(options.ASYNC_URL, **world.SMALL_POOL))


async def plain(request):
    async with make_session():
        return JSONResponse({"message": "Hello, world"})


async def db(request):
    async with make_session() as session:
        return JSONResponse((await session.get(World, world.any_id())).as_dict())


async def queries(request):
    async with make_session() as session:
        rows = [
            (await session.get(World, one)).as_dict()
            for one in world.any_ids(int(request.query_params["n"]))
        ]
        return JSONResponse({"rows": rows})


async def update(request):
    async with make_session(expire_on_commit=False) as session:
        row = await session.get(World, world.any_id())
        row.number = random.randint(1, world.ROWS)
        await session.commit()
        return JSONResponse(row.as_dict())


async def slow(request):
    async with make_session() as session:
        await session.execute(world.SLEEP)
        return JSONResponse({"slept": True})


async def hold(request):
    async with make_small() as session:
        await session.execute(world.ONE)
        await asyncio.sleep(world.HELD)
        await session.execute(world.ONE)
        return JSONResponse({"held": True})


endpoints = [plain, db, queries, update, slow, hold]
serve.asgi(Starlette(routes=[Route(f"/{each.__name__}", each) for each in endpoints]))
