"""A worker whose cache in 8 bits has scales that a test knows."""

from __future__ import annotations

from typing import Any


class KnownScales:
    """A part of a worker extension."""

    model_runner: Any

    def set_scales(self, query: float, key: float, value: float) -> None:
        """Scales of a cache in 8 bits, as a checkpoint would bring them."""
        for layer in self.model_runner.compilation_config.static_forward_context.values():
            for name, scale in (("_q_scale", query), ("_k_scale", key), ("_v_scale", value)):
                getattr(layer, name).fill_(scale)
                setattr(layer, f"{name}_float", scale)
