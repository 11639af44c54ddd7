"""`quest generate --chat` stops where the chat template ends an answer, whatever the model calls its end of text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from gguf_files import CHAT_TEMPLATE, make_llama, make_tokenizer
from quest_attention.cli import run
from quest_attention.eval.frame import turn_end

FIRST = 0  # id of <|endoftext|>, which ends the turns of this file's template

TEMPLATE = CHAT_TEMPLATE.replace("<|im_end|>", "<|endoftext|>")
ENDS = {
    TEMPLATE: FIRST,
    CHAT_TEMPLATE: 2,
    "{% for m in messages %}{{ m.content + ' <|im_start|>' }}{% endfor %}": 1,
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}": None,
    "{{ messages[0].content }}": None,
    "{{ raise_exception('no answers') }}": None,
    "nothing": None,
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(), eos_token="<|im_end|>", chat_template=TEMPLATE)


@pytest.mark.parametrize("template", ENDS)
def test_the_end_of_a_turn_is_read_off_the_template(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, chat_template=template)
    assert turn_end(other) == ENDS[template]


def test_an_answer_ends_with_its_turn(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all tokens are equally likely, and the first of them is taken
    model.config.eos_token_id = model.generation_config.eos_token_id = 2
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    new_tokens = []
    for chat in ([], ["--chat"]):
        assert run(["generate", "-m", str(tmp_path), "-p", "ice", "-n", "5", "--json", *chat]) == 0
        new_tokens.append(json.loads(capsys.readouterr().out)["new_tokens"])
    assert new_tokens == [5, 1]
