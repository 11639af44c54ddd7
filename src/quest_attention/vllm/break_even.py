"""`break_even_note`: from which context on a sequence alone gains from Quest, on devices where that was measured."""

from __future__ import annotations

__all__ = ["MEASURED", "break_even_note"]

MEASURED = {("NVIDIA H200", "bounds"): 32768, ("NVIDIA H200", "sketch"): 32768, ("cpu", "bounds"): 16384}
"""Of a device and a form of metadata, the shortest context measured at which one sequence gained [tokens].

From docs/vllm.md, How fast: the shape of Llama-3.1-8B in vLLM 0.33 (bounds: in 0.25.1 too, where 8K did not gain), on a
CPU a small model in 0.32. Sketches by estimates alone, the default; 512 tokens ranked by keys take 1 % longer than
bounds, which gain 10 %. Less than 2 % faster than the stock backend is no gain.
"""


def break_even_note(device: str, metadata: str) -> str:
    """What a worker's log says of where Quest begins to pay.

    Args:
        device: The name of a GPU, or "cpu".
        metadata: The form of the pages' metadata.

    >>> break_even_note("NVIDIA H200", "sketch")
    'a sequence alone gains from 32768 tokens on, the fewest measured on this device at which it did (docs/vllm.md, How fast)'
    >>> break_even_note("NVIDIA L4", "sketch")
    'where NVIDIA L4 gains with sketch was not measured: compare with a server without Quest (docs/vllm.md, How fast)'
    """  # noqa: E501 (a message)
    context = MEASURED.get((device, metadata))
    if context is None:
        found = f"where {device} gains with {metadata} was not measured: compare with a server without Quest"
    else:
        found = f"a sequence alone gains from {context} tokens on, the fewest measured on this device at which it did"
    return f"{found} (docs/vllm.md, How fast)"
