"""Measure how well what a layer will read is known a layer ahead, as fetching from host memory early would want it.

    python benchmarks/layer_ahead.py --model qwen.gguf --books books --context 30000 --output layer_ahead.json

A text is read by dense attention up to a place, then goes on by its own tokens, one decode step with Quest each, as in
`hit_rates.py`. Each layer that chooses does so twice more, by queries that are there before the layer before has run:

    projected    what enters the layer before, through this layer's own norm, projection and rotation
    neighbour's  the query of the layer before as it is

What is said is the share of the units a step reads that such a query finds: of all, and of the new ones, which the step
before did not read. Those are what a pool of hot tokens is least likely to hold. Units that every step reads, the first
and the last ones, count too. Models of Llama's shape alone: their layers say how a query is made.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

import torch
import typer
from acceptance import config_of
from rich.console import Console
from rich.table import Table
from texts import (
    ALL_KINDS,
    BooksOption,
    DeviceOption,
    DtypeOption,
    KindsOption,
    ModelOption,
    NameOption,
    going_on,
    kinds_of,
    read_text,
    step_on,
)
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from quest_attention import QuestConfig, Selection
from quest_attention.bench.record import write_record
from quest_attention.cli.app import split_list
from quest_attention.cli.loading import load_model
from quest_attention.errors import UnsupportedModelError

WAYS = ("projected", "neighbour's")


class LayersAhead:
    """Chooses for each layer by the queries of one before, and compares with what the layer then reads.

    Args:
        model: Of Llama's shape.
        cache: A `QuestCache` that its decode steps fill.

    Attributes:
        found: `[layers, 2, 1 + ways]` counts: of all units and of new ones, how many were read, then how many of these
            each way found.
    """

    def __init__(self, model: Any, cache: Any) -> None:
        self._layers = model.model.layers
        self._cache = cache
        self._projected: Tensor | None = None
        self._query: Tensor | None = None
        self._ahead: tuple[int, Tensor | None] = (0, None)  # for which layer, and its query
        self._before: dict[int, list[set[int]]] = {}
        self.found = torch.zeros(len(self._layers), 2, 1 + len(WAYS), dtype=torch.int64)
        self._hooks = [
            layer.register_forward_pre_hook(self._project_for(index + 1), with_kwargs=True)
            for index, layer in enumerate(self._layers[:-1])
        ]
        for layer in cache.layers:
            layer.on_read = self._compare

    def remove(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()

    def _project_for(self, index: int) -> Any:
        """A hook before the layer ahead of `index`, which makes the query of `index` from what enters there."""

        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self._ahead = (index, self._query_of(index, hidden, *kwargs["position_embeddings"]))

        return hook

    def _query_of(self, index: int, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        layer = self._layers[index]
        attention = layer.self_attn
        query = attention.q_proj(layer.input_layernorm(hidden))
        query = query.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # [B, HQ, 1, D]
        turned: Tensor = apply_rotary_pos_emb(query, query, cos, sin)[0]
        return turned

    def _compare(self, layer: int, selection: Selection, query: Tensor, keys: Tensor, **kwargs: Any) -> None:
        """A step of a layer that chose: called with what it read."""
        del keys
        read = units_of(selection)
        own = query[:, :, 0].clone()
        # The hook of the layer before left its query for this one; by now this layer's own hook has left the next.
        guesses = {"projected": self._projected, "neighbour's": self._query}
        if layer in self._before and all(guess is not None for guess in guesses.values()):
            stored = self._cache.layers[layer]
            new = [units - old for units, old in zip(read, self._before[layer], strict=True)]
            ways = []
            for guess in guesses.values():
                assert guess is not None
                output = stored.storage.decode(guess, stored.seq_lens, sm_scale=kwargs.get("scaling"))
                ways.append(units_of(output.selected))
            for row, units in enumerate((read, new)):
                self.found[layer, row, 0] += sum(map(len, units))
                for way, guessed in enumerate(ways):
                    same = sum(len(wanted & some) for wanted, some in zip(units, guessed, strict=True))
                    self.found[layer, row, 1 + way] += same
        self._before[layer] = read
        self._query = own
        ahead, made = self._ahead
        self._projected = made[:, :, 0] if made is not None and ahead == layer + 1 else None


def units_of(selection: Selection) -> list[set[int]]:
    """The units of each KV head of one sequence."""
    rows = zip(selection.units[0].tolist(), selection.counts[0].tolist(), strict=True)
    return [set(units[:count]) for units, count in rows]


def look_ahead(model: Any, source: Any, text: list[int], config: QuestConfig) -> Tensor:
    """What is found of the units that the steps of a text read: see `LayersAhead.found`."""
    with going_on(model, source, len(text), config) as cache:
        ahead = LayersAhead(model, cache)
        try:
            for token in text:
                step_on(model, cache, token)
        finally:
            ahead.remove()
    return ahead.found


def shares_of(found: Tensor) -> dict[str, Any]:
    """Shares over all layers, and by layer, of what was compared."""
    row: dict[str, Any] = {}
    for nth, which in enumerate(("all", "new")):
        total = found[:, nth].sum(0).tolist()
        row[f"{which}_units"] = total[0]
        for way, name in enumerate(WAYS):
            row[f"{which}_found_{name}"] = total[1 + way] / total[0]
            layers = {
                layer: (counts[1 + way] / counts[0]).item() for layer, counts in enumerate(found[:, nth]) if counts[0]
            }
            row[f"{which}_found_{name}_by_layer"] = layers
    return row


def main(
    model: ModelOption = "",
    name: NameOption = "",
    books: BooksOption = None,
    context: Annotated[int, typer.Option(help="Tokens read before the first step.", min=64)] = 7680,
    arms: Annotated[str, typer.Option(help="Metadata and budget, comma-separated.")] = (
        "bounds@2048,sketch,selection_unit=token@512"
    ),
    kinds: KindsOption = ALL_KINDS,
    steps: Annotated[int, typer.Option(help="Decode steps of each text.", min=2)] = 64,
    dense_layers: Annotated[int, typer.Option(help="Leading layers that are read whole.", min=0)] = 2,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    seed: Annotated[int, typer.Option(help="Of the texts.")] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure how much of what a layer reads its query is known by a layer ahead."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    loaded = load_model(model or None, device=device, dtype=dtype)
    runner: Any = loaded.model
    shape = getattr(getattr(runner, "model", None), "layers", None)
    if shape is None or not hasattr(shape[0].self_attn, "q_proj") or hasattr(shape[0].self_attn, "q_norm"):
        raise UnsupportedModelError(f"layer_ahead: got {type(runner).__name__}, expected a model of Llama's shape")
    table = Table("text", "arm", *(f"{which}, {way}" for which in ("all", "new") for way in WAYS))
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for kind in kinds_of(kinds, loaded.tokenizer):
            source, text = read_text(loaded, kind, books, context, steps, seed)
            for arm in split_list(arms):
                shares = shares_of(look_ahead(runner, source, text, config_of(arm, dense_layers)))
                rows.append({"model": name or loaded.name, "context": context, "text": kind, "arm": arm} | shares)
                shown = [shares[f"{which}_found_{way}"] for which in ("all", "new") for way in WAYS]
                table.add_row(kind, arm, *(f"{share:.1%}" for share in shown))
            del source
            if output is not None:
                settings = {"steps": steps, "num_dense_layers": dense_layers, "dtype": str(runner.dtype), "seed": seed}
                write_record(output, settings, rows)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
