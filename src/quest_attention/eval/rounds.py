"""Rounds of an evaluation: what is measured first, and what then depends on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from quest_attention.eval.methods import Full
from quest_attention.eval.plan import Arm, Plan
from quest_attention.eval.pool import Round
from quest_attention.eval.report import read_results
from quest_attention.eval.tasks import TASKS

__all__ = ["make_rounds"]


def make_rounds(plan: Plan, open_jobs: Round, folder: Path, tell: Callable[[str], None]) -> Iterator[Round]:
    """All at once; with `least_full` what full attention has to answer first, then the tasks that it can do.

    Args:
        plan: What is measured.
        open_jobs: Samples with the arms that have not answered them.
        folder: Of the run: the answers of the first round are read from it when the second is asked for.
        tell: Takes a line about what is left to full attention.
    """
    if not plan.least_full or TASKS.keys().isdisjoint(plan.tasks):
        yield open_jobs
        return
    yield [(job, own) for job, arms in open_jobs if job.task in TASKS and (own := [a for a in arms if _is_full(a)])]
    found = read_results(folder)
    full = {(cell.task, cell.length): cell.score for cell in found.accuracy if cell.token_budget is None}
    able = {place for place, score in full.items() if score >= plan.least_full}
    for length in plan.lengths:
        if unable := [task for task in plan.tasks if task in TASKS and (task, length) not in able]:
            what = f"{', '.join(unable)} at {length} tokens"
            tell(f"quest: full attention is right in less than {plan.least_full} % of {what}: left to it alone")
    rest = [(job, arms) for job, arms in open_jobs if job.task not in TASKS]
    rest += [
        (job, others)
        for job, arms in open_jobs
        if (job.task, job.length) in able and (others := [arm for arm in arms if not _is_full(arm)])
    ]
    yield rest


def _is_full(arm: Arm) -> bool:
    return arm.method == Full.name
