"""The figures of a report, drawn on figures of their own: nothing global of matplotlib's is touched."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from quest_attention.eval.report.cells import (
    AccuracyCell,
    ContinuationCell,
    NeedleCell,
    PerplexityCell,
    RecallCell,
)
from quest_attention.eval.report.results import Results, method_rank
from quest_attention.eval.tasks import CONTINUATION, GRID, PERPLEXITY, RECALL

__all__ = ["Picture", "draw_pictures"]

_DPI = 150
_COLOURS = {
    "full": "#000000",
    "quest": "#0072b2",
    "oracle": "#7f7f7f",
    "token_oracle": "#5c8a00",
    "streaming_llm": "#e69f00",
    "h2o": "#d55e00",
    "tova": "#009e73",
    "snapkv": "#cc79a7",
}
"""Okabe and Ito's palette, which colour-blind people tell apart (Color Universal Design, 2008)."""
_VARIANTS = ("#56b4e9", "#8c564b", "#5e3c99", "#b2ab02", "#1b4965")
"""Methods with options, and methods without a colour of their own."""
_MARKERS = {
    "quest": "o",
    "oracle": "x",
    "token_oracle": "+",
    "streaming_llm": "s",
    "h2o": "^",
    "tova": "v",
    "snapkv": "D",
}
_VARIANT_MARKERS = ("P", "*", "h", "X", "<")
_FONT, _SMALL, _TINY = 9, 8, 6
"""Sizes of titles and axes, of ticks and legends, and of numbers in a heat map [points]."""
_PANEL = (3.1, 2.35)
_MOST_COLUMNS = 3
"""Of panels, so that their labels can be read where a page is about 900 pixels wide."""
_MOST_ALIGNED = 4
"""Likewise, where each length has a row of its own."""
_MOST_MAPS = 6
_DODGE = 0.07
"""How far the points of neighbouring methods stand apart [octaves], so that their bars do not hide each other."""
_MOST_SPREAD = 0.5
"""How far those of one budget may stand apart altogether [octaves]."""
_NAME, _HANDLE, _LETTER = 1.6, 0.55, 0.065
"""Width of a short name in a legend, and of what stands before a long one and of each of its letters [inches]."""
_LOG_FROM = 4.0
"""Perplexities that differ by more than this factor are drawn on a logarithmic axis."""
_LINEAR = 1.0
"""Up to so much above full attention an axis is linear, that zero has a place on it [%]."""
_ROOM = 1.5
"""Factor between the largest value of such an axis and its end."""
_MISSING = "#dddddd"

_Line = Literal["-", "--", "-."]
_C = TypeVar("_C", AccuracyCell, NeedleCell, PerplexityCell, RecallCell)


@dataclass(frozen=True)
class Picture:
    """A figure, ready to be written.

    Attributes:
        name: Of its file, without the suffix.
        section: The task it belongs to, `perplexity` or `recall`.
        caption: What it shows, for people.
        width: At which its letters have the size they are drawn with [inches].
        png: The file.
    """

    name: str
    section: str
    caption: str
    width: float
    png: bytes


@dataclass(frozen=True)
class _Style:
    colour: str
    marker: str
    line: _Line
    width: float
    layer: int


def draw_pictures(results: Results) -> list[Picture]:
    """Every figure that there are cells for.

    Figures follow those of the Quest paper (arXiv:2406.10774): accuracy by budget (Figure 7), perplexity by position
    (Figure 6), recall by budget and by layer (Figures 3 and 4); and a heat map of needles, depth by length.
    """
    kinds: tuple[tuple[Any, ...], ...] = (
        results.accuracy,
        results.perplexity,
        results.continuation,
        results.recall,
    )
    styles = _styles(cell.method for cells in kinds for cell in cells)
    drawings: list[tuple[str, str, str, Figure | None]] = [
        (f"accuracy_{task}", task, f"{task}: accuracy by token budget. {_BARS}", _accuracy(task, results, styles))
        for task in results.tasks
        if task != GRID
    ]
    drawings.append((GRID, GRID, _NEEDLE_CAPTION, _heat_maps(results.needle)))
    drawings.append(("perplexity", PERPLEXITY, _PERPLEXITY_CAPTION, _perplexity(results.perplexity, styles)))
    drawings += [
        ("continuation_more", CONTINUATION, f"{_MORE_CAPTION} {_BARS}", _more(results.continuation, styles)),
        ("continuation_agreement", CONTINUATION, f"{_AGREEMENT_CAPTION} {_BARS}", _agreement(results, styles)),
    ]
    for name, what in (("mass", "attention mass"), ("top10", "ten largest weights")):
        caption = f"Share of the {what} of full attention that lies on the pages read"
        drawings += [
            (f"recall_{name}", RECALL, f"{caption}, by budget. {_BARS}", _recall(name, what, results.recall, styles)),
            (f"recall_{name}_by_layer", RECALL, f"{caption}, by layer.", _by_layer(name, what, results.recall, styles)),
        ]
    return [
        Picture(name, section, caption, round(figure.get_figwidth(), 2), _png(figure))
        for name, section, caption, figure in drawings
        if figure
    ]


