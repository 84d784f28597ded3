"""FastAPI on uvicorn, and an AsyncSession by Depends(), as its documentation has it."""

import asyncio
import random
from typing import Annotated

import options
import serve
import world
from fastapi import Depends, FastAPI
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from world import World

make_session = async_sessionmaker(
    create_async_engine(options.ASYNC_URL, **world.POOL), expire_on_commit=False
)
make_small = async_sessionmaker(create_async_engine(options.ASYNC_URL, **world.SMALL_POOL))


async def get_session():
    async with make_session() as session:
        yield session


async def get_small():
    async with make_small() as session:
        yield session


Session = Annotated[AsyncSession, Depends(get_session)]
SmallSession = Annotated[AsyncSession, Depends(get_small)]
app = FastAPI()


@app.get("/plain")
async def plain(session: Session):
    return {"message": "Hello, world"}


@app.get("/db")
async def db(session: Session):
    return (await session.get(World, world.any_id())).as_dict()


@app.get("/queries")
async def queries(session: Session, n: int):
    return {"rows": [(await session.get(World, one)).as_dict() for one in world.any_ids(n)]}


@app.get("/update")
async def update(session: Session):
    row = await session.get(World, world.any_id())
    row.number = random.randint(1, world.ROWS)
    await session.commit()
    return row.as_dict()


@app.get("/slow")
async def slow(session: Session):
    await session.execute(world.SLEEP)
    return {"slept": True}


@app.get("/hold")
async def hold(session: SmallSession):
    await session.execute(world.ONE)
    await asyncio.sleep(world.HELD)
    await session.execute(world.ONE)
    return {"held": True}


serve.asgi(app)
