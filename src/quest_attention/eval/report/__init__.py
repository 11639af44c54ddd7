"""The report of an evaluation run: its numbers, figures and one page to read them on."""

from __future__ import annotations

import json
from pathlib import Path

from quest_attention.errors import QuestStateError
from quest_attention.eval.report.results import SUMMARY, Results, from_summary, read_results
from quest_attention.eval.report.tables import accuracy_rows, continuation_rows, perplexity_rows, recall_rows
from quest_attention.eval.run_folder import write_whole

__all__ = [
    "Results",
    "accuracy_rows",
    "continuation_rows",
    "perplexity_rows",
    "read_results",
    "recall_rows",
    "write_report",
]

_FIGURES = "figures"
_PAGE = "report.html"


def write_report(folder: Path) -> Path:
    """Write `summary.json`, `figures/*.png` and `report.html` into the folder of a run.

    The same run gives the same files, and so does its summary alone.

    Args:
        folder: As `read_results` takes it.

    Returns:
        The page.

    Raises:
        QuestValueError: The folder or a file of it is missing, or a line of it is broken; the message names the line.
        QuestStateError: matplotlib or jinja2 is not installed, or a file could not be written.
    """
    results = read_results(folder)
    try:  # heavy, and needed for this alone
        from quest_attention.eval.report.figures import draw_pictures  # noqa: PLC0415
        from quest_attention.eval.report.page import make_page  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise QuestStateError(
            f"a report needs {error.name}, which is not installed: in a clone, pip install '.[report]'"
        ) from error
    summary = results.summary()
    text = json.dumps(summary, indent=1, ensure_ascii=False)
    write_whole(folder / SUMMARY, text + "\n")  # it may be all there is of the run
    results = from_summary(summary, folder / SUMMARY)
    pictures = draw_pictures(results)
    figures = folder / _FIGURES
    figures.mkdir(exist_ok=True)
    for picture in pictures:
        write_whole(figures / f"{picture.name}.png", picture.png)
    page = folder / _PAGE
    write_whole(page, make_page(results, pictures))
    return page
