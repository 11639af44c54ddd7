"""Small GGUF files, made on the spot: a random Llama and a tokenizer, as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from quest_attention.eval.excerpt import SOUTH

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTROL, NORMAL = 3, 1  # llama.cpp's kinds of tokens


def make_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def make_tokenizer() -> Tokenizer:
    """Digits stand alone in it, as in SmolLM2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SOUTH.text()[:20_000], "\n\n  \n\n  " * 200], trainer)
    return tokenizer


def write_gguf(path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, **keys: Any) -> Path:
    """Write a model; `keys` replace or add keys of the file, with dots as `__`, and None leaves one out."""
    config = model.config
    values: dict[str, Any] = {
        "general__type": "model",
        "general__name": "tiny",
        "llama__block_count": config.num_hidden_layers,
        "llama__context_length": config.max_position_embeddings,
        "llama__embedding_length": config.hidden_size,
        "llama__feed_forward_length": config.intermediate_size,
        "llama__attention__head_count": config.num_attention_heads,
        "llama__attention__head_count_kv": config.num_key_value_heads,
        "llama__attention__layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama__rope__freq_base": 10_000.0,
        "llama__vocab_size": config.vocab_size,
        "tokenizer__ggml__model": "gpt2",
        "tokenizer__ggml__pre": "smollm",
        "tokenizer__ggml__bos_token_id": 1,
        "tokenizer__ggml__eos_token_id": 2,
        "tokenizer__ggml__padding_token_id": 2,
        "tokenizer__ggml__add_bos_token": False,
        "tokenizer__chat_template": CHAT_TEMPLATE,
    } | keys
    writer = gguf.GGUFWriter(path, values.pop("general__architecture", "llama"))
    add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    for key, value in values.items():
        if value is not None:
            add[type(value)](key.replace("__", "."), value)
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer.add_token_list([piece for piece, _ in pieces])
    writer.add_token_types([CONTROL if piece in SPECIAL else NORMAL for piece, _ in pieces])
    writer.add_token_merges([" ".join(pair) for pair in _merges(tokenizer)])
    for name, tensor in _tensors(model):
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _merges(tokenizer: Tokenizer) -> list[list[str]]:
    merges: list[list[str]] = json.loads(tokenizer.to_str())["model"]["merges"]
    return merges


def _tensors(model: LlamaForCausalLM) -> list[tuple[str, np.ndarray]]:
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    weights = {name: tensor.detach().numpy() for name, tensor in model.named_parameters()}
    tensors = [
        ("token_embd.weight", weights["model.embed_tokens.weight"]),
        ("output_norm.weight", weights["model.norm.weight"]),
        ("output.weight", weights["lm_head.weight"]),
    ]
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    for index in range(model.config.num_hidden_layers):
        for ours, theirs in names.items():
            weight = weights[f"model.layers.{index}.{ours}.weight"]
            if theirs in heads:  # llama.cpp rotates neighbours, transformers halves
                halves = weight.reshape(heads[theirs], 2, -1, weight.shape[1])
                weight = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
            tensors.append((f"blk.{index}.{theirs}.weight", weight))
    return tensors
