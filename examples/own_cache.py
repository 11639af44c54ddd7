"""Hold the cache yourself: read a text once, then ask several questions about it, each from the same cache.

python examples/own_cache.py
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quest_attention import QuestConfig, enable_quest
from quest_attention.eval.excerpt import SOUTH
from quest_attention.hf import cache_argument
from quest_attention.models import bundled_model_path

tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
model = AutoModelForCausalLM.from_pretrained(bundled_model_path()).eval()

facts = {"anchor": "4081726", "compass": "9917350", "harbour": "3360274"}
text = SOUTH.text()
for place, (key, number) in enumerate(facts.items(), 1):
    cut = place * 3_000
    text = text[:cut] + f"\nOne of the special magic numbers for {key} is: {number}.\n" + text[cut:]
context = tokenizer(text[:12_000], return_tensors="pt").input_ids

with enable_quest(model, QuestConfig(token_budget=256)) as quest, torch.inference_mode():
    cache = quest.make_cache(max_length=context.shape[1] + 200)
    model(context, **cache_argument(cache), logits_to_keep=1)  # the prefill is dense
    for key, number in facts.items():
        start = f"special magic number for {key} mentioned in the provided text is"
        ids = tokenizer(f"\nWhat is the {start[:-3]}? The {start}", return_tensors="pt").input_ids[0].tolist()
        answer: list[int] = []
        while len(answer) < 8:
            step = model(torch.tensor([[ids.pop(0)]]), **cache_argument(cache))  # one token: sparse
            if not ids:
                answer.append(int(step.logits[0, -1].argmax()))
                ids.append(answer[-1])
        print(f"{key}: {tokenizer.decode(answer)!r}, hidden: {number}")
        cache.crop(context.shape[1] - cache.get_seq_length())  # take the question back: minus its tokens
    print(f"share of the cache read, dense layers included: {quest.counters.share_read:.0%}")