_BARS = "Bars are 95 % intervals over samples; points of one budget stand a little apart so that all can be seen."
_NEEDLE_CAPTION = (
    "Needle in a haystack: share found by depth (0 % is the start of the context) and length. Grey was not measured."
)
_MORE_CAPTION = (
    "Perplexity of the ends of stretches above that of full attention, by budget; the axis is logarithmic above 1 %."
)
_AGREEMENT_CAPTION = "Share of next tokens that are those of full attention, by budget."
_PERPLEXITY_CAPTION = "Perplexity of all tokens up to a position; lower is better."


def _styles(methods: Iterable[str]) -> dict[str, _Style]:
    """Looks of methods, fixed by name; those with options take looks in the order of their names."""
    names = sorted(set(methods), key=method_rank)
    others = [name for name in names if name not in _COLOURS]
    styles = {}
    for name in names:
        if name in _COLOURS:
            line: _Line = "--" if name in {"full", "oracle", "token_oracle"} else "-"
            width, layer = (2.2, 5) if name == "quest" else (1.3, 6 if name == "full" else 4)
            styles[name] = _Style(_COLOURS[name], _MARKERS.get(name, ""), line, width, layer)
        else:
            place = others.index(name)
            line = "--" if name.startswith("oracle") else "-."
            turn, colour = divmod(place, len(_VARIANTS))
            marker = _VARIANT_MARKERS[(colour + turn) % len(_VARIANT_MARKERS)]  # no two methods look alike
            styles[name] = _Style(_VARIANTS[colour], marker, line, 1.5, 4)
    return styles


def _accuracy(task: str, results: Results, styles: dict[str, _Style]) -> Figure | None:
    cells = [cell for cell in results.accuracy if cell.task == task]
    points = [_Point(c.length, c.method, c.token_budget, c.score, c.low, c.high) for c in cells]
    return _by_budget(task, "accuracy [%]", points, styles)


def _more(cells: Sequence[ContinuationCell], styles: dict[str, _Style]) -> Figure | None:
    points = [
        _Point(c.length, c.method, c.token_budget, c.more, c.more_low, c.more_high) for c in cells if c.more is not None
    ]
    return _by_budget("perplexity", "above full attention [%]", points, styles, is_share=False)


def _agreement(results: Results, styles: dict[str, _Style]) -> Figure | None:
    points = [
        _Point(c.length, c.method, c.token_budget, c.agreement, c.agreement_low, c.agreement_high)
        for c in results.continuation
    ]
    return _by_budget("next tokens", "agreement [%]", points, styles)


def _recall(name: str, what: str, cells: Sequence[RecallCell], styles: dict[str, _Style]) -> Figure | None:
    points = [
        _Point(
            cell.length,
            cell.method,
            cell.token_budget,
            getattr(cell, name),
            getattr(cell, f"{name}_low"),
            getattr(cell, f"{name}_high"),
        )
        for cell in cells
    ]
    return _by_budget("recall", f"{what} [%]", points, styles)


@dataclass(frozen=True)
class _Point:
    length: int
    method: str
    token_budget: int | None
    value: float
    low: float | None
    high: float | None


