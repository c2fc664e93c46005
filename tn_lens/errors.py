"""The one exception for input that cannot be used."""

from __future__ import annotations


class BadInput(ValueError):
    """What was expected, what came, and what to do about it, in one sentence.

    The command line prints the sentence and exits with code 2; anything else that is raised is a defect.
    """
