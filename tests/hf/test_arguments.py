"""Wrong arguments of the integration: each raises an error that names it, and changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from quest_attention import QuestCache, QuestConfig, QuestCounters, QuestValueError, UnsupportedModelError, enable_quest
from quest_attention.hf import layer_kinds
from quest_attention.ops import resolve_backend
from tiny import SMALL, make_llama


@pytest.mark.parametrize("got", ["x", "8192", -1, 0, 1.5, True, torch.tensor(5)])
def test_max_length(got: Any) -> None:
    model = make_llama()
    with enable_quest(model, SMALL) as quest:
        for make in (quest.make_cache, lambda max_length: QuestCache(model.config, SMALL, max_length=max_length)):
            with pytest.raises(QuestValueError, match=r"max_length: got .*, expected a positive integer"):
                make(max_length=got)


@pytest.mark.parametrize(
    ("argument", "got"), [("on_select", 3), ("on_select", "print"), ("cuda_graphs", "yes"), ("cuda_graphs", 0)]
)
def test_enable_quest(argument: str, got: Any) -> None:
    model: Any = make_llama()
    before = set(model.__dict__)
    with pytest.raises(QuestValueError) as caught:
        enable_quest(model, SMALL, **{argument: got})
    assert (caught.value.argument, caught.value.got) == (argument, got)
    assert set(model.__dict__) == before and not model._forward_pre_hooks
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("argument", "got"),
    [
        ("config", None),
        ("config", {}),
        ("config", SMALL),
        ("quest", {"token_budget": 64}),
        ("quest", 64),
        ("counters", []),
        ("counters", QuestCounters([])),
        ("counters", QuestCache(make_llama(layers=5).config, SMALL).counters),
        ("counters", QuestCache(make_llama().config, QuestConfig(num_dense_layers=2)).counters),
        ("on_select", 3),
    ],
)
def test_quest_cache(argument: str, got: Any) -> None:
    arguments: dict[str, Any] = {"config": make_llama().config, "quest": SMALL, argument: got}
    with pytest.raises(QuestValueError) as caught:
        QuestCache(**arguments)
    assert caught.value.argument == argument


def test_layer_kinds() -> None:
    with pytest.raises(QuestValueError, match="config: got None"):
        layer_kinds(None, SMALL)  # type: ignore[arg-type]
    with pytest.raises(QuestValueError, match="quest: got None"):
        layer_kinds(make_llama().config, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("got", [1.5, "x", None])
def test_crop(got: Any) -> None:
    cache = QuestCache(make_llama().config, SMALL)
    for layer in range(3):
        cache.update(torch.zeros(1, 2, 9, 8), torch.zeros(1, 2, 9, 8), layer)
    with pytest.raises(QuestValueError, match="tokens_to_remove"):
        cache.layers[1].crop(got)
    assert cache.get_seq_length(1) == 9


@pytest.mark.parametrize("options", [None, 5, "token_budget", [("token_budget", 64)], {1: 2}, {None: 1}, {("a",): 1}])
def test_config_from_what_is_no_mapping_of_options(options: Any) -> None:
    with pytest.raises(QuestValueError):
        QuestConfig.from_dict(options)


@pytest.mark.parametrize("got", [["max"], {"max": 1}, torch.tensor([1, 2]), None])
def test_choices(got: Any) -> None:
    names = {"group_reduction", "backend", "metadata", "metadata_dtype", "selection_unit"}
    wanted = {"group_reduction", "selection_unit"} if got is None else set()  # None is what the metadata wants
    for name in names - wanted:
        with pytest.raises(QuestValueError) as caught:
            QuestConfig(**{name: got})
        assert caught.value.argument == name


class Adapted(nn.Module):
    """As adapters wrap a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model


class Pipeline:
    """As a pipeline, no module, holds one."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model


@pytest.mark.parametrize(
    ("wrap", "path"),
    [
        (lambda model: torch.compile(model, backend="eager"), "_orig_mod, and compile it after enabling"),
        (nn.DataParallel, "module"),
        (Adapted, "base_model.model"),
        (lambda model: nn.DataParallel(Adapted(model)), "module.base_model.model"),
        (Pipeline, "model"),
    ],
)
def test_wrapped_models(wrap: Any, path: str) -> None:
    model: Any = make_llama()
    wrapper = wrap(model)
    with pytest.raises(UnsupportedModelError) as caught:
        enable_quest(wrapper, SMALL)
    message = str(caught.value)
    assert message.startswith(f"model: got {type(wrapper).__name__}, expected a transformers PreTrainedModel: pass ")
    assert message.endswith(f"wrapper.{path}")
    assert model.config._attn_implementation == "sdpa"
    inner = wrapper
    for name in path.split(",", maxsplit=1)[0].split("."):
        inner = getattr(inner, name)
    assert inner is model


def test_the_backend_is_chosen_for_the_dtype_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `auto` takes for float64 on a GPU cannot be captured, so that a handle must know before it tries."""
    asked = []

    def resolve(name: Any, device: Any, dtype: Any = None) -> Any:
        asked.append((str(device), dtype))
        return resolve_backend(name, device, dtype)

    monkeypatch.setattr("quest_attention.hf.enable.resolve_backend", resolve)
    with enable_quest(make_llama().double(), SMALL):
        assert asked == [("cpu", torch.float64)]