def _by_budget(
    title: str, label: str, points: Sequence[_Point], styles: dict[str, _Style], *, is_share: bool = True
) -> Figure | None:
    """A panel for each length with budgets in it; full attention as a dashed line through all budgets."""
    lengths = _sorted(p.length for p in points if p.token_budget is not None)
    budgets = _sorted(p.token_budget for p in points if p.token_budget is not None)
    if not lengths:
        return None
    methods = sorted({point.method for point in points}, key=method_rank)
    choosing = [name for name in methods if any(p.method == name and p.token_budget is not None for p in points)]
    figure, panels = _panels(len(lengths), _columns(len(lengths)), methods)
    for panel, length in zip(panels, lengths, strict=True):
        here = [point for point in points if point.length == length]
        for point in here:
            if point.token_budget is None:
                style = styles[point.method]
                if point.low is not None and point.high is not None:
                    panel.axhspan(point.low, point.high, color="#000000", alpha=0.08, linewidth=0)
                panel.axhline(
                    point.value, color=style.colour, linestyle=style.line, linewidth=style.width, zorder=style.layer
                )
        dodge = min(_DODGE, _MOST_SPREAD / len(choosing))
        for place, name in enumerate(choosing):
            shift = 2 ** (dodge * (place - (len(choosing) - 1) / 2))
            _draw_line(panel, [p for p in here if p.method == name and p.token_budget is not None], styles[name], shift)
        _budget_axis(panel, budgets)
        if is_share:
            panel.set_ylim(-4, 104)
            panel.set_yticks(range(0, 101, 25))
        else:
            _excess_axis(panel, points)
        panel.set_title(f"{title}, {_tokens(length)} tokens", fontsize=_FONT)
    _label(figure, panels, "token budget", label)
    _legend(figure, methods, styles)
    return figure


def _draw_line(panel: Axes, points: Sequence[_Point], style: _Style, shift: float) -> None:
    if not points:
        return
    points = sorted(points, key=lambda point: point.token_budget or 0)
    values = [point.value for point in points]
    ends = [(p.value if p.low is None else p.low, p.value if p.high is None else p.high) for p in points]
    bars = [
        [max(0.0, v - low) for v, (low, _) in zip(values, ends, strict=True)],
        [max(0.0, high - v) for v, (_, high) in zip(values, ends, strict=True)],
    ]
    panel.errorbar(
        [(point.token_budget or 0) * shift for point in points],
        values,
        yerr=bars,
        color=style.colour,
        linestyle=style.line,
        linewidth=style.width,
        marker=style.marker,
        markersize=4,
        elinewidth=0.8,
        capsize=1.5,
        zorder=style.layer,
        clip_on=False,
    )


def _excess_axis(panel: Axes, points: Sequence[_Point]) -> None:
    """Per cent above a base: linear within `_LINEAR`, logarithmic beyond; room for every interval."""
    least = min(point.value if point.low is None else point.low for point in points)
    most = max(point.value if point.high is None else point.high for point in points)
    bottom, top = min(-_LINEAR, least * _ROOM), max(_LINEAR, most * _ROOM)
    panel.set_yscale("symlog", linthresh=_LINEAR)
    panel.set_ylim(bottom, top)
    powers = [_LINEAR * 10.0**power for power in range(math.ceil(math.log10(max(-bottom, top) / _LINEAR)) + 1)]
    ticks = [*(-tick for tick in reversed(powers)), 0, *powers]
    panel.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if bottom <= tick <= top]))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_locator(NullLocator())


def _budget_axis(panel: Axes, budgets: Sequence[int]) -> None:
    """Base 2, with ticks at the budgets there are, as far as their labels have room."""
    panel.set_xscale("log", base=2)
    panel.set_xlim(budgets[0] / 2**0.5, budgets[-1] * 2**0.5)
    room = math.log2(budgets[-1] / budgets[0]) / 8
    shown: list[int] = []
    for budget in budgets:
        if not shown or math.log2(budget / shown[-1]) >= room:
            shown.append(budget)
    panel.xaxis.set_major_locator(FixedLocator(shown))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tokens(round(value))))


def _perplexity(cells: Sequence[PerplexityCell], styles: dict[str, _Style]) -> Figure | None:
    """A row for each length, a column for each budget; full attention in all of them."""

    def draw(panel: Axes, cell: PerplexityCell) -> None:
        _plain_line(panel, cell.positions, cell.so_far, styles[cell.method])
        panel.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 4, 8]))
        panel.set_xticks(_position_ticks(cell.length))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tokens(round(value))))

    figure, panels = _length_by_budget(cells, draw)
    if figure is None:
        return None
    values = [value for cell in cells for value in cell.so_far]
    is_log = max(values) > _LOG_FROM * min(values)
    for panel in panels:
        panel.set_ylim(min(values) * 0.97, max(values) * 1.03)
        if is_log:
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            panel.yaxis.set_minor_locator(NullLocator())
    _label(figure, panels, "position [tokens]", "perplexity so far" + (", log axis" if is_log else ""))
    _legend(figure, _methods(cells), styles)
    return figure


