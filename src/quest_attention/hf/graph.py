"""`DecodeGraphs`: decode steps of a model as captured CUDA graphs, so that launching costs nothing; checks too."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from quest_attention.errors import QuestError, QuestStateError, QuestWarning
from quest_attention.hf.cache import QuestCache
from quest_attention.hf.layer import QuestLayer, StorageDtypeError
from quest_attention.hf.naming import CACHE, CACHE_NAMES, given_cache
from quest_attention.hf.reading import Reading
from quest_attention.hf.storage import KVStorage
from quest_attention.ops.capture import capturing
from quest_attention.ops.query_tokens import MOST_QUERY_TOKENS

__all__ = ["DecodeGraphs"]

_INPUTS = ("input_ids", "position_ids")
_HANDLED = {*_INPUTS, *CACHE_NAMES, "attention_mask", "use_cache", "return_dict", "logits_to_keep"}
"""Arguments of a forward pass that a captured step takes; any other that is set keeps the step eager."""
_BY_CONFIG = ("output_hidden_states", "output_router_logits")
"""Arguments of a forward pass that a model takes from its configuration where they are not given."""
_WARMUPS = 2
"""Eager runs before a capture: kernels are compiled and libraries make their handles, which a capture forbids."""
_MOST_GRAPHS = 4
"""Caches that have graphs at a time; with more in turn, capturing would cost more than it spares."""
_MOST_KINDS = 11
"""Graphs of a cache: one of a decode step; where decoding is lossless two, and one of each number of checked tokens."""
_TOO_MANY = f"a pass of more than {MOST_QUERY_TOKENS} tokens, which is no check of drafts"
"""Why a pass has no graph that is a check only to `Reading`: kernels attend to no more at a time."""


class _Pass(NamedTuple):
    """What a graph is of.

    Attributes:
        starts: Tokens of each sequence before it, B of them [tokens].
        new: Tokens of each sequence that it writes [tokens].
        reading: What layers read that may choose: `SPARSE`, or `CHECK` with several tokens or one.
        ends: Tokens of each sequence with it, `[B]` int32 on the device [tokens]; None where all are alike.
        chooses: Whether it chooses what it reads, if it is sparse; otherwise a draft before it did.
    """

    starts: tuple[int, ...]
    new: int
    reading: Reading
    ends: Tensor | None = None
    chooses: bool = True

    @property
    def length(self) -> int:
        """Tokens of the longest sequence before it [tokens]."""
        return max(self.starts)

    @property
    def kind(self) -> tuple[int, Reading, bool]:
        """What one graph serves: any lengths, which it reads on the device."""
        return self.new, self.reading, self.chooses

    def set_ends(self, lengths: Tensor) -> None:
        """Write to `[B]` int32 how long the sequences are with it."""
        if self.ends is None:
            lengths.fill_(self.starts[0] + self.new)
        else:
            lengths.copy_(self.ends)


class DecodeGraphs:
    """Wraps a model's forward pass: decode steps past the budget replay a graph captured once for each cache.

    Where decoding is lossless, so do checks past the budget, with a graph for each number of tokens. A captured step
    reads its lengths on the device, so it stays right while sequences grow; another is captured only when the cache
    moves to larger storage. Steps that a graph cannot hold run as before and are counted with the reason.

    Args:
        model: The model, whose forward pass is left as it is: see `wrap`.
        must_capture: Whether a step that cannot be captured is an error, not a reason to go on without graphs.

    Attributes:
        replayed_steps: Decode steps and checks that replayed a graph [model steps].
        captures: Graphs captured.
        eager_steps: Decode steps past the budget that ran without a graph, by reason [model steps].
    """

    def __init__(self, model: Any, *, must_capture: bool = False) -> None:
        self._must_capture = must_capture
        self._failure: str | None = None
        self.replayed_steps = 0
        self.captures = 0
        self.eager_steps: dict[str, int] = {}
        self._model = model
        self._forward: Callable[..., Any] = model.forward
        self._names = tuple(inspect.signature(model.forward).parameters)
        # A model of somebody's own may know the older name alone, and leave a cache by the other unused.
        self._cache_name = next((name for name in CACHE_NAMES if name in self._names), CACHE)
        self._devices = {parameter.device for parameter in model.parameters()}
        self._graphs: weakref.WeakKeyDictionary[QuestCache, dict[tuple[int, Reading, bool], _CapturedStep]] = (
            weakref.WeakKeyDictionary()
        )
        self._takes: weakref.WeakKeyDictionary[QuestCache, _CapturedTake] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def wrap(self) -> Callable[..., Any]:
        """The forward pass that replays where it can; it has the signature of the model's own."""

        @functools.wraps(self._forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(self._names, args, strict=False)), **kwargs}
            cache, ids = given_cache(given), given.get("input_ids")
            if not isinstance(cache, QuestCache) or not isinstance(ids, Tensor):
                return self._forward(*args, **kwargs)
            reading = cache.reading_of(ids.shape[1])
            is_drafting = cache.rows is not None and cache.rows.lengths is not None
            if reading is not Reading.SPARSE and not (is_drafting and reading is Reading.CHECK):
                return self._forward(*args, **kwargs)
            starts, ends, chooses = (cache.get_seq_length(),) * ids.shape[0], None, True
            if cache.rows is not None and cache.rows.lengths is not None:
                starts, ends, chooses = cache.rows.lengths, cache.rows.ends, not cache.rows.drafts_since
            step = _Pass(starts, ids.shape[1], reading, ends, chooses)
            with self._lock:
                # What follows the end of a row is fed at once, for whoever keeps the cache.
                reason = _TOO_MANY if step.new > MOST_QUERY_TOKENS else self._why_not(cache, step, given)
                if reason is None:
                    return self._replay(cache, step, given)
                self.eager_steps[reason] = self.eager_steps.get(reason, 0) + 1
            return self._forward(*args, **kwargs)

        return forward

    def _why_not(self, cache: QuestCache, step: _Pass, kwargs: dict[str, Any]) -> str | None:
        """What keeps a step from a graph, or None."""
        set_ones = {name for name, value in kwargs.items() if value is not None and value is not False}
        of_config = {name for name in _BY_CONFIG if getattr(self._model.config, name, False)}
        others = sorted(set_ones - _HANDLED | of_config)
        if self._failure is not None:
            return self._failure
        if others:
            return f"the forward pass was given {', '.join(others)}"
        if len(self._devices) > 1:
            return "the model is spread over several devices"
        if any(torch.is_autocast_enabled(device.type) for device in self._devices):
            return "under autocast, whose copies of the weights end with it"
        layers = cache.layers
        if not all(isinstance(layer, QuestLayer) for layer in layers):
            return "the cache has layers of transformers' own, whose steps depend on a length known to the host"
        if any(isinstance(layer, QuestLayer) and layer.has_listeners for layer in layers):
            return "on_select or on_read is called at every step"
        if any(isinstance(layer, QuestLayer) and layer.capacity < step.length + step.new for layer in layers):
            return "the storage is full and grows in this step"
        if kwargs.get("use_cache") is False or kwargs.get("return_dict") is False:
            return "the forward pass was given use_cache=False or return_dict=False"
        graphs = self._graphs.get(cache)
        if graphs is not None and step.kind not in graphs and len(graphs) >= _MOST_KINDS:
            return f"{_MOST_KINDS} other numbers of tokens have graphs"
        if _has_padding(cache, kwargs.get("attention_mask")):
            return "a batch with padding"
        if graphs is None and len(self._graphs) >= _MOST_GRAPHS:
            return f"{_MOST_GRAPHS} other caches have graphs"
        return None

    def _replay(self, cache: QuestCache, step: _Pass, kwargs: dict[str, Any]) -> Any:
        inputs = {name: kwargs[name] for name in _INPUTS if kwargs.get(name) is not None}
        batch = inputs["input_ids"].shape[0]
        if "position_ids" not in inputs:  # nothing is padded, so the position is the length
            inputs["position_ids"] = torch.full((batch, 1), step.length, device=inputs["input_ids"].device)
        for layer in cache.layers:
            assert isinstance(layer, QuestLayer) and layer.storage is not None, "checked before"
            layer.storage.before_write(step.length)
        graphs = self._graphs.setdefault(cache, {})
        weights = self._weights()
        captured = graphs.get(step.kind)
        if captured is None or not captured.fits(cache, inputs, weights):
            for kind, graph in list(graphs.items()):  # their memory goes before the next one's comes
                if kind == step.kind or not graph.has_memory_of(cache, weights):
                    del graphs[kind]
            del captured
            if not graphs:
                del self._graphs[cache]
            try:
                captured = _CapturedStep(
                    self._forward, cache, inputs, step, weights, kwargs.get("logits_to_keep", 0), self._cache_name
                )
            except StorageDtypeError:
                return self._run_eagerly("the storage takes another dtype in this step", kwargs)
            except QuestError:
                raise
            except RuntimeError as error:
                return self._give_up(error, kwargs)
            self._graphs.setdefault(cache, {})[step.kind] = captured
            self.captures += 1
        outputs = captured.replay(inputs, step)
        self.replayed_steps += 1
        for layer in cache.layers:
            assert isinstance(layer, QuestLayer), "checked before"
            layer.count_captured_step(batch, step.length, step.new)
        outputs[CACHE] = cache
        return outputs

    def _give_up(self, error: RuntimeError, kwargs: dict[str, Any]) -> Any:
        """Go on without graphs: the model does something that a capture forbids, a wait for the device as a rule.

        Raises:
            QuestStateError: Graphs were asked for by name.
        """
        return self._run_eagerly(self._say_failure(error), kwargs)

    def _say_failure(self, error: RuntimeError) -> str:
        """Capture no more: the reason, which is warned of, or an error where graphs were asked for by name."""
        what = str(error).splitlines()[0]
        if self._must_capture:
            raise QuestStateError(f"cuda_graphs: got True, but a decode step cannot be captured: {what}") from error
        self._failure = f"a decode step of this model cannot be captured: {what}"
        warnings.warn(f"{self._failure}; decode steps run eagerly", QuestWarning, stacklevel=7)
        return self._failure

    def _run_eagerly(self, reason: str, kwargs: dict[str, Any]) -> Any:
        self.eager_steps[reason] = self.eager_steps.get(reason, 0) + 1
        return self._forward(**kwargs)

    def take(self, cache: QuestCache, starts: Sequence[int], ends: Sequence[int]) -> None:
        """Take tokens into the metadata of all layers at once, after a check; see `QuestCache.settle`.

        Args:
            cache: A lossless one.
            starts: Where pages begin that are taken anew, of each sequence [tokens].
            ends: Tokens of each sequence [tokens].
        """
        with self._lock:
            captured = self._takes.get(cache)
            if self._failure is None and (captured is None or captured.storages != _storages(cache)):
                self._takes.pop(cache, None)
                try:
                    captured = self._takes[cache] = _CapturedTake(cache, starts, ends)
                except QuestError:
                    raise
                except RuntimeError as error:
                    self._say_failure(error)
            if captured is not None and self._failure is None:
                captured.replay(starts, ends)
                return
        cache.take(starts, ends)

    def _weights(self) -> StorageWeakRef | None:
        """The memory of the first weights, the embeddings as a rule: another once the model is moved, cast or resized.

        As with `KVStorage` an address would not say so; PyTorch's weak reference to memory does.
        """
        first = next(self._model.parameters(), None)
        return None if first is None else StorageWeakRef(first.untyped_storage())


