"""Tornado without a database."""

import serve
from tornado.web import RequestHandler


class Plain(RequestHandler):
    def get(self):
        self.write({"message": "Hello, world"})


serve.tornado([("/plain", Plain)])
