"""For tests of applications that commit. The fixtures for pytest are in ``plugin.py``."""

from tornado_sa.testing.block import isolated
from tornado_sa.testing.counting import count_queries
from tornado_sa.testing.isolation import Isolation

__all__ = ["Isolation", "count_queries", "isolated"]
