"""Hide a pass key in a book and let `generate()` find it, with and without Quest.

python examples/find_a_fact.py
"""

from transformers import AutoModelForCausalLM, AutoTokenizer

from quest_attention import QuestConfig, enable_quest
from quest_attention.eval.excerpt import SOUTH
from quest_attention.models import bundled_model_path

tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
model = AutoModelForCausalLM.from_pretrained(bundled_model_path())

text = SOUTH.text()[:14_000]
fact = "\nThe pass key is 27183. Remember it. 27183 is the pass key.\n"
question = "\nWhat is the pass key? The pass key is"
inputs = tokenizer(text[:5_000] + fact + text[5_000:] + question, return_tensors="pt")
length = inputs.input_ids.shape[1]

dense = model.generate(**inputs, max_new_tokens=7, do_sample=False)
print(f"full attention, {length} tokens: {tokenizer.decode(dense[0, length:])}")

with enable_quest(model, QuestConfig(token_budget=64)) as quest:
    sparse = model.generate(**inputs, max_new_tokens=7, do_sample=False)
    print(f"Quest, 64 tokens a step: {tokenizer.decode(sparse[0, length:])}")
    print(quest.counters.summary())
