"""`Lossless`: a model's `generate()` while Quest drafts and the model checks."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GenerateDecoderOnlyOutput

from quest_attention.errors import QuestValueError, UnsupportedModelError
from quest_attention.hf.cache import OnTake, QuestCache, layer_kinds
from quest_attention.hf.draft_counter import DraftCounter
from quest_attention.hf.draft_length import MOST_DRAFTS, DraftLength, DraftTokens
from quest_attention.hf.drafting import Drafting, check_positions
from quest_attention.hf.emission import Emission
from quest_attention.hf.naming import CACHE
from quest_attention.hf.prefixes import Prefixes

__all__ = ["Lossless", "check_can_draft"]

_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_WITHOUT = "with lossless=True"
_SETTINGS = {
    "assistant_early_exit": None,
    "prompt_lookup_num_tokens": None,
    "use_mtp": False,
    "num_beams": 1,
    "penalty_alpha": None,
    "dola_layers": None,
}
"""What makes `generate()` another mode, by the value that does not."""


def check_can_draft(model: Any, quest: Any) -> None:
    """Refuse a model whose drafted tokens could not be taken back.

    Windowed layers of transformers drop what leaves the window, and linear ones have no past to go back to; of a latent
    cache the keys are made anew at each pass, which rows of their own lengths would not survive.

    Raises:
        UnsupportedModelError: It has such layers, or takes no positions.
    """
    kinds = layer_kinds(model.config, quest)
    layers = len(DynamicCache(config=model.config).layers)
    others = sorted({kind for kind in kinds.values() if kind not in ("quest", "dense")})
    if len(kinds) < layers:
        others.append("linear")
    name = type(model).__name__
    if others:
        raise UnsupportedModelError(
            f"lossless: got {name}, expected a model whose layers all have full attention: this one has "
            f"{' and '.join(others)} layers, from which drafted tokens cannot be taken back"
        )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError(
            f"lossless: got {name}, expected a model that takes position_ids: rows accept different numbers of drafts"
        )


class Lossless:
    """What stands in the places of a model's methods, so that `generate()` drafts and checks.

    `generate()` looks its decode loops up in the class of the model, not on the model, so a method put there is never
    called. It does take one as an argument, `custom_generate`; but then forgets tokenizer and streamer, which
    `extract` keeps.

    Args:
        model: On which Quest is being enabled.
        draft_tokens: Before each check [tokens].
        counter: Where drafts are counted.
        take: Takes tokens into the metadata by a graph, where passes have graphs.
    """

    def __init__(self, model: Any, draft_tokens: DraftTokens, counter: DraftCounter, take: OnTake | None) -> None:
        self._take = take
        self._model = model
        self._draft_tokens = draft_tokens
        self._counter = counter
        self._generate = model.generate
        self._extract = model._extract_generation_mode_kwargs

    def methods(self) -> dict[str, Any]:
        """What to put on the model, by name."""

        @functools.wraps(self._generate)
        def generate(*args: Any, **kwargs: Any) -> Any:
            for name in ("custom_generate", "assistant_model"):
                if kwargs.get(name) is not None:
                    got = type(kwargs[name]).__name__
                    raise QuestValueError(name, got, f"None {_WITHOUT}, whose drafts are the model's own")
            return self._generate(*args, **kwargs | {"custom_generate": self._decode})

        def extract(custom_generate: Any, *args: Any, **kwargs: Any) -> Any:
            return self._extract(None if custom_generate == self._decode else custom_generate, *args, **kwargs)

        return {"generate": generate, "_extract_generation_mode_kwargs": extract}

    def check(self, generation_config: Any, cache: Any, mode: Any) -> None:
        """Refuse what no draft can be made for, before there is a cache.

        Raises:
            QuestValueError: As said.
        """
        for name, plain in _SETTINGS.items():
            got = getattr(generation_config, name, plain)
            if mode not in _MODES and got not in (plain, None):
                raise QuestValueError(name, got, f"{plain} {_WITHOUT}: greedy decoding or sampling alone are checked")
        if mode not in _MODES:
            raise QuestValueError("generation mode", str(mode), f"greedy decoding or sampling {_WITHOUT}")
        if generation_config.use_cache is False:
            raise QuestValueError("use_cache", False, f"True {_WITHOUT}: drafts and checks share a cache")
        if generation_config.is_assistant:
            raise QuestValueError("is_assistant", True, f"False {_WITHOUT}: drafts of another model's need no check")
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(generation_config, name):
                raise QuestValueError(name, True, f"False {_WITHOUT}: a check has those of several tokens")
        if cache is not None and (not isinstance(cache, QuestCache) or cache.rows is None):
            got = type(cache).__name__
            got = "a QuestCache of sparse steps" if isinstance(cache, QuestCache) else got
            raise QuestValueError(CACHE, got, "a cache of the handle's make_cache(), or none, with lossless=True")

    def _decode(
        self, model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
        synced_gpus: bool = False, streamer: Any = None, tokenizer: Any = None, **model_kwargs: Any,
    ) -> Any:  # fmt: skip
        """Stands in for `_sample`, whose arguments it has and whose result it gives."""
        del tokenizer  # the stopping criteria have it
        if synced_gpus:
            raise QuestValueError("synced_gpus", True, f"False {_WITHOUT}: devices would check different numbers")
        check_positions(model_kwargs.get("position_ids"))
        if input_ids.shape[1] == 0 and model_kwargs.get("inputs_embeds") is None:
            raise QuestValueError("input_ids.shape", list(input_ids.shape), f"a token or more {_WITHOUT}")
        cache = model_kwargs[CACHE]
        prefixes = Prefixes(logits_processor)
        pads = any(hasattr(criteria, "eos_token_id") for criteria in stopping_criteria)
        pad = generation_config._pad_token_tensor
        is_dict = generation_config.return_dict_in_generate
        keeps = [name for name in ("scores", "logits") if is_dict and getattr(generation_config, f"output_{name}")]
        outputs = model._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=True)
        logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
        del outputs  # those of a whole prompt may be large
        emission = Emission(
            input_ids, stopping_criteria, streamer, pad.to(input_ids.device) if pads else None, keeps=tuple(keeps),
            room=MOST_DRAFTS + 1,
        )  # fmt: skip
        drafting = Drafting(
            model, cache, emission, prefixes, DraftLength(self._draft_tokens), self._counter,
            does_sample=generation_config.do_sample is True, take=self._take,
        )  # fmt: skip
        has_failed = True
        try:
            with model._optimize_model_for_decode():
                drafting.begin(logits, model_kwargs)
                drafting.run()
            has_failed = False
        finally:
            drafting.finish(is_kept=not has_failed and (cache.is_kept or bool(is_dict)))
        if streamer is not None:
            streamer.end()
        sequences = emission.tokens[:, : emission.length].contiguous()
        if not is_dict:
            return sequences
        output: Any = GenerateDecoderOnlyOutput
        records = {name: emission.records.get(name) for name in ("scores", "logits")}
        return output(sequences=sequences, **records, **{CACHE: cache})
