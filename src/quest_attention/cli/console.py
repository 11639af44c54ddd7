"""Where the commands write: results to standard output, everything else to standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

__all__ = ["can_draw", "progress_bar", "say", "stderr_console", "stdout_console"]

OnProgress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done and how much there is."""


class _Console(Console):
    """rich's console, but a closed pipe stays an error, for `cli.failures` to answer as everywhere."""

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError


def stdout_console() -> Console:
    """A console on standard output: colours on a terminal only, none with NO_COLOR."""
    return _Console(highlight=False)


def stderr_console() -> Console:
    """A console on standard error."""
    return Console(stderr=True, highlight=False)


def can_draw(console: Console, characters: str) -> bool:
    """Whether the console's encoding has these characters."""
    try:
        characters.encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def say(text: str) -> None:
    """Write a line to standard error, as it is: no wrapping, no markup, readable by programs."""
    with suppress(BrokenPipeError):  # nobody reads it, so nobody misses it
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


@contextmanager
def progress_bar(*, is_quiet: bool = False) -> Iterator[OnProgress]:
    """A progress bar on standard error that disappears when done; nothing where that is not a terminal."""
    console = stderr_console()
    bar = Progress(
        SpinnerColumn(finished_text=" ") if can_draw(console, "⠋") else TextColumn(" "),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=is_quiet or not console.is_terminal,
    )
    with bar:
        task = bar.add_task("", total=None)
        last = ""

        def on_progress(what: str, done: int, total: int) -> None:
            nonlocal last
            if what != last:
                bar.reset(task, description=what, total=total or None, completed=done)
                last = what
            else:
                bar.update(task, completed=done, total=total)

        yield on_progress
