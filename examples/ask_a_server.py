"""Ask a vLLM server with Quest over the OpenAI protocol: a pass key hidden in a book.

vllm serve $(python -c "from quest_attention.models import bundled_model_path as path; print(path())") \
    --served-model-name quest-tiny --block-size 32 --attention-backend CUSTOM \
    --additional-config '{"quest": {"token_budget": 256}}'
python examples/ask_a_server.py
"""

import sys

from openai import OpenAI

from quest_attention.eval.excerpt import SOUTH

client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1", api_key="none")
model = client.models.list().data[0].id

text = SOUTH.text()[:14_000]
fact = "\nThe pass key is 27183. Remember it. 27183 is the pass key.\n"
question = "\nWhat is the pass key? The pass key is"
answer = client.completions.create(
    model=model, prompt=text[:5_000] + fact + text[5_000:] + question, max_tokens=7, temperature=0
)
print(f"{model}, {answer.usage.prompt_tokens} tokens:{answer.choices[0].text}")