class _CapturedStep:
    """One decode step of a model over one cache, on fixed memory."""

    def __init__(
        self, forward: Callable[..., Any], cache: QuestCache, inputs: dict[str, Tensor], step: _Pass,
        weights: StorageWeakRef | None, logits_to_keep: int | Tensor, cache_name: str,
    ) -> None:  # fmt: skip
        self.inputs = {name: value.clone() for name, value in inputs.items()}
        ids = self.inputs["input_ids"]
        self.lengths = torch.empty(ids.shape[:1], dtype=torch.int32, device=ids.device)
        step.set_ends(self.lengths)
        self.storages = _storages(cache)
        self.weights = weights
        layers = [layer for layer in cache.layers if isinstance(layer, QuestLayer)]
        # Of several tokens a model would make a mask for a length; one that is made already it takes as it is, and the
        # attention of a captured pass asks the lengths alone.
        mask = None if step.new == 1 else torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)
        given = {**self.inputs, cache_name: cache, "attention_mask": mask, "logits_to_keep": logits_to_keep}
        run = functools.partial(forward, **given, use_cache=True, return_dict=True)
        told = [layer.counter.read_on(ids.device) for layer in layers if layer.counter.is_told_by_device]
        before = [counted.clone() for counted in told]
        for layer in layers:
            layer.captured_lengths = self.lengths
        try:
            self.run, self.outputs = _capture(run, ids.device)
        finally:
            for counted, number in zip(told, before, strict=True):
                counted.copy_(number)  # what ran so that it could be captured is no step
            for layer in layers:
                layer.captured_lengths = None
                if step.new == 1:
                    layer.take_again(step.starts)  # a form that is no bound must not take in the token of each run
        self.outputs[CACHE] = None  # the graph must not keep the cache alive

    def fits(self, cache: QuestCache, inputs: dict[str, Tensor], weights: StorageWeakRef | None) -> bool:
        """Whether cache, inputs and weights are still those that were captured."""
        shapes = {name: value.shape for name, value in inputs.items()}
        same_shapes = shapes == {name: value.shape for name, value in self.inputs.items()}
        return same_shapes and self.has_memory_of(cache, weights)

    def has_memory_of(self, cache: QuestCache, weights: StorageWeakRef | None) -> bool:
        """Whether the memory that was captured is still that of the cache and the weights."""
        return (self.storages, self.weights) == (_storages(cache), weights)

    def replay(self, inputs: dict[str, Tensor], step: _Pass) -> Any:
        """Run it for other tokens and lengths; the outputs are the caller's."""
        for name, value in inputs.items():
            self.inputs[name].copy_(value)
        step.set_ends(self.lengths)
        self.run()
        outputs = copy.copy(self.outputs)
        for name, value in self.outputs.items():
            if isinstance(value, Tensor):
                outputs[name] = value.clone()  # the next replay writes over ours
        return outputs


