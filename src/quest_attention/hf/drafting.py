"""`Drafting`: one `generate()` whose tokens Quest drafts and the whole model checks."""

from __future__ import annotations

import inspect
import time
from typing import Any

import torch
from torch import Tensor

from quest_attention.errors import QuestValueError
from quest_attention.hf.cache import OnTake, QuestCache
from quest_attention.hf.draft_counter import DraftCounter
from quest_attention.hf.draft_length import DraftLength
from quest_attention.hf.emission import Emission
from quest_attention.hf.naming import CACHE
from quest_attention.hf.prefixes import Prefixes
from quest_attention.hf.rejection import accept_likeliest, accept_sampled, draw

__all__ = ["Drafting", "check_positions", "examined"]

_OURS = {CACHE, "attention_mask", "position_ids", "use_cache", "logits_to_keep", "inputs_embeds", "return_dict"}
"""Arguments of a forward pass that are made for each pass; what else `generate()` was given goes to all."""
_BY_TOKEN = ("token_type_ids", "mm_token_type_ids")
"""Arguments with a number for each token, of which later tokens have the last one's."""


def check_positions(positions: Tensor | None) -> None:
    """One number for each token, as those of later tokens are counted on; None where nobody gave any.

    Raises:
        QuestValueError: There are several, or one for each column.
    """
    if positions is not None and positions.dim() != 2:
        raise QuestValueError("position_ids.shape", list(positions.shape), "[B, T] with lossless=True")


def examined(accepted: list[int], rooms: list[int], count: int) -> tuple[int, int]:
    """Drafts that stayed and drafts that were looked at, those and the first of a row that was refused [tokens].

    Where a row has room for no more, its last token counts as the check's own, and what is behind it nobody looked at.

    Args:
        accepted: Drafts that the check of each row let stay [tokens].
        rooms: Tokens that each row may still write; 0 where it has ended [tokens].
        count: Drafts of each row [tokens].
    """
    rows = [(kept, room - 1) for kept, room in zip(accepted, rooms, strict=True) if room]
    return sum(min(kept, most) for kept, most in rows), sum(min(kept + 1, count, most) for kept, most in rows)