def _by_layer(name: str, what: str, cells: Sequence[RecallCell], styles: dict[str, _Style]) -> Figure | None:
    def draw(panel: Axes, cell: RecallCell) -> None:
        _plain_line(panel, cell.layers, getattr(cell, f"{name}_by_layer"), styles[cell.method])
        panel.set_ylim(-4, 104)
        panel.set_yticks(range(0, 101, 25))
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))

    figure, panels = _length_by_budget(cells, draw)
    if figure is None:
        return None
    _label(figure, panels, "layer", f"{what} [%]")
    _legend(figure, _methods(cells), styles)
    return figure


def _length_by_budget(cells: Sequence[_C], draw: Callable[[Axes, _C], None]) -> tuple[Figure | None, list[Axes]]:
    """Panels of a length and a budget each, with what reads everything in all panels of its length."""
    keys = sorted({(c.length, c.token_budget) for c in cells if c.token_budget is not None})
    keys = keys or sorted({(c.length, 0) for c in cells})
    if not keys:
        return None, []
    columns, places = _grid(keys)
    figure, grid = _panels(max(places) + 1, columns, _methods(cells))
    panels = [grid[place] for place in places]
    for panel in set(grid) - set(panels):
        panel.remove()
    for panel, (length, budget) in zip(panels, keys, strict=True):
        for cell in cells:
            if cell.length == length and cell.token_budget in {None, budget}:
                draw(panel, cell)
        suffix = f", budget {_tokens(budget)}" if budget else ""
        panel.set_title(f"{_tokens(length)} tokens{suffix}", fontsize=_FONT)
    return figure, panels


def _grid(keys: Sequence[tuple[int, int]]) -> tuple[int, list[int]]:
    """Columns, and the place of each panel counted row by row: a length starts a row, unless it has a single budget."""
    groups = [len(list(group)) for _, group in itertools.groupby(keys, key=lambda key: key[0])]
    most = max(groups)
    if most == 1:
        return _columns(len(keys)), list(range(len(keys)))
    columns = most if len(groups) > 1 and most <= _MOST_ALIGNED else _columns(most)
    places: list[int] = []
    start = 0
    for count in groups:
        places += range(start, start + count)
        start += math.ceil(count / columns) * columns
    return columns, places


def _columns(count: int) -> int:
    """As few rows as there may be, and as even."""
    return math.ceil(count / math.ceil(count / _MOST_COLUMNS))


def _plain_line(panel: Axes, x: Sequence[float], y: Sequence[float], style: _Style) -> None:
    few = 12  # points, for each of which there is room for a marker
    panel.plot(
        x,
        y,
        color=style.colour,
        linestyle=style.line,
        linewidth=style.width,
        marker=(style.marker or "_") if len(x) <= few else "",
        markersize=4,
        zorder=style.layer,
    )