class _CapturedTake:
    """Taking tokens into the metadata of all layers of a cache, on fixed memory: a launch for each is spared."""

    def __init__(self, cache: QuestCache, starts: Sequence[int], ends: Sequence[int]) -> None:
        self.storages = _storages(cache)
        layers = [layer.storage for layer in cache.layers if isinstance(layer, QuestLayer)]
        held = [weakref.ref(storage) for storage in layers if storage is not None]
        device = next(layer.device for layer in cache.layers if isinstance(layer, QuestLayer))
        self.lengths = torch.tensor([list(starts), list(ends)], dtype=torch.int32, device=device)

        def run() -> dict[str, Tensor]:
            for storage in held:
                kept = storage()
                assert kept is not None, "the cache has it"
                kept.take(self.lengths[0], self.lengths[1])
            return {}

        self._run, _ = _capture(run, device)  # again and again gives the same: pages start anew

    def replay(self, starts: Sequence[int], ends: Sequence[int]) -> None:
        """Take others."""
        self.lengths.copy_(torch.tensor([list(starts), list(ends)], dtype=torch.int32))
        self._run()


def _capture(run: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """Capture `run` as a CUDA graph: what replays it, and the outputs it writes to."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(side):
            for _ in range(_WARMUPS):  # a step that is run again writes the same token at the same place
                run()
    finally:  # an eager step that comes in its place waits for what was written
        torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), capturing(graph):
        outputs = run()
    return graph.replay, outputs


def _has_padding(cache: QuestCache, mask: Tensor | None) -> bool:
    """Whether a mask says more than lengths do."""
    if cache.rows is not None and cache.rows.lengths is not None:
        return cache.rows.padding is not None  # the mask of such a pass is made of lengths, for layers without a graph
    # Waits for the device, as generate() does itself after each step to see whether all sequences have ended.
    return mask is not None and (mask.dim() != 2 or not bool(mask.all()))


def _storages(cache: QuestCache) -> list[weakref.ref[KVStorage] | None]:
    """What the layers keep their tokens in, compared as objects, not by address: see `KVStorage`.

    A weak reference equals another while both lead to the same storage, and after its end only itself.
    """
    storages = [layer.storage for layer in cache.layers if isinstance(layer, QuestLayer)]
    return [None if storage is None else weakref.ref(storage) for storage in storages]
