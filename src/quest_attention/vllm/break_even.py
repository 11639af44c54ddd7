"""`break_even_note`: past which context a sequence alone gains from Quest, on devices where that was measured."""

from __future__ import annotations

__all__ = ["MEASURED", "break_even_note"]

MEASURED = {("NVIDIA H200", "bounds"): 8192, ("NVIDIA H200", "sketch"): 32768, ("cpu", "bounds"): 8192}
"""Of a device and a form of metadata, the longest context measured at which one sequence did not gain [tokens].

From docs/vllm.md, How fast: the shape of Llama-3.1-8B in vLLM 0.25.1, on a CPU a small model in 0.32. Less than 2 %
faster than the stock backend is no gain.
"""


def break_even_note(device: str, metadata: str) -> str:
    """What a worker's log says of where Quest begins to pay.

    Args:
        device: The name of a GPU, or "cpu".
        metadata: The form of the pages' metadata.

    >>> break_even_note("NVIDIA H200", "sketch")
    'of 32768 tokens a sequence alone did not gain on this device, and of the next more that were measured it did; many at once gain earlier (docs/vllm.md, How fast)'
    >>> break_even_note("NVIDIA L4", "sketch")
    'where NVIDIA L4 gains with sketch was not measured: compare with a server without Quest (docs/vllm.md, How fast)'
    """  # noqa: E501 (a message)
    context = MEASURED.get((device, metadata))
    if context is None:
        found = f"where {device} gains with {metadata} was not measured: compare with a server without Quest"
    else:
        found = (
            f"of {context} tokens a sequence alone did not gain on this device, and of the next more that were "
            "measured it did; many at once gain earlier"
        )
    return f"{found} (docs/vllm.md, How fast)"
