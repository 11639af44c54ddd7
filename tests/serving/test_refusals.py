"""What is refused before a model is loaded, with vLLM's own configurations of models that exist."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="runs with make test-vllm, which installs vLLM")

from quest_attention.models import bundled_model_path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]
QUEST = {"quest": {"token_budget": 256}}
DRAFTS_BY_QUEST = {
    "method": "custom_class",
    "model": "quest_attention.vllm.proposer.QuestProposer",
    "num_speculative_tokens": 3,
}


def configure(**options: Any) -> Any:
    """The configuration that `vllm serve` makes of its options, checks included."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    settings = {"model": str(bundled_model_path()), "attention_backend": "CUSTOM", "additional_config": QUEST}
    return EngineArgs(**(settings | options)).create_engine_config()


def test_options_in_the_wrong_place_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    """They may be another plugin's, so the server starts."""
    beside = {"quest": {}, "backend": "torch", "page_size": 16, "others": 1}
    configure()  # vLLM's loggers are there, which hand nothing up
    logger = logging.getLogger("vllm.quest_attention")
    logger.addHandler(caplog.handler)
    configure(additional_config=beside)
    configure(additional_config=beside)
    configure(additional_config={"log_interval": 1, "num_sink_pages": 2}, attention_backend=None)
    logger.removeHandler(caplog.handler)
    found = [record.getMessage() for record in caplog.records if record.name == "vllm.quest_attention"]
    without = "stands in --additional-config without 'quest': Quest is off, and does not read it"
    there = "'quest' in --additional-config, where Quest does not read it"
    assert found == [
        f"Quest: backend stands beside {there}: quest.backend would be.",
        f"Quest: page_size stands beside {there}; a page is vLLM's block, set by --block-size.",
        f"Quest: num_sink_pages {without}.",
    ]


@pytest.fixture
def other_model(tmp_path: Path) -> Callable[[dict[str, Any]], str]:
    """A folder with a config.json, as far as configuring goes."""

    def make(config: dict[str, Any]) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return make


def test_what_is_right_is_taken() -> None:
    assert configure().additional_config == QUEST


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"attention_backend": None, "additional_config": {}, "speculative_config": DRAFTS_BY_QUEST},
            "speculative_config.model: got .*QuestProposer', expected another, or 'quest' in --additional-config",
        ),
        ({"attention_backend": None}, "attention_backend: got .vLLM's own choice., expected CUSTOM"),
        ({"additional_config": {}}, "additional_config: got {}, expected one with 'quest'"),
        ({"additional_config": {"quest": {"token_buget": 256}}}, "did you mean token_budget"),
        ({"additional_config": {"quest": {"page_size": 16}}}, "quest.page_size: .*--block-size"),
        (
            {"additional_config": {"quest": {"token_budget": 16}}},
            "quest.token_budget: got 16, expected at least 256: 2 forced pages .*--block-size",
        ),
        (
            {"additional_config": {"quest": {"token_budget": "2048"}}},
            "quest.token_budget: got '2048', expected a positive",
        ),
        ({"additional_config": {"quest": {"backend": "cuda"}}}, "quest.backend: got 'cuda', expected one of"),
        ({"additional_config": {"quest": {"log_interval": -1}}}, "quest.log_interval: got -1"),
        (
            {"additional_config": {"quest": {"metadata": "moments", "metadata_dtype": "fp8"}}},
            "quest.metadata_dtype: got 'fp8', expected kv for moments",
        ),
        ({"additional_config": {"quest": {"metadata": "mean"}}}, "quest.metadata: got 'mean', expected one of"),
        ({"additional_config": {"metadata": "moments", **QUEST}}, "it under 'quest': quest.metadata"),
        ({"additional_config": {"quest": 2048}}, "quest: got 2048, expected an object"),
        ({"additional_config": {"Quest": {}}, "attention_backend": None}, "expected 'quest', in small letters"),
        (
            {"additional_config": {"qest": {"token_budget": 512}}, "attention_backend": None},
            "additional_config: got 'qest', expected 'quest', whose options it has",
        ),
        ({"additional_config": {"token_budget": 512}}, "with 'quest' in it, or no --attention-backend CUSTOM either"),
        (
            {"additional_config": {"quest": {"num_dense_layers": 7}}},
            "quest.num_dense_layers: got 7, expected at most 6, the full-attention layers of .* Quest has none",
        ),
        (
            {"kv_cache_dtype": "fp8"},
            "kv_cache_dtype: got 'fp8', expected one of 'auto', 'bfloat16', which",
        ),
        ({"block_size": 16}, "block_size: got 16, expected a multiple of 32: vLLM's attention here has no other"),
        ({"kv_offloading_size": 1.0}, "kv_offloading_size: got 1.0, expected none"),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "kv_transfer_config: got 'ExampleConnector', expected none, or .*: ExampleConnector copies .* slot",
        ),
        (
            {"tensor_parallel_size": 6, "decode_context_parallel_size": 3},
            "decode_context_parallel_size: got 3, expected 1",
        ),
    ],
)
def test_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        configure(**options)


