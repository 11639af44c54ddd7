"""Models compiled by `torch.compile`, layer by layer: Quest runs between the compiled pieces."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from quest_attention import enable_quest
from tiny import SMALL, generate, make_llama, prompt


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch._dynamo.reset()
    counters.clear()


def test_compiled_layers_give_the_tokens_of_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    # As docs/gpu.md says: else transformers' layers are compiled once for each index, up to a limit.
    monkeypatch.setattr(torch._dynamo.config, "allow_unspec_int_on_nn_module", True)
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)  # else it goes on eagerly
    model, ids = make_llama(layers=12), prompt()
    with enable_quest(model, SMALL) as quest:
        expected = generate(model, ids)
        steps = quest.counters.sparse_steps
        for layer in model.model.layers:
            layer.compile(backend="eager")  # what is traced is tested here, and not a compiler
        quest.counters.reset()
        assert torch.equal(generate(model, ids), expected)
        assert quest.counters.sparse_steps == steps > 0
        compiled = dict(counters["stats"])
        assert compiled["unique_graphs"] < 12  # layers share what was compiled
        longer = generate(model, ids, new=40)
        assert torch.equal(longer[:, : expected.shape[1]], expected)
        assert counters["stats"] == compiled  # a sequence grows without being compiled again
