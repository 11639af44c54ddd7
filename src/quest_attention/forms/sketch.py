"""`Sketch`: one bit of every channel of every key of a page, and the mean, by which single tokens are ranked."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quest_attention.config import check_integer
from quest_attention.errors import QuestValueError
from quest_attention.forms.form import Scored, as_numbers

__all__ = ["MEAN_BITS", "Sketch", "SketchLayout"]

MEAN_BITS = 7
"""Of a channel of a mean, with a sign: what its rounding leaves is in the signs."""
_LARGEST_MEAN = 2 ** (MEAN_BITS - 1) - 1
"""Code of the largest channel of a mean."""
_BYTE = 8
_BYTES = 256
_FLOAT = 4
"""Bytes of a float32."""
_ALIGNMENT = 16
"""Of a page's bytes: as many as a thread of a GPU loads at a time."""
_CHUNK = 1 << 18
"""Channels sketched at a time [numbers]: a bound on scratch memory, which has a few float32 for each."""


class SketchLayout(NamedTuple):
    """Where in the bytes of a page and KV head its parts begin.

    All but the scales are rows of one bit a channel: bit `j` of byte `d8` is of channel `j * (dim / 8) + d8`; bytes
    past `dim / 8` are zero. So means and signs are multiplied alike. Pages of 16 tokens and 128 channels take 384
    bytes, three lines of a GPU's memory.

    Attributes:
        row: Of one row: `dim / 8`, rounded up to whole words of 4 [bytes].
        signs: A row for each token, with a bit set where its turned key is not below the mean.
        mean: The mean of the page's turned keys in units of its scale, in two's complement of seven bits: a row for
            each bit, the lowest first.
        scales: Two float32: the scale of the mean, and what a sign stands for.
        total: Of everything, zeros behind it included, a multiple of 16 [bytes].
    """

    row: int
    signs: int
    mean: int
    scales: int
    total: int

    @classmethod
    def of(cls, page_size: int, dim: int) -> SketchLayout:
        """Of pages of `page_size` keys of `dim` channels.

        Raises:
            QuestValueError: The channels do not fill bytes.

        >>> SketchLayout.of(16, 128)
        SketchLayout(row=16, signs=0, mean=256, scales=368, total=384)
        """
        if dim % _BYTE:
            raise QuestValueError("head_dim", dim, f"a multiple of {_BYTE} for a sketch, which has channels in bytes")
        row = _up(dim // _BYTE, _FLOAT)
        mean = page_size * row
        scales = mean + MEAN_BITS * row
        return cls(row, 0, mean, scales, _up(scales + 2 * _FLOAT, _ALIGNMENT))


@dataclass(frozen=True)
class Sketch:
    """Keys turned by a Hadamard matrix, less the mean of their page, in one bit a channel and one level a page.

    Turning spreads what a key has in few channels over all of them, so that one scale fits all channels of a page;
    queries are turned alike, which leaves logits as they are. Of the turned keys without their mean the signs are kept.
    A sign stands for the mean absolute value of what it is the sign of, over the page: of all levels the one that is
    nearest in the sense of least squares. A token's logit is estimated from the mean and its signs. So all tokens are
    ranked, and the best of them once more by their keys, where a config has candidates.

    Turned codes of one bit are from RaBitQ (Gao and Long, arXiv:2405.12497), keys of few bits in a cache from KIVI (Liu
    et al., arXiv:2402.02750), ranking tokens by them from Twilight (Lin et al., arXiv:2502.02770). Ours is the mean of
    the page as centre.

    A page is sketched when it is complete, from all of its keys, however they came. So a sketch is never of a token
    that is gone. The page being written is always read and needs none.

    A page with a key that is not finite has NaN for both scales, and so for all estimates.

    Attributes:
        page_size: Tokens per page [tokens].
    """

    page_size: int

    def __post_init__(self) -> None:
        check_integer("page_size", self.page_size, minimum=1)

    name = "sketch"
    is_bound = False
    takes_whole_pages = True
    coefficient = 0.0
    scores: ClassVar[Scored] = "token"

    def shape(self, page_size: int, dim: int) -> tuple[int, int]:
        """See `MetadataForm.shape`: one row of bytes.

        Raises:
            QuestValueError: The channels do not fill bytes, or pages have another size than the form's.
        """
        if page_size != self.page_size:
            raise QuestValueError("form", self, f"Sketch({page_size}), for pages of {page_size} tokens")
        return 1, SketchLayout.of(page_size, dim).total

    def dtypes(self, keys: torch.dtype) -> tuple[torch.dtype, ...]:
        """See `MetadataForm.dtypes`."""
        del keys
        return (torch.uint8,)

    def take(self, into: Tensor, keys: Tensor, before: Tensor | int, written: Tensor | None = None) -> None:
        """See `MetadataForm.take`: whole pages alone, many at a time."""
        assert written is None and before == 0 and keys.shape[-2] == self.page_size, "whole pages"
        pages = into.shape[:-2]
        if math.prod(pages) == 0:
            return
        if not pages:
            into[0] = self._packed(keys)
            return
        longest = max(range(len(pages)), key=lambda dim: pages[dim])
        at_a_time = max(1, _CHUNK * pages[longest] // max(1, keys.numel()))
        for some, theirs in zip(into.split(at_a_time, longest), keys.split(at_a_time, longest), strict=True):
            some[..., 0, :] = self._packed(theirs)

    def _packed(self, keys: Tensor) -> Tensor:
        """The bytes `[..., bytes]` of pages of keys `[..., page_size, D]`."""
        turned = _turned(as_numbers(keys).float())
        mean = turned.mean(-2)
        mean_scale = mean.abs().amax(-1, keepdim=True) / _LARGEST_MEAN
        codes = (mean / mean_scale.masked_fill(mean_scale == 0, 1)).round()  # [..., D]
        rest = turned.sub_((codes * mean_scale)[..., None, :])  # [..., page_size, D]
        signs = rest >= 0
        level = rest.abs_().mean((-2, -1))[..., None]  # [..., 1]
        is_finite = level.isfinite()
        scales = torch.cat([mean_scale, level], -1).masked_fill_(~is_finite, math.nan)
        signs &= is_finite[..., None]
        bits = signs.to(torch.uint8).unflatten(-1, (_BYTE, -1))  # [..., page_size, 8, D / 8]

        of_mean = codes.nan_to_num_(0, 0, 0).to(torch.int8).view(torch.uint8)
        places = torch.arange(MEAN_BITS, dtype=torch.uint8, device=keys.device)[:, None]
        of_mean = (of_mean[..., None, :] >> places & 1).unflatten(-1, (_BYTE, -1))  # [..., 7, 8, D / 8]

        at = SketchLayout.of(self.page_size, keys.shape[-1])
        packed: Tensor = bits.new_zeros(*keys.shape[:-2], at.total)
        for start, some in ((at.signs, bits), (at.mean, of_mean)):
            _rows(packed, start, some.shape[-3], at.row)[..., : some.shape[-1]] = _in_bytes(some)
        packed[..., at.scales : at.scales + 2 * _FLOAT] = scales.view(torch.uint8)
        return packed

    def take_by_hand(self, kept: Tensor, keys: Tensor, before: int) -> Tensor:
        """See `MetadataForm.take_by_hand`: one whole page."""
        assert before == 0 and len(keys) == self.page_size, "whole pages"
        dim = keys.shape[1]
        at = SketchLayout.of(self.page_size, dim)
        turned = keys.double().cpu() @ _matrix_by_hand(dim)
        mean = turned.sum(0) / self.page_size
        mean_scale = mean.abs().max() / _LARGEST_MEAN
        codes = torch.round(mean / mean_scale) if mean_scale else torch.zeros(dim, dtype=torch.float64)
        rest = turned - codes * mean_scale
        is_finite = bool(torch.isfinite(rest).all())
        packed = bytearray(at.total)
        magnitudes = 0.0
        numbers = rest.tolist()
        for token in range(self.page_size if is_finite else 0):
            for channel in range(dim):
                number = numbers[token][channel]
                magnitudes += abs(number)
                j, d8 = divmod(channel, dim // _BYTE)
                packed[at.signs + token * at.row + d8] |= (number >= 0) << j
        for channel in range(dim if is_finite else 0):
            j, d8 = divmod(channel, dim // _BYTE)
            for bit in range(MEAN_BITS):
                packed[at.mean + bit * at.row + d8] |= (int(codes[channel]) >> bit & 1) << j
        scales = [float(mean_scale), magnitudes / (self.page_size * dim)] if is_finite else [math.nan, math.nan]
        made = torch.tensor(list(packed), dtype=torch.uint8)
        made[at.scales : at.scales + 2 * _FLOAT] = torch.tensor(scales, dtype=torch.float32).view(torch.uint8)
        return made.view(1, -1).to(kept.device)

    def see(self, query: Tensor) -> Tensor:
        """See `MetadataForm.see`: turned queries, and behind them what every byte of signs adds to a product.

        A byte is of 8 channels, so it has one of 256 sums: `[..., D / 8, 256]`, those of its set bits with
        half of their channels' numbers, less those of the others.
        """
        turned = _turned(query)
        signs = _signs_of_bytes(query.device)
        by_byte = turned.unflatten(-1, (_BYTE, -1)).transpose(-1, -2)  # [..., D / 8, 8]
        return torch.cat([turned, (by_byte @ (signs.to(turned.dtype) / 2)).flatten(-2)], -1)

    def score(self, seen: Tensor, kept: Tensor) -> Tensor:
        """See `MetadataForm.score`: the logit of the mean, and the level times the product with the signs."""
        dim = seen.shape[-1] // (1 + _BYTES // _BYTE)
        at = SketchLayout.of(self.page_size, dim)
        scales = kept[..., at.scales : at.scales + 2 * _FLOAT].contiguous().view(torch.float32)
        signs, mean = (
            _rows(kept, start, count, at.row)[..., : dim // _BYTE]
            for start, count in ((at.signs, self.page_size), (at.mean, MEAN_BITS))
        )
        summed = (_summed(seen, mean) * _worth_of_bits(seen.device)[:, None]).sum(2)
        # A bit is a half and half of its sign, and the bits of a number are worth -1 in all.
        of_means = (summed - seen[..., :dim].sum(-1)[:, None] / 2) * scales[..., :1]  # [R, P, G]
        return (of_means[:, :, None] + 2 * scales[..., 1:, None] * _summed(seen, signs)).flatten(1, 2)

    def score_by_hand(self, query: Tensor, kept: Tensor) -> Tensor:
        """See `MetadataForm.score_by_hand`."""
        turned = query.double().cpu() @ _matrix_by_hand(len(query))
        return (_turned_keys_by_hand(bytes(kept[0].tolist()), self.page_size, len(query)) @ turned).to(kept.device)


@lru_cache(4096)  # a page is scored for many queries
def _turned_keys_by_hand(page: bytes, page_size: int, dim: int) -> Tensor:
    """The turned keys that the bytes of a page stand for, `[page_size, D]` float64, bit by bit."""
    at = SketchLayout.of(page_size, dim)
    mean_scale, level = struct.unpack_from("<2f", page, at.scales)
    center = []
    for channel in range(dim):
        j, d8 = divmod(channel, dim // _BYTE)
        bits = [page[at.mean + bit * at.row + d8] >> j & 1 for bit in range(MEAN_BITS)]
        code = sum(bit << place for place, bit in enumerate(bits)) - (bits[-1] << MEAN_BITS)
        center.append(code * mean_scale)
    keys = []
    for token in range(page_size):
        signs = []
        for channel in range(dim):
            j, d8 = divmod(channel, dim // _BYTE)
            signs.append(1 if page[at.signs + token * at.row + d8] >> j & 1 else -1)
        keys.append([mean + sign * level for mean, sign in zip(center, signs, strict=True)])
    return torch.tensor(keys, dtype=torch.float64)


def _rows(kept: Tensor, start: int, count: int, size: int) -> Tensor:
    """A view of some rows, `[..., count, size]`, of the bytes `[..., bytes]` of pages."""
    rows: Tensor = kept[..., start : start + count * size].unflatten(-1, (count, size))
    return rows


def _in_bytes(bits: Tensor) -> Tensor:
    """Bits `[..., 8, N]` uint8 as bytes `[..., N]`."""
    places = torch.arange(_BYTE, dtype=torch.uint8, device=bits.device)[:, None]
    packed: Tensor = (bits << places).sum(-2, dtype=torch.uint8)
    return packed


def _summed(seen: Tensor, bits: Tensor) -> Tensor:
    """Half the product of queries `[R, G, W]` and the signs that the bits of `[R, P, T, D / 8]` are: `[R, P, T, G]`.

    Every byte is looked up in the table that `see` made. On one core of a CPU that takes a fifth of the time of
    unpacking the bits and multiplying.
    """
    rows, group, _ = seen.shape
    count = bits.shape[-1]  # of bytes
    table = seen[..., _BYTE * count :].view(rows, group, count * _BYTES).transpose(1, 2).reshape(-1, group)
    first = torch.arange(0, rows * count * _BYTES, _BYTES, dtype=torch.int32, device=bits.device)
    index = bits + first.view(rows, 1, 1, count)
    return F.embedding_bag(index.view(-1, count), table, mode="sum").view(*bits.shape[:3], group)


def _turned(rows: Tensor) -> Tensor:
    """Rows `[..., D]` in float32 or wider, times a Hadamard matrix, or several side by side where D is no power of two.

    Such a matrix is its own inverse.
    """
    dim = rows.shape[-1]
    order = dim & -dim  # the largest power of two that divides it
    matrix = _hadamard(order, rows.device).to(rows.dtype)
    with torch.autocast(rows.device.type, enabled=False):  # it would round the keys
        turned: Tensor = (rows.unflatten(-1, (-1, order)) @ matrix).flatten(-2)
        return turned


@cache  # made once: a step would spend more on it than on its use
def _hadamard(order: int, device: torch.device) -> Tensor:
    """Sylvester's matrix, normalised."""
    with torch.inference_mode(False):
        matrix = torch.ones(1, 1)
        while len(matrix) < order:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return (matrix / math.sqrt(order)).to(device)


@cache
def _signs_of_bytes(device: torch.device) -> Tensor:
    """For each bit of a byte and each of its values 1 or -1: `[8, 256]` float32."""
    with torch.inference_mode(False):
        bits = torch.arange(_BYTES)[None, :] >> torch.arange(_BYTE)[:, None] & 1
        return (2.0 * bits - 1).to(device)


@cache
def _worth_of_bits(device: torch.device) -> Tensor:
    """What each bit of a mean's code is worth, `[7]` float32."""
    with torch.inference_mode(False):
        return torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, -64.0], device=device)


@cache
def _matrix_by_hand(dim: int) -> Tensor:
    """The matrix that keys are turned by, `[D, D]` float64: a sign is that of the bits that row and column share."""
    order = dim & -dim
    rows = []
    for row in range(dim):
        blocks = [column // order == row // order for column in range(dim)]
        signs = [(-1) ** (row % order & column % order).bit_count() for column in range(dim)]
        rows.append([sign / math.sqrt(order) if inside else 0.0 for sign, inside in zip(signs, blocks, strict=True)])
    return torch.tensor(rows, dtype=torch.float64)


def _up(number: int, multiple: int) -> int:
    """The next multiple."""
    return -(-number // multiple) * multiple


# Longer than 250 lines: the form with its oracle, and the arithmetic of its bits, which nobody else needs.
