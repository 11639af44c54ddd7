"""Models compiled by `torch.compile`, layer by layer: Quest runs between the compiled pieces."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from quest_attention import enable_quest
from test_lower_right import forced
from tiny import SMALL, generate, make_llama, prompt


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch._dynamo.reset()
    counters.clear()


# The first as docs/gpu.md says, else transformers' layers are compiled once for each index, up to a limit; and beyond
# that it would go on eagerly.
@torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True, fail_on_recompile_limit_hit=True)
def test_compiled_layers_give_the_tokens_of_eager_ones() -> None:
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


@pytest.mark.parametrize("whole", [False, True])
def test_chunks_without_masks_in_compiled_models(whole: bool) -> None:
    """Layers take a mask of no heads as any other; in a model that is compiled as a whole masks are written."""
    model, ids = make_llama(), prompt(2, 60)
    with enable_quest(model, SMALL):
        expected = generate(model, ids, prefill_chunk_size=16)
        for module in [model] if whole else model.model.layers:
            module.compile(backend="eager")
        with forced() as path:
            assert torch.equal(generate(model, ids, prefill_chunk_size=16), expected)
        assert path.passes or whole, "as long as it is compiled: past the limit of its lengths it goes on eagerly"
