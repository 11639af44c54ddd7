"""`QuestCounters`: was Quest active, and how much of the cache did it read."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from quest_attention.config import QuestConfig
from quest_attention.hf.draft_counter import DraftCounter
from quest_attention.hf.fetch_counter import FetchCounter, Fetches
from quest_attention.hf.reading import Reading

__all__ = ["LayerCounter", "QuestCounters"]


class LayerCounter:
    """Decode steps of one attention layer. A decode step is a forward pass of one token per sequence.

    Attributes:
        layer: Index in the model.
        kind: `"quest"`, `"dense"` (among the leading dense layers), `"windowed"` or another reason why it is untouched.
        sparse_steps: Steps that read the selected pages only [steps].
        dense_steps: Steps that read everything [steps], by reason: `"dense layer"`, `"within budget"`, and of lossless
            decoding `"check"`: a check of drafts, which reads once for all of them, or a step without drafts.
        bypassed_steps: Steps whose keys the model never handed to Quest's attention [steps].
        prefill_tokens: Tokens per sequence that came in passes of several tokens (prefill, verification) [tokens].
        metadata: By what the sparse steps chose; "auto" until the device is known, by the first tokens.
        page_size: Of the cache [tokens].
        unit_size: Of what steps select [tokens].
        tokens_held: Tokens a dense layer would have read in the counted steps, per KV head, over all sequences, in
            whole units [tokens].
        keys_read: Tokens of which the counted steps read keys, likewise: those of `tokens_read`, or where keys rank
            candidates those of the candidates, which are more [tokens].
        fetched: What came from host memory, where keys and values lie there.
    """

    def __init__(self, layer: int, kind: str, config: QuestConfig) -> None:
        self.layer = layer
        self.kind = kind
        self.fetched = FetchCounter()
        self._tokens_read_on_device: Tensor | None = None
        self.count_by(config)
        self._lock = threading.Lock()
        self.reset()

    def count_by(self, config: QuestConfig) -> None:
        """Count what this config reads: said again when its metadata "auto" has become a form, before a step is."""
        is_open = config.metadata == "auto"
        self.metadata = config.metadata
        self.page_size = config.page_size
        self.unit_size = config.page_size if is_open else config.unit_size
        self._ranks_by_keys = not is_open and config.candidate_budget > 0
        # Kernels then read what passes a threshold, and only the device knows how much.
        self.is_told_by_device = (
            not is_open and config.scores_tokens and self.unit_size == 1 and not self._ranks_by_keys
        )

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the lock, so that a cache can be copied with its counters."""
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def reset(self) -> None:
        """Forget everything counted. What the device counts stays where it is: captured steps add to it."""
        self.sparse_steps = 0
        self.dense_steps_by_reason: dict[str, int] = {}
        self.prefill_tokens = 0
        self.tokens_held = 0
        self._tokens_read = 0
        self._keys_ranked = 0
        if self._tokens_read_on_device is not None:
            self._tokens_read_on_device.zero_()
        self._updates = 0
        self.fetched.reset()

    @property
    def dense_steps(self) -> int:
        """Decode steps that read everything [steps]."""
        return sum(self.dense_steps_by_reason.values())

    @property
    def bypassed_steps(self) -> int:
        """Decode steps whose keys never reached Quest's attention function [steps]."""
        return max(0, self._updates - self.sparse_steps - self.dense_steps)

    @property
    def tokens_read(self) -> int:
        """Tokens that the counted steps read, counted as those held [tokens]. Waits for the device."""
        on_device = self._tokens_read_on_device
        return self._tokens_read + (0 if on_device is None else int(on_device))

    @property
    def keys_read(self) -> int:
        """Tokens of which the counted steps read keys, chosen or not [tokens]. Waits for the device."""
        return self._keys_ranked if self._ranks_by_keys else self.tokens_read

    @property
    def pages_read(self) -> int | None:
        """Pages that the counted steps read, likewise [pages]; None where they select less than pages."""
        return self.tokens_read // self.page_size if self.unit_size == self.page_size else None

    @property
    def pages_held(self) -> int | None:
        """Pages a dense layer would have read in the counted steps, likewise [pages]."""
        return self.tokens_held // self.page_size if self.unit_size == self.page_size else None

    def count_update(self, reading: Reading, num_tokens: int) -> None:
        """The cache took `num_tokens` new tokens of each sequence."""
        with self._lock:
            if reading.is_step:
                self._updates += 1
            else:
                self.prefill_tokens += num_tokens

    def count_dense(self, reading: Reading, tokens: int) -> None:
        """A decode step read all `tokens`."""
        with self._lock:
            self.dense_steps_by_reason[reading.value] = self.dense_steps_by_reason.get(reading.value, 0) + 1
            self._tokens_read += tokens
            self._keys_ranked += tokens
            self.tokens_held += tokens

    def count_sparse(self, tokens_read: int | Tensor, tokens_held: int, keys_ranked: int = 0) -> None:
        """A decode step read `tokens_read` of `tokens_held`; a tensor stays on its device until somebody looks.

        Tokens were ranked by `keys_ranked` keys, where they are ranked by keys.
        """
        with self._lock:
            self.sparse_steps += 1
            self.tokens_held += tokens_held
            self._keys_ranked += keys_ranked
            if isinstance(tokens_read, int):
                self._tokens_read += tokens_read
            else:
                self.read_on(tokens_read.device).add_(tokens_read)

    def read_on(self, device: torch.device) -> Tensor:
        """What a device has counted, `[]` int64, to be added to there: captured steps do so each time [tokens]."""
        counted = self._tokens_read_on_device
        if counted is None or counted.device != device:
            self._tokens_read += 0 if counted is None else int(counted)
            with torch.inference_mode(False):  # or nobody could add to it, or reset it, outside of that mode
                self._tokens_read_on_device = counted = torch.zeros([], dtype=torch.int64, device=device)
        return counted

    def to_dict(self) -> dict[str, Any]:
        """Everything counted, ready for JSON."""
        return {
            "layer": self.layer,
            "kind": self.kind,
            "sparse_steps": self.sparse_steps,
            "dense_steps": dict(self.dense_steps_by_reason),
            "bypassed_steps": self.bypassed_steps,
            "prefill_tokens": self.prefill_tokens,
            **_reads(self),
            **({} if (fetches := self.fetched.fetches) is None else {"fetches": fetches.to_dict()}),
        }


