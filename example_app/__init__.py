"""A small ledger, the example application of ``tornado_sa``: ``python -m example_app``."""