class Drafting:
    """The decode loop of one call.

    A round feeds the newest token, which is not in the cache yet:

        draft   K sparse steps of a token each; their keys and values are Quest's. The first chooses for all, and one
                more where they are many
        check   a dense pass over the newest token and the K drafts, whose keys and values take the place of those
        settle  each row keeps the drafts that its own check lets stay, and has one more token from the check

    Without drafts the check is a plain dense step. Nobody chooses by the metadata meanwhile, so its token is taken into
    them when drafting goes on: where that does not pay, a step costs little more than without Quest. A row's `held`
    tokens in the cache are then all of its tokens but the newest. Rows accept different numbers, so each is as long as
    it is, and a pass says by position and mask where a row's tokens belong.

    Args:
        model: On which Quest is enabled.
        cache: A lossless one.
        emission: The prompt, and what ends the text.
        prefixes: The logits processors.
        length: How many tokens to draft.
        counter: Where drafts are counted.
        does_sample: Whether tokens are drawn, or the likeliest are taken.
        take: Takes tokens into the metadata by a graph, where passes have graphs. Then a check of a size that is seen
            once is worth nothing, as a graph would be captured for it.

    Attributes:
        held: Tokens of each row that the cache has, B of them [tokens].
        taken: Those of them that the metadata are of [tokens].
    """

    def __init__(
        self, model: Any, cache: QuestCache, emission: Emission, prefixes: Prefixes, length: DraftLength,
        counter: DraftCounter, *, does_sample: bool, take: OnTake | None,
    ) -> None:  # fmt: skip
        self._model = model
        self._cache = cache
        self._emission = emission
        self._prefixes = prefixes
        self._length = length
        self._counter = counter
        self._does_sample = does_sample
        self._take = take
        self.held: list[int] = []
        self.taken: list[int] = []
        self._start = 0
        self._mask: Tensor | None = None
        self._extra: dict[str, Any] = {}
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def begin(self, logits: Tensor, arguments: dict[str, Any]) -> None:
        """Take the first token, after the prompt.

        Args:
            logits: `[B, V]`, after the prompt.
            arguments: Of the prompt's forward pass, for all that follow.

        Raises:
            QuestValueError: Positions are not one number for each token; or a mask with padding is of other tokens.
        """
        emission, cache = self._emission, self._cache
        batch = logits.shape[0]
        self._start = cache.get_seq_length()  # tokens in the cache, also those of a prompt given as embeddings
        self.held = [self._start] * batch
        self.taken = list(self.held)
        mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
        check_positions(positions)  # again: the model may have made them
        self._mask = None if mask is None or bool(mask.all()) else mask.bool()  # [B, start]
        if self._mask is not None and self._mask.shape != (batch, self._start):
            raise QuestValueError("attention_mask.shape", list(self._mask.shape), f"[{batch}, {self._start}]")
        assert cache.rows is not None, "a lossless cache"
        cache.rows.padding = self._mask
        last = torch.full((batch,), self._start - 1, device=logits.device) if positions is None else positions[:, -1]
        self._first_position = last.expand(batch) + 1
        self._extra = {name: value for name, value in arguments.items() if name not in _OURS and value is not None}
        self._send_lengths()
        self._accept(logits[:, None], drafts=None)
        emission.emit()

    def run(self) -> None:
        """Write until everything has ended."""
        while not self._emission.has_ended:
            self.run_round()
            self._emission.emit()

    def run_round(self) -> None:
        """Draft, check, settle."""
        emission, cache = self._emission, self._cache
        emission.make_room()
        self._send_lengths()
        rooms = [emission.room_of(row) for row in range(len(self.held))]
        rows = sum(room > 0 for room in rooms)
        count, reason = self._length.next()
        if not cache.chooses_at(max(self.held) + 1):
            count, reason = 0, "within budget"
        elif count >= max(rooms):
            count, reason = (max(rooms) - 1 if self._take is None else 0), "the end"
        fed = emission.tokens.gather(1, self._places(-1))  # [B, 1]
        started = time.perf_counter()
        if count and self.taken != self.held:
            cache.settle(self.taken, self.held, take=self._take)
        drafts, drafted_by = self._draft(fed, count)
        drafted = time.perf_counter()
        if drafts is not None:
            fed = torch.cat([fed, drafts], dim=1)
        before = list(self.held)
        accepted = self._accept(self._forward(fed, 0, is_drafting=False), drafts, drafted_by)
        if count:
            cache.settle(before, self.held, take=self._take)
            self.taken = list(self.held)
        ended = time.perf_counter()
        if count == 0:
            self._counter.count_plain(reason, rows)
            if reason != "within budget":
                self._length.tell_plain(ended - started)
            return
        stayed, looked_at = examined(accepted, rooms, count)
        self._counter.count_check(count * rows, stayed, rows)
        self._length.tell_check(count, stayed, looked_at, rows, (drafted - started, ended - drafted))

    def _draft(self, fed: Tensor, count: int) -> tuple[Tensor | None, Tensor | None]:
        """`count` tokens of each row, `[B, K]`, and what they were drawn from, `[B, K, V]`; None for none.

        What is drafted stands behind a row's tokens meanwhile, where logits processors find it.
        """
        drafts, drafted_by = [], []
        for nth in range(count):
            logits = self._forward(fed, nth, is_drafting=True)
            scores = self._prefixes.process(self._emission.tokens, logits, self._asked(nth))[:, 0]
            if self._does_sample:
                drafted_by.append(scores.softmax(-1))
                fed = draw(drafted_by[-1])[:, None]
            else:
                fed = scores.argmax(-1, keepdim=True)
            drafts.append(fed)
            self._emission.tokens.scatter_(1, self._places(nth), fed)
        if not drafts:
            return None, None
        found = torch.cat(drafts, dim=1)
        found[:, -1:].cpu()  # waits for the device, so that drafts and checks are timed apart
        return found, torch.stack(drafted_by, dim=1) if drafted_by else None

    def _forward(self, fed: Tensor, nth: int, *, is_drafting: bool) -> Tensor:
        """A pass over tokens `[B, T]`, the first of which comes `nth` behind those held: logits `[B, T, V]`."""
        count, device = fed.shape[1], fed.device
        starts = [held + nth for held in self.held]
        rows = self._cache.rows
        assert rows is not None, "a lossless cache"
        ahead = self._held_there + (nth + torch.arange(count, device=device))  # [B, T]
        rows.begin(starts, ahead[:, -1] + 1, is_drafting=is_drafting, nth=nth)
        mask = None
        if rows.ends is not None or self._mask is not None or count > 1:
            mask = self._mask_of(ahead, max(starts) + count)
        extra = dict(self._extra)
        for name in _BY_TOKEN:
            if name in extra:
                extra[name] = extra[name][..., -1:].expand(*extra[name].shape[:-1], count)
        if self._keeps_logits:
            extra["logits_to_keep"] = count
        made = self._model(
            input_ids=fed.clone(), **{CACHE: self._cache}, attention_mask=mask, use_cache=True, return_dict=True,
            position_ids=self._first_position[:, None] + (ahead - self._start), **extra,
        )  # fmt: skip
        logits: Tensor = made.logits[:, -count:]
        return logits.to(torch.float32)

    def _send_lengths(self) -> None:
        """Tell the device how long the rows are: once, as each such copy waits until it has done all before it."""
        both = torch.tensor([self.held, self._emission.lengths], device=self._emission.tokens.device)
        self._held_there, self._lengths_there = both[:, :, None]  # [B, 1] each

    def _mask_of(self, ahead: Tensor, length: int) -> Tensor:
        """`[B, 1, T, length]` bool: every token sees those before it in its row, but padding."""
        column = torch.arange(length, device=ahead.device)
        mask = column <= ahead[:, :, None]  # [B, T, length]
        if self._mask is not None:
            mask[:, :, : self._start] &= self._mask[:, None]
        return mask[:, None]

    def _places(self, nth: int) -> Tensor:
        """`[B, 1]` int64, the place in a row of the `nth` token behind its own; -1 is its newest [tokens]."""
        places: Tensor = self._lengths_there + nth
        return places

    def _asked(self, nth: int) -> list[int | None]:
        """Tokens before the `nth` place behind a row's own; None for rows that have ended [tokens]."""
        emission = self._emission
        return [length + nth if emission.room_of(row) else None for row, length in enumerate(emission.lengths)]

    def _accept(self, logits: Tensor, drafts: Tensor | None, drafted_by: Tensor | None = None) -> list[int]:
        """Let each row have the drafts that stay and one more token: how many stay of each [tokens].

        Args:
            logits: `[B, K + 1, V]`.
            drafts: `[B, K]`, or None with K = 0.
            drafted_by: `[B, K, V]`, where tokens are drawn.
        """
        emission = self._emission
        scores = self._prefixes.process(emission.tokens, logits, self._asked(0))
        batch, _, vocabulary = scores.shape
        if drafts is None:
            drafts = torch.empty(batch, 0, dtype=torch.long, device=scores.device)
        if self._does_sample:
            if drafted_by is None:
                drafted_by = scores.new_empty(batch, 0, vocabulary)
            accepted, token = accept_sampled(drafts, drafted_by, scores)
        else:
            accepted, token = accept_likeliest(drafts, scores)
        emission.tokens.scatter_(1, self._places(0) + accepted[:, None], token[:, None])
        stayed: list[int] = accepted.tolist()
        for row, count in enumerate(stayed):
            new = min(count + 1, emission.room_of(row))
            emission.take(row, new, {"scores": scores[row], "logits": logits[row]})
            if new:  # a row that has ended keeps what it holds
                self.held[row] = self._holds(emission.lengths[row])
        return stayed

    def _holds(self, length: int) -> int:
        """Tokens that the cache has of a row of so many, all but the newest [tokens]."""
        return self._start + length - self._emission.first - 1

    def finish(self, *, is_kept: bool) -> None:
        """Let the cache hold what it would without drafts: all columns but the last, of every row alike.

        Args:
            is_kept: Whether somebody has the cache afterwards. Then rows that ended before others are fed what follows
                their end, as `generate()` does.
        """
        assert self._cache.rows is not None, "a lossless cache"
        try:
            self._make_alike(is_kept=is_kept)
        finally:
            self._cache.rows.end()

    def _make_alike(self, *, is_kept: bool) -> None:
        emission, cache = self._emission, self._cache
        target = max(self._start, self._holds(emission.length))  # which is less if nothing was written
        # What a row wrote past its end, before anybody looked, is not what follows there.
        right = [self._holds(length) for length in emission.ends.values()]
        least = max(self._start, min([*self.held, *right, target]))
        cache.keep(least)
        alike = [least] * len(self.held)
        cache.settle([min(taken, least) for taken in self.taken], alike)
        if is_kept and least < target:
            missing = target - least
            self.held = alike
            self._send_lengths()
            self._forward(emission.tokens[:, emission.length - 1 - missing : emission.length - 1], 0, is_drafting=False)
            cache.settle(alike, [target] * len(alike))


# Longer than 250 lines: drafts and their check are passes over the same rows, by the same lengths, masks and positions.
