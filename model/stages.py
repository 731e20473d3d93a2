"""Work that pauses, so that whoever does it can do other work between its parts."""

from collections.abc import Generator
from typing import TypeVar

__all__ = ["Stages", "finish"]

T = TypeVar("T")
Stages = Generator[None, None, T]
"""Work that pauses between its parts, and returns its result at the end."""


def finish(stages: Stages[T]) -> T:
    """The result of work in stages, done without a pause."""
    while True:
        try:
            next(stages)
        except StopIteration as done:
            return done.value
