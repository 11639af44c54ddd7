"""What a user changes while Quest is enabled stays changed, and what was Quest's goes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from quest_attention import QuestStateError, enable_quest
from quest_attention.hf import cache_argument
from tiny import LARGE, SMALL, VOCABULARY, generate, make_llama, prompt


def make_gemma() -> Any:
    """A model of two sub-configurations, text and vision."""
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    text = {"head_dim": 8, "vocab_size": VOCABULARY, "num_key_value_heads": 2, "layer_types": ["full_attention"] * 2}
    config = Gemma3Config(text_config={**size, **text}, vision_config={**size, "image_size": 28, "patch_size": 14})
    return Gemma3ForConditionalGeneration(config).eval()


def test_a_resized_model_is_saved_and_loaded(tmp_path: Path) -> None:
    model, ids = make_llama(), prompt()
    config = model.config
    with enable_quest(model, SMALL) as quest:
        model.resize_token_embeddings(VOCABULARY + 8)
        inside = generate(model, ids)
        assert quest.counters.sparse_steps > 0
        model.save_pretrained(tmp_path / "inside")
    assert model.config is config
    assert config.vocab_size == model.vocab_size == VOCABULARY + 8
    assert config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path / "after")
    for where in ("inside", "after"):
        assert "quest" not in (tmp_path / where / "config.json").read_text()
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / where).eval()
        assert loaded.config._attn_implementation == "sdpa"
        assert torch.equal(generate(loaded, ids), generate(model, ids))
        with enable_quest(loaded, SMALL):
            assert torch.equal(generate(loaded, ids), inside)


def test_every_way_to_change_a_configuration() -> None:
    model = make_gemma()
    config, text, vision = model.config, model.config.text_config, model.config.vision_config
    before = config.to_dict()
    text.extra = {"list": [1]}
    config.to_go = 1
    with enable_quest(model, SMALL):
        private: Any = model.config
        assert private is not config
        private.new = "new"
        private.text_config.extra["list"].append(2)  # in place
        private.vision_config.layer_norm_eps = 0.5
        del private.to_go
        model.resize_token_embeddings(VOCABULARY + 3)
        model.generation_config.max_new_tokens = 7
        assert not hasattr(config, "new")
    assert (model.config, config.text_config, config.vision_config) == (config, text, vision)
    assert config.text_config is text
    assert (config.new, text.extra, vision.layer_norm_eps) == ("new", {"list": [1, 2]}, 0.5)
    assert not hasattr(config, "to_go")
    assert text.vocab_size == VOCABULARY + 3
    assert model.generation_config.max_new_tokens == 7
    assert {own._attn_implementation for own in (config, text, vision)} == {"sdpa"}
    del config.new, text.extra
    vision.layer_norm_eps = before["vision_config"]["layer_norm_eps"]
    text.vocab_size = VOCABULARY
    assert config.to_dict() == before


def test_configurations_that_the_user_puts_there() -> None:
    model: Any = make_gemma()
    config = model.config
    with enable_quest(model, SMALL):
        model.config.text_config = copy.deepcopy(model.config.text_config)
        theirs = model.config.text_config
    assert model.config is config and config.text_config is theirs
    assert theirs._attn_implementation == "sdpa"
    model = make_llama()
    model.set_attn_implementation("eager")
    with enable_quest(model, SMALL):
        model.config = copy.deepcopy(model.config)
        theirs = model.config
        model.model.layers[1] = LlamaDecoderLayer(model.model.config, 1).eval()
    assert model.config is theirs
    assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {"eager"}
    generate(model, prompt())


def test_models_that_share_a_configuration() -> None:
    first = make_llama()
    second, third = LlamaForCausalLM(first.config).eval(), LlamaForCausalLM(first.config).eval()
    shared, ids = first.config, prompt()
    stock = generate(third, ids)
    one, other = enable_quest(first, SMALL), enable_quest(second, LARGE)
    first.resize_token_embeddings(VOCABULARY + 8)
    second.config.rope_parameters["rope_theta"] = 7.0
    shared.bos_token_id = 5
    assert (shared.vocab_size, third.config._attn_implementation) == (VOCABULARY, "sdpa")
    assert torch.equal(generate(third, ids), stock)
    one.disable()
    other.disable()
    # As without Quest: the object is shared, so every change is seen by all of its models.
    assert first.config is second.config is third.config is shared
    assert (shared.vocab_size, shared.rope_parameters["rope_theta"], shared.bos_token_id) == (VOCABULARY + 8, 7.0, 5)
    assert shared._attn_implementation == "sdpa"


def test_another_attention_is_refused_meanwhile() -> None:
    model, ids = make_llama(), prompt()
    with enable_quest(model, SMALL) as quest:
        with pytest.raises(QuestStateError, match=r"set_attn_implementation: got a model with Quest"):
            model.set_attn_implementation("eager")
        generate(model, ids)
        assert quest.counters.sparse_steps > 0
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("by", ["the configuration", "the model inside"])
def test_another_attention_by_the_back_door_is_refused_and_stays(by: str) -> None:
    model, ids = make_llama(), prompt()
    with enable_quest(model, SMALL) as quest:
        if by == "the configuration":
            model.config._attn_implementation = "eager"
        else:
            model.model.set_attn_implementation("eager")
        with pytest.raises(QuestStateError, match="set to 'eager' while Quest is enabled"):
            generate(model, ids)
        assert quest.counters.to_dict()["pages_held"] == 0
    assert model.config._attn_implementation == "eager"
    generate(model, ids)


def test_the_attention_of_another_part_is_the_users() -> None:
    model = make_gemma()
    with enable_quest(model, SMALL), torch.inference_mode():
        model.config.vision_config._attn_implementation = "eager"
        model(prompt())
    assert model.config.vision_config._attn_implementation == "eager"
    assert model.config.text_config._attn_implementation == model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("how", [copy.deepcopy, pickle.dumps], ids=["deepcopy", "pickle"])
def test_copies_of_an_enabled_model_are_refused(how: Any) -> None:
    model, ids = make_llama(), prompt()
    stock = generate(model, ids)
    with enable_quest(model, SMALL) as quest:
        with pytest.raises(QuestStateError, match=r"copy or pickle: got a model with Quest"):
            how(model)
        with pytest.raises(QuestStateError, match="copy or pickle"):
            how({"a model": model})
        generate(model, ids)
        assert quest.counters.sparse_steps > 0
    twin = copy.deepcopy(model) if how is copy.deepcopy else pickle.loads(how(model))
    assert torch.equal(generate(twin, ids), stock)
    with enable_quest(twin, SMALL) as quest:
        assert torch.equal(generate(model, ids), stock)
        assert quest.counters.sparse_steps == 0


def test_a_handle_is_used_once() -> None:
    model, ids = make_llama(), prompt()
    quest = enable_quest(model, SMALL)
    quest.disable()
    with pytest.raises(QuestStateError, match="with: this handle is disabled"), quest:
        generate(model, ids)
    with pytest.raises(QuestStateError, match="make_cache: this handle is disabled"):
        quest.make_cache()
    with enable_quest(model, SMALL) as second:
        with pytest.raises(QuestStateError, match="with: this handle is disabled"), quest:
            pass
        with pytest.raises(QuestStateError, match="with: this handle is in a with statement already"), second:
            pass
        generate(model, ids)
        assert second.counters.sparse_steps > 0
        assert quest.counters.sparse_steps == 0


def test_methods_that_others_put_there_stay() -> None:
    model: Any = make_llama()

    def before(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(args, kwargs)

    def meanwhile(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(args, kwargs)

    model.generate_batch = before
    with enable_quest(model, SMALL):
        assert model.generate_batch is not before
        model.init_continuous_batching = meanwhile
    assert model.generate_batch is before
    assert model.init_continuous_batching is meanwhile
    assert "set_attn_implementation" not in model.__dict__


def test_a_cache_of_a_resized_model_goes_on() -> None:
    model, ids = make_llama(), prompt()
    with enable_quest(model, SMALL) as quest, torch.inference_mode():
        cache = quest.make_cache()
        model(ids, **cache_argument(cache))
        model.resize_token_embeddings(VOCABULARY + 8)
        assert model(ids[:, :1], **cache_argument(cache)).logits.shape[-1] == VOCABULARY + 8
        assert quest.counters.sparse_steps == 2
