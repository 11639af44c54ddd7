"""What the kernels do not do yet, refused by name: units smaller than a page, metadata that scores tokens."""

from __future__ import annotations

from quest_attention.errors import BackendError
from quest_attention.forms import MetadataForm

__all__ = ["check_scores_pages", "check_units_are_pages"]


def check_scores_pages(form: MetadataForm) -> None:
    """Refuse a form that scores tokens.

    Raises:
        BackendError: It does.
    """
    if form.scores != "page":
        raise BackendError(
            f"backend: got 'triton' for {form.name}, which scores tokens, expected metadata that scores pages: "
            "backend 'torch' can"
        )


def check_units_are_pages(unit_size: int, page_size: int) -> None:
    """Refuse units of fewer tokens than a page has.

    Raises:
        BackendError: A unit is no page.
    """
    if unit_size != page_size:
        raise BackendError(
            f"backend: got 'triton' for units of {unit_size} of the {page_size} tokens of a page, expected pages: "
            "backend 'torch' can"
        )
