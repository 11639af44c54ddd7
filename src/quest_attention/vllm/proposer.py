"""`QuestProposer`: the model drafts for itself, with Quest; stock attention checks what it drafted.

    --speculative-config '{"method": "custom_class", "model": "quest_attention.vllm.proposer.QuestProposer",
                           "num_speculative_tokens": 4}'

What a server answers is then what it answers without Quest, at temperature 0 token by token: Quest chooses in steps of
the draft alone, and each of its tokens is kept only if the model, reading everything, would have written it.

vLLM calls `propose` when a step's tokens are known. Its interface for classes from outside gives those and the rows'
tokens. The rest is the runner's, which `watch_runner` hands over. A draft writes keys and values behind a row's; the
check writes all of them again, so that none of the draft's stays in a token that is kept.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch

from quest_attention.errors import BackendError
from quest_attention.vllm.draft_step import DraftStep
from quest_attention.vllm.wrapping import wrap_method

__all__ = ["QuestProposer", "watch_runner"]

_GRAPHS = (1, 2, 4, 8, 16, 32, 64)
"""Rows of the steps that are captured whole; larger batches run in graphs of the pieces between attention."""


class QuestProposer:
    """Drafts the next tokens of every row. Names of methods and of their arguments are vLLM's.

    Args:
        vllm_config: A `VllmConfig`.
    """

    _runner: Any = None
    _model: Any = None
    _step: DraftStep | None = None

    def __init__(self, vllm_config: Any) -> None:
        self._vllm_config = vllm_config
        self._count = int(vllm_config.speculative_config.num_speculative_tokens)

    def load_model(self, model: Any) -> None:
        """The model that is served, which drafts."""
        self._model = model

    def meet_runner(self, runner: Any) -> None:
        """The `GPUModelRunner` of vLLM that is about to ask for drafts."""
        self._runner = runner

    def capture(self, runner: Any) -> None:
        """Capture steps of drafts in CUDA graphs, where vLLM has captured its own whole steps."""
        self.meet_runner(runner)
        if runner.compilation_config.cudagraph_mode.has_full_cudagraphs():
            most = self._vllm_config.scheduler_config.max_num_seqs
            sizes = {min(size, most) for size in _GRAPHS}
            with torch.inference_mode():
                self._made_step().capture(sorted(sizes))

    def _made_step(self) -> DraftStep:
        """The step, made once.

        Raises:
            BackendError: The runner was not handed over, which Quest's builders have it do: no layer is Quest's.
        """
        if self._runner is None:
            found = "vLLM's own attention in every layer"
            raise BackendError(f"attention backend: got {found}, expected Quest's plugin to be loaded (VLLM_PLUGINS)")
        if self._step is None:
            most = self._vllm_config.scheduler_config.max_num_seqs
            self._step = DraftStep(self._runner, self._model, self._vllm_config, most)
        return self._step

    def propose(
        self, sampled_token_ids: list[list[int]], num_tokens_no_spec: Any, token_ids_cpu: Any, **_: Any
    ) -> list[list[int]]:
        """Drafts of each row of the batch; none of one that is still in its prompt.

        Args:
            sampled_token_ids: What the step wrote, by row.
            num_tokens_no_spec: Tokens of each row, these included, `[rows or more]`.
            token_ids_cpu: Them, `[rows or more, max_model_len]`.
        """
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        rows = [row for row, tokens in enumerate(sampled_token_ids) if tokens]
        if not rows:
            return drafts
        lengths = [int(num_tokens_no_spec[row]) for row in rows]
        last = [int(token_ids_cpu[row, length - 1]) for row, length in zip(rows, lengths, strict=True)]
        written = self._made_step().draft(rows, last, lengths, self._count)
        for row, found in zip(rows, written.tolist(), strict=True):  # the host waits once
            drafts[row] = found
        return drafts


def watch_runner() -> None:
    """Have vLLM's runners hand themselves to a proposer of ours: before a draft, and when they capture graphs."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner  # a class from outside has the first of its runners

    def around_drafts(original: Any) -> Any:
        @wraps(original)
        def propose_draft_token_ids(self: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(getattr(self, "drafter", None), QuestProposer):
                self.drafter.meet_runner(self)
            return original(self, *args, **kwargs)

        return propose_draft_token_ids

    def around_capture(original: Any) -> Any:
        @wraps(original)
        def capture_model(self: Any, *args: Any, **kwargs: Any) -> Any:
            size = original(self, *args, **kwargs)
            if isinstance(getattr(self, "drafter", None), QuestProposer):
                self.drafter.capture(self)
            return size

        return capture_model

    wrap_method(GPUModelRunner, "propose_draft_token_ids", around_drafts)
    wrap_method(GPUModelRunner, "capture_model", around_capture)
