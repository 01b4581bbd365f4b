"""The base of every error that a user's mistake or a broken file can cause."""


class IngotError(Exception):
    """Says what was wrong, where, and what to do. The command line prints it without a traceback."""
