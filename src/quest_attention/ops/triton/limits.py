"""What the kernels do not do yet, refused by name: metadata that scores tokens."""

from __future__ import annotations

from quest_attention.errors import BackendError
from quest_attention.forms import MetadataForm

__all__ = ["check_scores_pages"]


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
