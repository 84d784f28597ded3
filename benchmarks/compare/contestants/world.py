"""What is the same for all contestants: the table, what they do with it, and their pools."""

import random

from sqlalchemy import create_engine, insert, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

ROWS = 10_000
HELD = 0.01  # seconds for which /hold holds its connection over an await
SLEEP = text("SELECT pg_sleep(0.05)")
ONE = text("SELECT 1")

POOL = {"pool_size": 20, "max_overflow": 0}
SMALL_POOL = {"pool_size": 2, "max_overflow": 0}


class Base(DeclarativeBase):
    pass


class World(Base):
    __tablename__ = "tornado_sa_comparison"

    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int]

    def as_dict(self):
        return {"id": self.id, "number": self.number}


def any_id():
    return random.randint(1, ROWS)


def any_ids(count):
    return random.sample(range(1, ROWS + 1), count)


def create(database):
    engine = create_engine(f"postgresql+psycopg://postgres@{database}")
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    rows = [{"id": number, "number": any_id()} for number in range(1, ROWS + 1)]
    with engine.begin() as connection:
        connection.execute(insert(World), rows)
    engine.dispose()


def drop(database):
    engine = create_engine(f"postgresql+psycopg://postgres@{database}")
    Base.metadata.drop_all(engine)
    engine.dispose()
