"""Ways to generate, for metadata that has to stay right in each of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tiny import generate, prompt

__all__ = ["WAYS", "tokens_of"]

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "padded": {"padded": 13},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},  # tokens are taken back
    "chunked prefill": {"prefill_chunk_size": 16},
}


def tokens_of(model: Any, way: str) -> Tensor:
    """What a way to generate makes, of two sequences where it can."""
    options = dict(WAYS[way])
    ids = prompt(batch=1 if "lookup" in way else 2)
    ids[0, : options.pop("padded", 0)] = 0
    return generate(model, ids, attention_mask=(ids != 0).long(), **options)
