"""Exceptions with one-line messages for the user."""

from __future__ import annotations


class BadInput(ValueError):
    """Invalid input. The one-line message says what was expected, what was found, and what to do.

    The command line prints the message and exits with code 2. Exceptions other than `BadInput` and `WorkerLost` are bugs.
    """


class WorkerLost(RuntimeError):
    """A worker died or failed. The one-line message contains its rank and what to do.

    The command line prints the message and exits with code 1.
    """
