"""The exceptions that end in one sentence: input that cannot be used, and a worker that is gone."""

from __future__ import annotations


class BadInput(ValueError):
    """What was expected, what came, and what to do about it, in one sentence.

    The command line prints the sentence and exits with code 2; anything else that is raised is a defect.
    """


class WorkerLost(RuntimeError):
    """One of several workers died or failed; its number, and what to do.

    The command line prints the sentence and exits with code 1.
    """
