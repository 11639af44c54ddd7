"""Train the bundled model, on any number of GPUs of one machine.

    torchrun --nproc-per-node 2 training/train.py --books BOOKS --work WORK --output src/quest_attention/models/tiny

The time of each phase is set, not its number of steps, so the same command fits a faster or slower machine. A run that
was stopped by `--stop-after` goes on when the command is given again with the same work folder.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
import transformers
import typer
from sequences import Mix, Sequences
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

MAX_LENGTH = 32768
END_OF_TEXT_ID = 0
WARMUP_STEPS = 200
CLIP = 1.0
LOG_EVERY = 50
CLOCK_EVERY = 8
"""Steps between looks at the clock, each of which waits for the device."""
LOSS_CHUNK = 16384
"""Tokens whose logits are in memory at once."""


@dataclass(frozen=True)
class Phase:
    """A stretch of training at one sequence length.

    Attributes:
        length: Tokens per sequence.
        share: Part of the whole training time.
        rates: Learning rate at the beginning and the end, linear in between.
        mix: Kinds of sequence.
    """

    length: int
    share: float
    rates: tuple[float, float]
    mix: Mix


PHASES = (
    Phase(2048, 0.30, (2e-3, 1.4e-3), Mix(0.4, 0.10)),
    Phase(8192, 0.25, (1.4e-3, 9e-4), Mix(0.45, 0.08)),
    Phase(32768, 0.45, (9e-4, 3e-5), Mix(0.5, 0.04)),
)


def make_model() -> LlamaForCausalLM:
    """11M parameters in the shape of Llama 3: grouped queries, SwiGLU, rotary positions with a long base."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=1024,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=END_OF_TEXT_ID,
    )
    return LlamaForCausalLM(config)


class WithLoss(nn.Module):
    """The model and its weighted loss in one forward, as distributed training wants it."""

    def __init__(self, model: LlamaForCausalLM, compiled: bool) -> None:
        super().__init__()
        self.model = model
        self.body = torch.compile(model.model, dynamic=False) if compiled else model.model

    def forward(self, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted mean loss of ids `[rows, length + 1]`, and `[2]`: mean loss of plain text and of answers [nats]."""
        hidden = self.body(input_ids=ids[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)
        targets, weights = ids[:, 1:].flatten(), weights.flatten()
        total = hidden.new_zeros((), dtype=torch.float32)
        sums = torch.zeros(4, device=ids.device)
        for part in range(0, targets.numel(), LOSS_CHUNK):
            cut = slice(part, part + LOSS_CHUNK)
            losses, weight = _chunk_loss(hidden[cut], self.model.lm_head.weight, targets[cut]), weights[cut]
            total = total + (losses * weight).sum()
            answers, text = (weight > 1).float(), ((weight > 0) & (weight <= 1)).float()
            lost = losses.detach()
            sums += torch.stack([(lost * text).sum(), text.sum(), (lost * answers).sum(), answers.sum()])
        return total / weights.sum().clamp(min=1), sums


def _chunk_loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Loss of each token, its logits made again in the backward pass."""

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ head.to(hidden.dtype).t()).float(), targets, reduction="none")

    result: Tensor = torch.utils.checkpoint.checkpoint(loss, hidden, head, use_reentrant=False)
    return result


def tokenise(books: Path, tokenizer_file: Path, folder: Path, workers: int) -> None:
    """Write all books as one array of uint16 ids, and where each begins."""
    texts = sorted(books.rglob("*.txt"))
    with ProcessPoolExecutor(workers) as pool:
        parts = list(pool.map(_tokenise_one, [(book, tokenizer_file) for book in texts], chunksize=4))
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "starts.npy", np.cumsum([0, *map(len, parts)])[:-1])
    np.save(folder / "books.npy", np.concatenate(parts))
    (folder / "tokenizer.json").write_text(tokenizer_file.read_text(encoding="utf-8"), encoding="utf-8")


def _tokenise_one(job: tuple[Path, Path]) -> np.ndarray:
    book, tokenizer_file = job
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    paragraphs = book.read_text(encoding="utf-8").split("\n\n")
    ids: list[int] = []
    for start in range(0, len(paragraphs), 256):  # a whole book at once is slow in one call
        ids += tokenizer.encode("\n\n".join(paragraphs[start : start + 256]) + "\n\n", add_special_tokens=False).ids
    return np.array([*ids, END_OF_TEXT_ID], dtype=np.uint16)


def rate_at(phase: Phase, progress: float) -> float:
    """Learning rate at a share of a phase."""
    first, last = phase.rates
    return first + (last - first) * min(1.0, progress)


