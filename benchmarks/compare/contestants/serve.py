"""How contestants on Tornado and on ASGI are served: one process, no log of requests."""

import asyncio
import gc

from options import given
from tornado.web import Application


def tune_collector():
    """What docs/performance.rst advises. For everybody, or with --default-gc for nobody."""
    if not given.default_gc:
        gc.collect()
        gc.freeze()
        gc.set_threshold(10_000)


def new_loop():
    if given.loop == "uvloop":
        import uvloop

        return uvloop.new_event_loop()
    return asyncio.new_event_loop()


def tornado(handlers, **settings):
    async def main():
        app = Application(handlers, log_function=lambda handler: None, **settings)
        app.listen(given.port, "127.0.0.1")
        tune_collector()
        await asyncio.Event().wait()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main())


def asgi(app):
    import uvicorn

    tune_collector()
    log = {"log_level": "warning", "access_log": False}
    uvicorn.run(app, port=given.port, loop=given.loop, http="httptools", **log)
