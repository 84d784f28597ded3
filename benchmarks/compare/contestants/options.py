"""What a contestant is told as it starts, and the URLs of the database that follow from it."""

import argparse

parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int, required=True)
parser.add_argument("--loop", choices=["asyncio", "uvloop"], required=True)
parser.add_argument("--database", required=True, help="of PostgreSQL: host and name")
parser.add_argument("--sync", action="store_true", help="of tornado_sa: Database, not the bridge")
parser.add_argument("--read-only", action="store_true", help="of tornado_sa: with the reader")
parser.add_argument("--answer-first", action="store_true", help="by hand: then close the session")
parser.add_argument("--classes", type=int, default=0, help="further handler classes")
parser.add_argument("--default-gc", action="store_true", help="the collector as Python sets it")
given = parser.parse_args()

PLAIN_URL = f"postgresql://postgres@{given.database}"
ASYNC_URL = f"postgresql+asyncpg://postgres@{given.database}"
SYNC_URL = f"postgresql+psycopg://postgres@{given.database}"
