"""Progress bars for the long phases: live on a terminal, one plain line per phase anywhere else."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from selfplay_jax import distributed

_live: Any = None  # the rich.progress.Progress now on the screen
_open = False  # whether a phase is open, with or without a bar


class Bar:
    """The handle of an open phase; made by `progress`."""

    def __init__(self, title: str, total: int | None, unit: str, start: int):
        self.title, self.total, self.unit = title, total, unit
        self.done = self._start = start
        self.text = ""
        self._began = time.monotonic()
        self._task: Any = None

    def advance(self, count: int = 1) -> None:
        """Counts `count` more units as done."""
        self.done += count
        if _live is not None:
            _live.update(self._task, completed=self.done, rate=self._rate())

    def update_text(self, text: str) -> None:
        """Replaces the few words shown after the bar, such as "loss 0.43"."""
        self.text = text
        if _live is not None:
            _live.update(self._task, text=text)

    def attach(self, live: Any) -> None:
        """Draws the bar on a rich Progress."""
        self._task = live.add_task(
            self.title,
            total=self.total,
            completed=self.done,
            rate="",
            text="",
            unit=self.unit,
            total_text="?" if self.total is None else self.total,
        )

    def summary(self) -> str:
        """What stays of the phase: how many units, how long, how fast."""
        of_total = f"/{self.total}" if self.total is not None and self.done != self.total else ""
        parts = [f"{self.title}: {self.done}{of_total} {self.unit} in {time.monotonic() - self._began:.1f} s"]
        if self._start:
            parts.append(f"{self._start} already done")
        parts += [part for part in (self._rate(), self.text) if part]
        return ", ".join(parts)

    def _rate(self) -> str:
        seconds = time.monotonic() - self._began
        rate = (self.done - self._start) / seconds if seconds > 0 else 0.0
        return f"{rate:.3g} {self.unit}/s" if rate < 1000 else f"{rate:,.0f} {self.unit}/s"


@contextlib.contextmanager
def progress(title: str, *, total: int | None, unit: str = "steps", start: int = 0) -> Iterator[Bar]:
    """Shows how far a phase is, how fast it goes and how long it will take.

    On a terminal (stderr) a live bar, gone at the end; there and elsewhere one line once the phase is over. A
    phase that fails leaves no line. Only one may be open at a time. Of several processes the lead shows it.

    Args:
      title: what is being done, "sampling round 0".
      total: how many units there are; None where nobody knows.
      unit: their plural.
      start: units that an interrupted run had already done; they do not count towards the rate.

    Raises:
      RuntimeError: another bar is open.
    """
    global _live, _open
    if _open:
        raise RuntimeError(f"progress({title!r}) inside another progress: one bar at a time")
    bar = Bar(title, total, unit, start)
    _open = True
    try:
        if _is_terminal(sys.stderr) and distributed.is_lead():
            with _rich_progress() as live:
                bar.attach(live)
                _live = live
                try:
                    yield bar
                finally:
                    _live = None
        else:
            yield bar
    finally:
        _open = False
    if distributed.is_lead():
        _print(bar.summary(), sys.stderr)


def say(text: str) -> None:
    """Prints a line on stdout, above the live bar where there is one; of several processes the lead does."""
    if not distributed.is_lead():
        return
    if _live is not None and _is_terminal(sys.stdout):
        _live.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
    else:
        _print(text, sys.stdout)


def _rich_progress() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=28),
        TextColumn("{task.completed:.0f}/{task.fields[total_text]} {task.fields[unit]}", markup=False),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        console=Console(stderr=True, force_terminal=True),
        transient=True,
        refresh_per_second=4,  # redrawing takes a core away from the work on small machines
        redirect_stdout=_is_terminal(sys.stdout),  # a redirected stdout keeps its own lines
    )


def _is_terminal(stream: Any) -> bool:
    return bool(stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb")


def _print(text: str, stream: Any) -> None:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), file=stream, flush=True)  # θ on a Latin-1 terminal