def _heat_maps(cells: Sequence[NeedleCell]) -> Figure | None:
    """A panel for each method and budget, all in one scale; a row for each method."""
    if not cells:
        return None
    lengths, depths = _sorted(cell.length for cell in cells), _sorted(cell.depth for cell in cells)
    rows: list[list[tuple[str, int | None]]] = []
    for method in _methods(cells):
        budgets = _sorted(cell.token_budget or 0 for cell in cells if cell.method == method)
        arms = [(method, budget or None) for budget in budgets]
        rows += [arms[start : start + _MOST_MAPS] for start in range(0, len(arms), _MOST_MAPS)]
    columns = max(map(len, rows))
    width = max(2.0, 0.42 * len(lengths) + 0.9)
    figure = Figure(figsize=(width * columns + 1.1, 2.3 * len(rows) + 0.4), dpi=_DPI, layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    colours = ScalarMappable(Normalize(0, 100), "cividis")
    for axes, arms in zip(grid, rows, strict=True):
        for panel in axes[len(arms) :]:
            panel.set_axis_off()
        for panel, (method, budget) in zip(axes, arms, strict=False):
            here = [cell for cell in cells if (cell.method, cell.token_budget) == (method, budget)]
            _heat_map(panel, here, lengths, depths, colours)
            panel.set_title(method if budget is None else f"{method}, {_tokens(budget)}", fontsize=_FONT)
        axes[0].set_ylabel("depth [%]", fontsize=_FONT)
    bar = figure.colorbar(colours, ax=grid, shrink=min(1.0, 2 / len(rows)), aspect=18, pad=0.02)
    bar.set_label("found [%]", fontsize=_FONT)
    bar.ax.tick_params(labelsize=_SMALL)
    figure.supxlabel("length [tokens]", fontsize=_FONT)
    return figure


def _heat_map(
    panel: Axes, cells: Sequence[NeedleCell], lengths: Sequence[int], depths: Sequence[int], colours: ScalarMappable
) -> None:
    scores = np.full((len(depths), len(lengths)), np.nan)
    for cell in cells:
        scores[depths.index(cell.depth), lengths.index(cell.length)] = cell.score
    panel.set_facecolor(_MISSING)
    panel.imshow(np.ma.masked_invalid(scores), cmap=colours.get_cmap(), norm=Normalize(0, 100), aspect="auto")
    for (row, column), score in np.ndenumerate(scores):
        if not np.isnan(score):
            ink = "black" if score > 50 else "white"
            panel.text(column, row, f"{score:.0f}", ha="center", va="center", fontsize=_TINY, color=ink)
    panel.set_xticks(range(len(lengths)), [_tokens(length) for length in lengths], fontsize=_SMALL)
    shown = range(0, len(depths), 2 if len(depths) > 6 else 1)
    panel.set_yticks(list(shown), [str(depths[place]) for place in shown], fontsize=_SMALL)
    panel.tick_params(length=2)


def _panels(count: int, columns: int, methods: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """A figure with panels row by row, and with room for a legend above them."""
    rows = math.ceil(count / columns)
    width = max(_PANEL[0] * columns, 4.2) + 0.3
    legend = 0.25 * math.ceil(len(methods) / _legend_columns(width, methods)) + 0.2
    figure = Figure(figsize=(width, _PANEL[1] * rows + 0.3 + legend), dpi=_DPI, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in grid[count:]:
        panel.remove()
    panels: list[Axes] = list(grid[:count])
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#e6e6e6", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.tick_params(labelsize=_SMALL)
    return figure, panels


def _label(figure: Figure, panels: Sequence[Axes], x: str, y: str) -> None:
    if len(panels) == 1:
        panels[0].set_xlabel(x, fontsize=_FONT)
        panels[0].set_ylabel(y, fontsize=_FONT)
    else:
        figure.supxlabel(x, fontsize=_FONT)
        figure.supylabel(y, fontsize=_FONT)


def _legend_columns(width: float, methods: Sequence[str]) -> int:
    return max(1, int(width // max(_NAME, _HANDLE + _LETTER * max(map(len, methods)))))


def _legend(figure: Figure, methods: Sequence[str], styles: dict[str, _Style]) -> None:
    """Above the panels, where it covers nothing, the label of their common axis either."""
    handles: list[Line2D | Patch] = [
        Line2D(
            [],
            [],
            color=styles[name].colour,
            linestyle=styles[name].line,
            linewidth=styles[name].width,
            marker=styles[name].marker,
            markersize=4,
            label=name,
        )
        for name in methods
    ]
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=min(len(methods), _legend_columns(figure.get_figwidth(), methods)),
        fontsize=_SMALL,
        frameon=False,
        handlelength=3,
    )


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None})
    return file.getvalue()


def _methods(cells: Sequence[_C]) -> list[str]:
    return sorted({cell.method for cell in cells}, key=method_rank)


def _sorted(values: Iterable[int]) -> list[int]:
    return sorted(set(values))


def _tokens(count: int) -> str:
    """A number of tokens for a small place: 8192 as 8K."""
    return f"{count // 1024}K" if count >= 1024 and count % 1024 == 0 else str(count)


def _position_ticks(length: int) -> list[int]:
    """Four steps to the length, in whole K where there is more than that."""
    step = max(1, length // 4)
    step = step // 1024 * 1024 or step
    return list(range(0, length + 1, step))


# Longer than 250 lines: the kinds of figure share panels, styles and legends.
