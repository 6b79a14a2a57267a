"""How far a pass is, in a bar: the Trainer's own kind after a fit, tqdm's in scripts and notebooks."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")
DELAY = 1.0  # seconds; a pass that is shorter shows nothing


class Progress(Protocol):
    """Shows how many of some items are done."""

    def over(self, items: Iterable[T], total: int, what: str) -> Iterator[T]:
        """The items, one by one, of which there are ``total``; ``what`` is done with them."""


class NoProgress:
    """Shows nothing."""

    def over(self, items: Iterable[T], total: int, what: str) -> Iterator[T]:
        """See :meth:`Progress.over`."""
        yield from items


class TqdmProgress:
    """A bar of tqdm with the time left, gone when the pass has ended."""

    def over(self, items: Iterable[T], total: int, what: str) -> Iterator[T]:
        """See :meth:`Progress.over`."""
        yield from tqdm(items, desc=what, total=total, unit="batch", leave=False, delay=DELAY)


class RichProgress:
    """A line in the display of Lightning's ``RichProgressBar`` while that is live; one of tqdm otherwise.

    Args:
        bar: the progress bar callback.
    """

    def __init__(self, bar: Any) -> None:
        self.bar = bar

    def over(self, items: Iterable[T], total: int, what: str) -> Iterator[T]:
        """See :meth:`Progress.over`."""
        display = self.bar.progress
        if display is None or not display.live.is_started:
            yield from TqdmProgress().over(items, total, what)
            return
        task = display.add_task(what, total=total)
        try:
            for item in items:
                yield item
                display.advance(task)
        finally:
            display.remove_task(task)


def progress_of_process() -> Progress:
    """A bar where somebody watches: on a terminal, or in a notebook."""
    return TqdmProgress() if sys.stderr.isatty() or "ipykernel" in sys.modules else NoProgress()
