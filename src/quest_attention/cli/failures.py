"""What goes wrong becomes one line on standard error and an exit code; never a traceback."""

from __future__ import annotations

import functools
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ParamSpec, get_type_hints

import typer
from typer.models import OptionInfo

from quest_attention.cli.console import say
from quest_attention.errors import QuestError, QuestValueError, QuestWarning

__all__ = ["CHECK_FAILED", "INTERRUPTED", "PIPE_CLOSED", "USAGE", "one_line", "reports_failures", "usage_message"]

CHECK_FAILED = 1
"""The command ran, but what it is there to do did not happen."""
USAGE = 2
"""Something in the input is wrong; nothing was changed."""
INTERRUPTED = 130
"""Ctrl-C: 128 + SIGINT, as shells count."""
PIPE_CLOSED = 141
"""The reader of our output went away: 128 + SIGPIPE, as shells count."""
TRACEBACK_VARIABLE = "QUEST_TRACEBACK"
"""Environment variable that lets an unexpected error through with its traceback."""

P = ParamSpec("P")


def reports_failures(command: Callable[P, None]) -> Callable[P, None]:
    """Make a command end in one line and an exit code where it raises an error of ours or of the system."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with _only_our_warnings():
                command(*args, **kwargs)
                sys.stdout.flush()  # here, so that a closed pipe shows while we can still answer it
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            say("\nquest: interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            _discard_output()
            raise typer.Exit(PIPE_CLOSED) from None
        except QuestValueError as error:
            _fail(_as_option(error, command))
        except QuestError as error:
            _fail(_with_option(str(error), command))
        except OSError as error:
            _fail(str(error))
        except Exception as error:  # the last resort: what is left is a bug, ours or a library's
            if os.environ.get(TRACEBACK_VARIABLE):
                raise
            if isinstance(error, MemoryError) or "out of memory" in str(error) or "allocate memory" in str(error):
                _fail(f"out of memory: {one_line(str(error))}: try a shorter prompt, another --dtype or --device")
            what = f"{type(error).__name__}: {one_line(str(error))}"
            say(f"quest: internal error: {what} ({TRACEBACK_VARIABLE}=1 shows where)")
            raise typer.Exit(CHECK_FAILED) from None

    return wrapped


def usage_message(error: Exception, arguments: Sequence[str]) -> str:
    """One line for an error of the command line's parser, in the form of our own.

    Args:
        error: Any of the parser's errors. Their classes move between releases of typer; what they hold does not.
        arguments: The command line.
    """
    name = getattr(error, "option_name", None)
    if name is not None and type(error).__name__ == "NoSuchOption":
        close = ", ".join(getattr(error, "possibilities", None) or ())
        return f"{name}: got an unknown option, expected {close or 'one that --help lists'}"
    for option in getattr(getattr(error, "param", None), "opts", ()):
        for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
            if argument == option or argument.startswith(f"{option}="):
                got = following if argument == option else argument.partition("=")[2]
                return f"{option}: got {got!r}, expected {_expected(str(getattr(error, 'message', error)))}"
    message: str = error.format_message()  # type: ignore[attr-defined]
    return message


def _expected(message: str) -> str:
    """What the parser would have taken, from what it says of a value: its two wordings over the releases of typer."""
    found = re.search(r"Input should be ([^,]+)|is not (a valid [^.]+)", message)
    return next(group for group in found.groups() if group) if found else f"another value: {message}"


def one_line(text: str) -> str:
    """The first sentence-like line of a longer message."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")


def _fail(message: str) -> None:
    say(f"quest: error: {one_line(message)}")
    raise typer.Exit(USAGE) from None


def _as_option(error: QuestValueError, command: Callable[..., None]) -> str:
    """The message as the command line has it: the argument as it is spelt there, and none where Python says `None`."""
    expected = re.sub(r"^None\b", "none", error.expected)
    return f"{_spelt(error.argument, command)}: got {error.got!r}, expected {expected}"


def _with_option(message: str, command: Callable[..., None]) -> str:
    """Likewise of an error that holds the message alone."""
    argument, found, rest = message.partition(": got ")
    return f"{_spelt(argument, command)}{found}{rest}" if found else message


def _spelt(argument: str, command: Callable[..., None]) -> str:
    """An argument as it is spelt on the command line, where it is an option of the command; else as it is."""
    hints = get_type_hints(command, include_extras=True)
    for name in (argument, f"{argument}s"):  # a list is of many, and one of them is wrong
        about = getattr(hints.get(name), "__metadata__", (None,))[0]
        if isinstance(about, OptionInfo):
            given = (about.default, *(about.param_decls or ()))  # typer holds the first of the names as a default
            names = (one for one in given if isinstance(one, str) and one.startswith("--"))
            return next(names, f"--{name.replace('_', '-')}")
    return argument


@contextmanager
def _only_our_warnings() -> Iterator[None]:
    """Show our own warnings as a line each; the libraries' are for developers."""

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if issubclass(category, QuestWarning):
            say(f"quest: warning: {one_line(str(message))}")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        yield


def _discard_output() -> None:
    """Send what is still buffered nowhere, so that the interpreter's exit does not fail on the closed pipe again."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    except (OSError, ValueError):
        pass  # standard output is no file: nothing of it can fail later
