"""How far long work is, shown on standard error: a bar in a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from service.cli.output import note

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from models.progress import Progress

# Work that ends sooner shows nothing: a bar that flashes by tells nobody anything.
QUIET_SECONDS = 2.0
LOG_SECONDS = 15.0


@contextmanager
def progress_shown() -> Iterator["Progress"]:
    """Yield a models.progress.Progress for the block; it may be called as often as the work likes."""
    if not sys.stderr.isatty():
        yield _LogLines()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    clocks = (TimeElapsedColumn(), TimeRemainingColumn())
    bars = Progress(*columns, *clocks, console=Console(stderr=True))
    try:
        yield _Bars(bars)
    finally:
        bars.stop()


class _Bars:
    """One bar per stage. A stage has begun when the count falls or the total is another; the message may always change,
    as that of training does, which ends in the loss."""

    def __init__(self, bars: "Bars") -> None:
        self._bars = bars
        self._began = time.monotonic()
        self._task: TaskID | None = None
        self._last = (0, 0)

    def __call__(self, done: int, total: int, message: str) -> None:
        last_done, last_total = self._last
        if self._task is None or done < last_done or total != last_total:
            self._task = self._bars.add_task(message, total=total)
        self._last = done, total
        self._bars.update(self._task, completed=done, total=total, description=message)
        if time.monotonic() - self._began > QUIET_SECONDS:
            self._bars.start()


class _LogLines:
    """A line when a stage has run for a while, so that a log shows life without filling up."""

    def __init__(self) -> None:
        self._printed = time.monotonic()

    def __call__(self, done: int, total: int, message: str) -> None:
        if time.monotonic() - self._printed > LOG_SECONDS:
            self._printed = time.monotonic()
            note(f"{message}: {done}/{total}")
