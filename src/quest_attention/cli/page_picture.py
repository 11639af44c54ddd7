"""The picture of `quest demo`: what was read, one line per layer, from the start of the context to its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from quest_attention.eval.demo import Demo
from quest_attention.eval.wording import counted

__all__ = ["page_picture"]

MOST_LINES = 8
"""Layers of a deep model are shown in groups, so that the picture stays a picture."""
MOST_COLUMNS = 100
LABEL = 14  # columns, its margin included: room for "layers 10-13"
MARGIN = 2  # columns
FRAME = 2  # columns
CYAN, GREEN, RED = "cyan", "bold green", "bold red"


@dataclass(frozen=True)
class _Glyphs:
    shades: str  # never read, then from seldom to always
    edge: str
    arrow: str
    rule: str


UNICODE = _Glyphs(" ░▒▓█", "│", "▲", "─")
ASCII = _Glyphs(" .:*#", "|", "^", "-")


def page_picture(demo: Demo, *, width: int, is_unicode: bool = True) -> Text:
    """Draw the pages, or the tokens of each page, that were read while the answer was written.

    Args:
        demo: What was measured.
        width: Of the terminal [columns].
        is_unicode: Whether shades and arrows can be shown; ASCII stands in for them otherwise.
    """
    glyphs = UNICODE if is_unicode else ASCII
    pages, fact = demo.pages, demo.case.fact_pages(demo.config.page_size)
    columns = _columns(pages.num_pages, max(1, min(width - LABEL - FRAME - 1, MOST_COLUMNS)))
    marked = {index for index, column in enumerate(columns) if set(column) & set(fact)}
    fact_style = GREEN if pages.steps_reading(demo.case.fact_tokens) else RED

    picture = Text(no_wrap=True)
    is_whole = demo.config.units_per_page == 1
    what = "Pages read" if is_whole else "Tokens of each page read"
    picture.append(f"{what} while the answer was written\n", style="bold")
    for layers in _groups(pages.layers):
        shares = pages.shares(layers)
        strip = [max(shares[page] for page in column) for column in columns]
        _line(picture, _label(layers), strip, glyphs, marked, CYAN, fact_style)
    first = pages.num_pages - demo.config.page_budget
    window = [float(column[-1] >= first) for column in columns]
    _line(picture, "window", window, glyphs, marked, "yellow", fact_style)
    arrows = "".join(glyphs.arrow if index in marked else " " for index in range(len(columns)))
    picture.append(" " * (LABEL + 1) + arrows.rstrip() + "\n", style=fact_style)
    picture.append(_caption(demo, LABEL + 1 + min(marked), width), style=fact_style)
    least, most = ("seldom", "always") if is_whole else ("few", "all")
    legend = (
        f"  {counted(len(columns[0]), 'page')} a column, the brightest shown",
        f"  {glyphs.shades[1]} {least}  {glyphs.shades[-1]} {most}",
    )
    together = "  ".join(legend)
    picture.append("\n" + (together if len(together) <= width else "\n".join(legend)), style="dim")
    return picture


def _columns(num_pages: int, most: int) -> list[range]:
    """The pages of each column: equally many, but for the last."""
    per_column = -(-num_pages // most)
    return [range(start, min(start + per_column, num_pages)) for start in range(0, num_pages, per_column)]


def _groups(layers: Sequence[int]) -> list[Sequence[int]]:
    size = max(1, -(-len(layers) // MOST_LINES))
    return [layers[start : start + size] for start in range(0, len(layers), size)]


def _label(layers: Sequence[int]) -> str:
    name = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}"
    return name if len(name) <= LABEL - MARGIN else f"{layers[0]}-{layers[-1]}"


def _line(
    picture: Text, label: str, strip: list[float], glyphs: _Glyphs, marked: set[int], style: str, fact_style: str
) -> None:
    """One strip of the picture; `strip` holds a share from 0 to 1 for each column."""
    picture.append(f"{'':<{MARGIN}}{label:<{LABEL - MARGIN}}{glyphs.edge}", style="dim")
    for index, share in enumerate(strip):
        # Any read shows, however seldom; the darkest shade is the last quarter.
        shade = 0 if share == 0 else min(len(glyphs.shades) - 1, 1 + int(share * (len(glyphs.shades) - 1)))
        picture.append(glyphs.shades[shade], style=fact_style if index in marked else style)
    picture.append(f"{glyphs.edge}\n", style="dim")


def _caption(demo: Demo, at: int, width: int) -> str:
    """What the arrow in column `at` points to, below it: from there on, or as far to its left as has room."""
    steps, read = demo.pages.num_steps, demo.pages.steps_reading(demo.case.fact_tokens)
    text = f"the fact: read in {read or 'none'} of {counted(steps, 'step')}"
    start = at if at + len(text) < width else max(0, min(at + 1, width) - len(text))
    return " " * start + text