class QuestCounters:
    """Counters of every attention layer of a model, summed over the caches that share them.

    Attributes:
        layers: One counter per attention layer, in the order of the model.
        drafts: What became of drafted tokens, where decoding is lossless, else None.
    """

    def __init__(self, layers: list[LayerCounter], drafts: DraftCounter | None = None) -> None:
        self.layers = layers
        self.drafts = drafts

    @property
    def sparse_steps(self) -> int:
        """Decode steps that read selected pages only, summed over layers [layer steps]."""
        return sum(layer.sparse_steps for layer in self.layers)

    @property
    def dense_steps(self) -> int:
        """Decode steps that read everything, summed over layers [layer steps]."""
        return sum(layer.dense_steps for layer in self.layers)

    @property
    def bypassed_steps(self) -> int:
        """Decode steps that never reached Quest's attention function, summed over layers [layer steps]."""
        return sum(layer.bypassed_steps for layer in self.layers)

    @property
    def tokens_read(self) -> int:
        """Tokens read per KV head, over layers, sequences and steps, in whole units [tokens]."""
        return sum(layer.tokens_read for layer in self.layers)

    @property
    def tokens_held(self) -> int:
        """Tokens that reading everything would have read, counted as `tokens_read` [tokens]."""
        return sum(layer.tokens_held for layer in self.layers)

    @property
    def keys_read(self) -> int:
        """Tokens of which keys were read, counted as `tokens_read`; more where keys rank tokens [tokens]."""
        return sum(layer.keys_read for layer in self.layers)

    @property
    def pages_read(self) -> int | None:
        """Pages read per KV head, over layers, sequences and steps [pages]; None where steps select less than pages."""
        return _sum(layer.pages_read for layer in self.layers)

    @property
    def pages_held(self) -> int | None:
        """Pages that reading everything would have read, counted as `pages_read` [pages]."""
        return _sum(layer.pages_held for layer in self.layers)

    @property
    def fetches(self) -> Fetches | None:
        """What came from host memory, over layers; None where keys and values are on the device."""
        counted = [fetches for layer in self.layers if (fetches := layer.fetched.fetches) is not None]
        return Fetches.total(counted) if counted else None

    @property
    def metadata(self) -> str | None:
        """By what the layers with Quest choose: `"moments"`, say. None where there is none such."""
        return next((layer.metadata for layer in self.layers if layer.kind == "quest"), None)

    @property
    def share_read(self) -> float:
        """Share of the KV cache that the counted decode steps read, 0 to 1; 1 when nothing was counted."""
        return self.tokens_read / self.tokens_held if self.tokens_held else 1.0

    def reset(self) -> None:
        """Forget everything counted, in every layer."""
        for layer in self.layers:
            layer.reset()
        if self.drafts is not None:
            self.drafts.reset()

    def to_dict(self) -> dict[str, Any]:
        """Everything counted, ready for JSON."""
        return {
            "sparse_steps": self.sparse_steps,
            "dense_steps": self.dense_steps,
            "bypassed_steps": self.bypassed_steps,
            "metadata": self.metadata,
            **_reads(self),
            "share_read": self.share_read,
            **({} if (fetches := self.fetches) is None else {"fetches": fetches.to_dict()}),
            **({} if self.drafts is None else {"drafts": self.drafts.to_dict()}),
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def summary(self) -> str:
        """A table of one line per layer and a line for the whole."""
        of_tokens = self.pages_read is None
        what = "tokens" if of_tokens else "pages"
        rows: list[tuple[object, ...]] = [("layer", "kind", "sparse", "dense", f"{what} read", f"{what} held", "read")]
        counted: list[LayerCounter | QuestCounters] = [*self.layers, self]
        for each in counted:
            name = (each.layer, each.kind) if isinstance(each, LayerCounter) else ("all", "")
            steps, read, held = (each.sparse_steps, each.dense_steps), each.tokens_read, each.tokens_held
            shown = (read, held) if of_tokens else (each.pages_read, each.pages_held)
            rows.append((*name, *steps, *shown, f"{read / held:.1%}" if held else "-"))
        lines = ["{:>5}  {:<12} {:>8} {:>8} {:>12} {:>12} {:>7}".format(*row) for row in rows]
        if self.sparse_steps:
            lines.append(f"sparse steps chose by {self.metadata}")
        if self.keys_read != self.tokens_read:
            lines.append(f"values of {self.tokens_read} tokens were read, and keys of {self.keys_read}, to rank them")
        if self.fetches is not None:
            lines.append(self.fetches.summary())
        if self.drafts is not None:
            lines.append(self.drafts.summary())
        if self.bypassed_steps:
            lines.append(f"{self.bypassed_steps} layer steps never reached Quest's attention and read everything")
        return "\n".join(lines)


def _sum(counts: Iterable[int | None]) -> int | None:
    """Of pages, if all layers count in them."""
    known = list(counts)
    return None if None in known else sum(count for count in known if count is not None)


def _reads(counted: LayerCounter | QuestCounters) -> dict[str, int]:
    """What was read, ready for JSON: tokens always, pages where steps select pages."""
    tokens = {"tokens_read": counted.tokens_read, "tokens_held": counted.tokens_held}
    if counted.keys_read != counted.tokens_read:
        tokens["keys_read"] = counted.keys_read
    pages_read, pages_held = counted.pages_read, counted.pages_held
    if pages_read is None or pages_held is None:
        return tokens
    return {"pages_read": pages_read, "pages_held": pages_held, **tokens}