def main(
    books: Annotated[Path, typer.Option(help="Folder of training books, *.txt.")],
    work: Annotated[Path, typer.Option(help="Folder for tokenised books, checkpoints and the log.")],
    output: Annotated[Path, typer.Option(help="Folder of the model; tokenizer.json is there.")],
    seconds: Annotated[float, typer.Option(help="Training time in all [s].")] = 800,
    stop_after: Annotated[float, typer.Option(help="End this call after so long, to go on later [s].")] = math.inf,
    tokens_per_step: Annotated[int, typer.Option(help="Over all GPUs [tokens].")] = 131_072,
    workers: Annotated[int, typer.Option(help="Processes per GPU that make sequences.")] = 13,
    seed: Annotated[int, typer.Option(help="Seed of weights and sequences.")] = 0,
    compiled: Annotated[bool, typer.Option(help="Use torch.compile.")] = True,
    longest: Annotated[int, typer.Option(help="Cap on sequence lengths, for a trial run [tokens].")] = MAX_LENGTH,
    start_from: Annotated[Path | None, typer.Option(help="Model to go on from where no checkpoint is.")] = None,
    trained: Annotated[float, typer.Option(help="Training time that model has had [s].")] = 0.0,
) -> None:
    """Train, or go on training, and export when done."""
    began = time.monotonic()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    if rank == 0 and not (work / "books.npy").exists():
        tokenise(books, output / "tokenizer.json", work, max(2, workers * world))
    if world > 1:
        dist.barrier()
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    model = make_model().to(device)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=cuda)
    state: dict[str, Any] = {"trained": trained, "step": 0, "tokens": 0, "calls": 0}
    if start_from is not None:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(start_from, dtype=torch.float32).state_dict())
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
    state["calls"] += 1
    with_loss = WithLoss(model, compiled)
    training: nn.Module = with_loss
    if world > 1:
        training = DistributedDataParallel(with_loss, device_ids=[device.index] if cuda else None)
    log = (work / "log.jsonl").open("a") if rank == 0 else None

    ends = np.cumsum([phase.share for phase in PHASES]) * seconds
    stopped = False
    for number, phase in enumerate(PHASES):
        start = ends[number] - phase.share * seconds
        if state["trained"] >= ends[number]:
            continue
        length = min(phase.length, longest)
        rows = max(1, tokens_per_step // world // length)
        data = Sequences(work, length, rows, phase.mix, f"{seed}/{number}/{state['calls']}/{rank}")
        loader = DataLoader(
            data, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None, pin_memory=cuda
        )
        sums = torch.zeros(4, device=device)
        last = None
        for ids, weights in loader:
            rate = rate_at(phase, (state["trained"] - start) / (phase.share * seconds))
            rate *= min(1.0, (state["step"] + 1) / WARMUP_STEPS)
            for group in optimizer.param_groups:
                group["lr"] = float(rate)
            with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
                loss, parts = training(ids.to(device, non_blocking=True), weights.to(device, non_blocking=True))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            sums += parts
            state["step"] += 1
            state["tokens"] += rows * length * world
            if state["step"] % CLOCK_EVERY == 0:
                # Ranks agree on the time, or one would leave a phase while the other waits for its gradients.
                clock = torch.tensor([time.monotonic() - began], dtype=torch.float64, device=device)
                if world > 1:
                    dist.broadcast(clock, 0)
                now = float(clock)
                if last is not None:  # the first steps compile, which is not training
                    state["trained"] += now - last
                last = now
                stopped = now > stop_after
            if log is not None and state["step"] % LOG_EVERY == 0:
                text, answers = float(sums[0] / sums[1].clamp(min=1)), float(sums[2] / sums[3].clamp(min=1))
                entry = {
                    "step": state["step"],
                    "trained_s": round(state["trained"], 1),
                    "tokens": state["tokens"],
                    "length": length,
                    "rate": round(rate, 7),
                    "text_loss": round(text, 4),
                    "answer_loss": round(answers, 4),
                }
                sums.zero_()
                log.write(json.dumps(entry) + "\n")
                log.flush()
                if state["step"] % (10 * LOG_EVERY) == 0:
                    typer.echo(json.dumps(entry))
            if state["trained"] >= ends[number] or stopped:
                break
        del loader
        if stopped:
            break

    if rank == 0:
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": state}
        torch.save(saved, checkpoint)
        state["books"], state["book_tokens"] = len(np.load(work / "starts.npy")), len(np.load(work / "books.npy"))
        export(model, output, work, state, seconds, seed, world)
        typer.echo(
            f"{'stopped' if stopped else 'done'} after {state['trained']:.0f} s, {state['tokens'] / 1e6:.0f}M tokens"
        )
    if world > 1:
        dist.destroy_process_group()


def export(
    model: LlamaForCausalLM, output: Path, work: Path, state: dict[str, Any], seconds: float, seed: int, world: int
) -> None:
    """Write the model in transformers' format, and how it was made."""
    model.to(torch.bfloat16).save_pretrained(output)
    AutoTokenizer.from_pretrained(output)  # fails here rather than for a user
    made = {
        "seed": seed,
        "seconds": seconds,
        "trained": state,
        "phases": [asdict(phase) for phase in PHASES],
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "devices": world,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    (work / "training.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
