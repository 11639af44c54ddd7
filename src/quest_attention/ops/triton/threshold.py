"""The rank that about as many tokens of a row reach as are wanted, by what a sample of ranks says: a step of `scan`.

`ranks` has the same in Triton.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quest_attention.ops.triton import ranks

__all__ = ["drawn_page", "threshold"]

drawn_page = gluon.jit(ranks.drawn_page.fn)
"""The same arithmetic, which is of no language's own."""


def _reached(limits: int, name: str) -> str:
    """PTX: how many of 16 ranks, two in each of eight operands, reach a limit."""
    text = f"set.ge.f16x2.f16x2 sum, $16, ${limits};\n"
    for pair in range(1, 8):
        text += f"set.ge.f16x2.f16x2 is, ${16 + pair}, ${limits}; add.f16x2 sum, sum, is;\n"
    return text + f"mov.b32 {{one, two}}, sum; add.f16 one, one, two; cvt.rni.s32.f16 {name}, one;\n"


_OF_REACHING = gl.constexpr(",".join(["=&r"] * 16 + ["r"] * 24))
_REACHING = gl.constexpr(
    "{ .reg .b32 sum, is, n, m; .reg .f16 one, two;\n"
    + _reached(24, "n")
    + _reached(32, "m")
    + "shl.b32 m, m, 16; or.b32 $0, n, m;\n"
    + "".join(f"mov.b32 ${place}, 0;\n" for place in range(1, 16))
    + "}"
)


@gluon.jit
def threshold(
    sample, live, drawn, rare, begin, first_page, last_page, free, wanted,
    FEWEST: gl.constexpr, SAMPLED: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """See `ranks`, where the same is in Triton."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 16], [32, 1], [WARPS, 1], [1, 0])
    nth = gl.arange(0, SAMPLED // 16, layout=gl.SliceLayout(1, LAYOUT))
    token = gl.arange(0, 16, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    page = begin + drawn_page(nth, rare)
    is_drawn = (nth < drawn) & (page >= first_page) & (page < last_page)
    inside = is_drawn[:, None] & (token < 16)
    if live is not None:
        lives = gl.load(live + page, mask=is_drawn, other=0)
        inside &= ((lives[:, None] >> (token % 8 * 4 + token // 8)) & 1) != 0
    at = nth[:, None] * 16 + token
    rank = gl.load(sample + at, mask=inside, other=0.0)
    is_finite = inside & (rank > float("-inf")) & (rank < float("inf"))
    low, high, known = gl.reduce(
        (
            gl.where(is_finite, rank, 65504.0).to(gl.float32),
            gl.where(is_finite, rank, -65504.0).to(gl.float32),
            inside.to(gl.int32),
        ),
        1,
        _lowest_highest_sum,
    )
    low, high, known = gl.reduce((low, high, known), 0, _lowest_highest_sum)
    rank = gl.where(inside, gl.where(is_finite, rank, 65504.0), float("-inf")).to(gl.float16)
    share = wanted.to(gl.float32) / gl.maximum(free, 1).to(gl.float32)
    most = gl.maximum((share * known.to(gl.float32)).to(gl.int32), FEWEST)
    for _ in gl.static_range(6):
        third = (high - low) * 0.33333334
        lower = (low + third).to(gl.float16)
        upper = (high - third).to(gl.float16)
        both = gl.sum(gl.sum(_reaching(rank, lower, upper), 1), 0)
        is_lower = (both & 0xFFFF) >= most
        is_upper = (both >> 16) >= most
        high = gl.where(is_upper, high, gl.where(is_lower, upper.to(gl.float32), lower.to(gl.float32)))
        low = gl.where(is_upper, upper.to(gl.float32), gl.where(is_lower, lower.to(gl.float32), low))
    return gl.where(most < known, low, -65504.0)


@gluon.jit
def _lowest_highest_sum(low, high, number, other_low, other_high, other_number):
    return gl.minimum(low, other_low), gl.maximum(high, other_high), number + other_number


@gluon.jit
def _reaching(ranks, lower, upper):
    """How many of a lane's 16 ranks reach a limit, and 65,536 times how many another: in the first of its places."""
    lower, _ = gl.broadcast(lower + gl.zeros_like(ranks), ranks)
    upper, _ = gl.broadcast(upper + gl.zeros_like(ranks), ranks)
    return gl.inline_asm_elementwise(
        _REACHING,
        _OF_REACHING,
        [ranks, lower, upper],
        dtype=gl.int32,
        is_pure=True,
        pack=16,
    )
