"""Exceptions whose message is one sentence for the user."""

from __future__ import annotations


class BadInput(ValueError):
    """Invalid input: one sentence that says what was expected, what was found, and what to do.

    The command line prints it and exits with code 2; any other exception is a defect.
    """


class WorkerLost(RuntimeError):
    """A worker died or failed: one sentence with its number and what to do.

    The command line prints it and exits with code 1.
    """