def test_a_session_that_is_refused_is_its_clients_error() -> None:
    """vLLM's CPU engine schedules nothing ahead; here it says that it does."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    config = configure()  # the plugin is there
    config.scheduler_config.async_scheduling = True
    processor = InputProcessor.__new__(InputProcessor)
    processor.vllm_config = config
    with pytest.raises(VLLMValidationError, match=r"resumable: got True, expected False with quest\.metadata moments"):
        processor.process_inputs("a", {"prompt_token_ids": [1]}, None, (), resumable=True)


def test_a_connector_that_was_tested_is_taken_and_compares_metadata() -> None:
    """Two servers find out in NIXL's handshake whether they keep the same of a page."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker

    from quest_attention.vllm.transfers import compare_metadata

    def hashed(**options: Any) -> str:
        quest = {"token_budget": 256, "metadata": "bounds"} | options.pop("quest", {})
        config = configure(
            kv_transfer_config={"kv_connector": "NixlConnector", "kv_role": "kv_consumer", "kv_buffer_device": "cpu"},
            additional_config={"quest": quest}, block_size=32, **options,
        )  # fmt: skip
        compare_metadata(config, "cpu")
        return str(base_worker.compute_nixl_compatibility_hash(config, "CUSTOM"))

    plain = hashed()
    assert plain == hashed() == hashed(quest={"token_budget": 512, "num_sink_pages": 1})  # another way to read the same
    others = [
        hashed(quest=quest)
        for quest in ({"metadata": "sketch"}, {"metadata_dtype": "fp8"}, {"num_dense_layers": 3})
    ]  # fmt: skip
    others.append(hashed(tensor_parallel_size=2))
    assert len({plain, *others}) == 5


LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 128,
    "max_position_embeddings": 4096,
    "torch_dtype": "float32",
}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 1024, **LLAMA},
            "a sliding window of 1024",
        ),
        (
            {
                "model_type": "deepseek_v2",
                "architectures": ["DeepseekV2ForCausalLM"],
                "kv_lora_rank": 32,
                "q_lora_rank": None,
                "qk_nope_head_dim": 32,
                "qk_rope_head_dim": 16,
                "v_head_dim": 32,
                **LLAMA,
            },
            "with MLA",
        ),
        (
            {
                "model_type": "gemma3_text",
                "architectures": ["Gemma3ForCausalLM"],
                "layer_types": ["sliding_attention"] * 4,
                "sliding_window": 64,
                **LLAMA,
            },
            "layers of sliding_attention alone, expected layers with full attention among them",
        ),
    ],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) else "",
)
def test_models(config: dict[str, Any], message: str, other_model: Callable[[dict[str, Any]], str]) -> None:
    with pytest.raises(Exception, match=message) as refused:
        configure(model=other_model(config), skip_tokenizer_init=True, load_format="dummy")
    both = "Without Quest it is served if both are left out: --attention-backend CUSTOM and 'quest'"
    assert both in str(refused.value), "who drops one of them meets no second refusal"


def test_a_release_that_was_not_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    from quest_attention.vllm import plugin

    configure()  # the plugin is there
    monkeypatch.setattr(plugin, "vllm_version", lambda: (0, 29))
    with pytest.raises(Exception, match=r"vllm: got 0\.29, expected one of 0\.25, 0\.32, 0\.33, which Quest"):
        configure()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alibi_slopes": [0.5]}, "alibi_slopes: got slopes"),
        ({"sliding_window": 128}, "sliding_window: got 128"),
        ({"attn_type": "encoder_only"}, "attn_type: got encoder_only"),
    ],
)
def test_layers(options: dict[str, Any], message: str) -> None:
    from quest_attention.vllm.refusals import check_layer

    plain = {
        "alibi_slopes": None,
        "sliding_window": None,
        "attn_type": "decoder",
    }
    check_layer(**plain)
    with pytest.raises(Exception, match=message):
        check_layer(**(plain | options))
