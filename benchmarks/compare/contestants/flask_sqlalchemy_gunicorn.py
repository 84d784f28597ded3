"""Flask-SQLAlchemy on gunicorn's threads."""

import random
import time

import options
import serve
import world
from flask import Flask, request
from flask_sqlalchemy import SQLAlchemy
from gunicorn.app.base import BaseApplication
from sqlalchemy.orm import Session
from world import World

app = Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = options.SYNC_URL
app.config["SQLALCHEMY_ENGINE_OPTIONS"] = world.POOL
app.config["SQLALCHEMY_BINDS"] = {"small": {"url": options.SYNC_URL, **world.SMALL_POOL}}
db = SQLAlchemy(app, session_options={"expire_on_commit": False})


@app.get("/plain")
def plain():
    return {"message": "Hello, world"}


@app.get("/db")
def one_row():
    return db.session.get(World, world.any_id()).as_dict()


@app.get("/queries")
def queries():
    return {
        "rows": [
            db.session.get(World, one).as_dict() for one in world.any_ids(int(request.args["n"]))
        ]
    }


@app.get("/update")
def update():
    row = db.session.get(World, world.any_id())
    row.number = random.randint(1, world.ROWS)
    db.session.commit()
    return row.as_dict()


@app.get("/slow")
def slow():
    db.session.execute(world.SLEEP)
    return {"slept": True}


@app.get("/hold")
def hold():
    with Session(db.engines["small"]) as session:
        session.execute(world.ONE)
        time.sleep(world.HELD)
        session.execute(world.ONE)
    return {"held": True}


class Gunicorn(BaseApplication):
    def load_config(self):
        self.cfg.set("bind", f"127.0.0.1:{options.given.port}")
        self.cfg.set("worker_class", "gthread")
        self.cfg.set("threads", 32)
        self.cfg.set("keepalive", 75)
        self.cfg.set("loglevel", "warning")
        self.cfg.set("post_worker_init", lambda _worker: serve.tune_collector())

    def load(self):
        return app


Gunicorn().run()
