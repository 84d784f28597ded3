"""The application: from a database to something that answers requests."""

from __future__ import annotations

from pathlib import Path

from tornado.web import Application

from example_app import api, page
from example_app.database import AnyDatabase, open_database
from example_app.feed import Feed, FeedHandler
from example_app.handlers import NotFoundHandler
from example_app.schema import create_schema

__all__ = ["create_schema", "make_app", "open_database"]


def make_app(db: AnyDatabase, debug: bool = False) -> Application:
    """Make the ledger's application on ``db``, which is for the caller to dispose of."""
    here = Path(__file__).parent
    return Application(
        [
            # for people
            (r"/", page.LedgerPageHandler),
            (r"/ledger/([0-9]+)", page.AccountPageHandler),
            (r"/open", page.OpenHandler),
            (r"/pay", page.PayHandler),
            (r"/feed", FeedHandler),
            # for programs
            (r"/accounts", api.AccountsHandler),
            (r"/accounts/([0-9]+)", api.AccountHandler),
            (r"/transfers", api.TransfersHandler),
            (r"/transfers/([0-9]+)", api.TransferHandler),
            (r"/transfers\.ndjson", api.ExportHandler),
            (r"/healthz", api.HealthHandler),
            (r"/openapi\.json", api.OpenApiHandler),
        ],
        db=db,
        feed=Feed(db),
        debug=debug,
        autoreload=False,  # it would start the process anew in the middle of a request
        default_handler_class=NotFoundHandler,
        template_path=str(here / "templates"),
        static_path=str(here / "static"),
        xsrf_cookies=True,
        xsrf_cookie_kwargs={"httponly": True, "samesite": "Strict"},
        websocket_ping_interval=30,  # or nobody would notice that a phone has left the room
        websocket_max_message_size=1024,
    )
