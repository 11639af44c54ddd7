"""Products of rows of bits with queries on tensor cores, and what is made of them: steps of `scan`, in PTX.

A tensor core multiplies 16 rows of 128 bits by eight columns of as many, and counts where both are set. Rows are signs
of 16 keys, or bits of the means of two pages; columns are two bits of four heads each. A lane has the products of row
`r` and row `r + 8` with a head, `r` being its number divided by four and the head the rest.

Tensors are `[W, 8, 8, 4]`: warps, eight pages of each, rows, heads. A lane holds all eight pages of a row and a head;
of these the one whose number is that of the row is its own, for which alone it computes what a whole page shares.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["for_all", "limits_of", "means_of", "named_of", "physical_of", "signs_of", "terms_of"]


def _of_own_page(part: int, row: int, scales: int, factors: int) -> str:
    """PTX: the product of a mean's row with four heads, of eight pages, to `times` and `plus` of a lane's own page.

    Lanes of row `r` keep what is of page `r`: of two pages each lane gives one away and keeps the other, three times.
    The numbers are those of the first operand of each tensor: products, row, scales of mean and signs, and factors.
    """
    text = """
        .reg .b32 v<8>, s, k; .reg .f32 center, times, plus; .reg .pred far, mid, near;
        """
    for name, bit in (("far", 4), ("mid", 2), ("near", 1)):
        text += f"and.b32 k, ${row}, {bit}; setp.ne.b32 {name}, k, 0;\n"
    pages = [f"${part + page}" for page in range(8)]
    for name, apart in (("far", 4), ("mid", 2), ("near", 1)):
        for page in range(apart):
            one, other = pages[page], pages[page + apart]
            text += f"selp.b32 s, {one}, {other}, {name}; selp.b32 v{page}, {other}, {one}, {name};\n"
            text += f"shfl.sync.bfly.b32 s, s, {4 * apart}, 31, -1; add.s32 v{page}, v{page}, s;\n"
        pages = [f"v{page}" for page in range(apart)]
    return (
        text
        + f"""
        cvt.rn.f32.s32 center, v0; mul.f32 center, center, ${scales};
        mul.f32 times, ${scales + 8}, ${factors + 16}; neg.f32 times, times;
        fma.rn.f32 plus, center, ${factors}, times; mul.f32 times, ${scales + 8}, ${factors + 8};
        """
    )


def _to_all_rows(name: str, to: int) -> str:
    """PTX: what lanes of row `r` have of page `r`, to all rows: an operand for each of eight pages."""
    return "".join(f"shfl.sync.idx.b32 ${to + page}, {name}, {4 * page}, 0x31f, -1;\n" for page in range(8))


def _named(limits: int, row: int) -> str:
    """PTX: of eight pages which of 16 tokens reach a limit for any of four heads, as a word of a lane's own page."""
    text = ".reg .b32 e<8>, o<8>, k; .reg .pred far, mid, near, is;\n"
    for page in range(8):
        for word, tokens in (("e", 8), ("o", 16)):
            text += f"setp.ge.s32 is, ${tokens + page}, ${limits + page}; vote.sync.ballot.b32 {word}{page}, is, -1;\n"
    for name, bit in (("far", 4), ("mid", 2), ("near", 1)):
        text += f"and.b32 k, ${row}, {bit}; setp.ne.b32 {name}, k, 0;\n"
        for page in range(bit):
            for word in "eo":
                text += f"selp.b32 {word}{page}, {word}{page + bit}, {word}{page}, {name};\n"
    for word in "eo":  # the last bit of four is set where any of them was
        text += f"and.b32 k, {word}0, 0x77777777; add.s32 k, k, 0x77777777; or.b32 {word}0, {word}0, k;\n"
    text += "shr.u32 e0, e0, 3; and.b32 e0, e0, 0x11111111; shr.u32 o0, o0, 2; and.b32 o0, o0, 0x22222222;\n"
    return text + "or.b32 e0, e0, o0;\n" + "".join(f"mov.b32 ${page}, e0;\n" for page in range(8))


def _operands(kind: str, outputs: int, *inputs: str) -> str:
    """The constraints of assembler that has eight pages of each tensor: `r` of whole numbers, `f` of float32."""
    return ",".join([f"=&{kind}"] * 8 * outputs + [one for one in inputs for _ in range(8)])


_PAGES_OF_ONE = gl.constexpr(_operands("r", 1, "r"))
_OF_TERMS = gl.constexpr(_operands("f", 2, *"rrfffff"))
_OF_LIMITS = gl.constexpr(_operands("r", 1, *"rrffffff"))
_OF_NAMED = gl.constexpr(_operands("r", 1, *"rrrr"))
_PHYSICAL = gl.constexpr("{ " + _to_all_rows("$8", 0) + "}")
_TERMS = gl.constexpr("{ " + _of_own_page(16, 24, 32, 48) + _to_all_rows("times", 0) + _to_all_rows("plus", 8) + "}")
_LIMITS = gl.constexpr(
    "{ .reg .f32 t; .reg .pred unknown;"
    + _of_own_page(8, 16, 24, 40)
    + """
        sub.f32 t, $64, plus; rcp.approx.f32 times, times; mul.f32 t, t, times; setp.nan.f32 unknown, t, t;
        cvt.rpi.s32.f32 s, t; selp.b32 s, 0x80000000, s, unknown;
    """
    + _to_all_rows("s", 0)
    + "}"
)
_NAMED = gl.constexpr("{ " + _named(24, 32) + "}")


@gluon.jit
def signs_of(first, second, low, high):
    """Products of a page's tokens with four heads in four bits, `low` and `high` two of these each: int32 of two rows.

    A lane has the products of tokens `r` and `r + 8` with a head.
    """
    return gl.inline_asm_elementwise(
        """
        { .reg .b32 z, c<4>, d<4>;
        mov.b32 z, 0;
        mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {c0,c1,c2,c3}, {$2,$3}, {$4}, {z,z,z,z};
        mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {d0,d1,d2,d3}, {$2,$3}, {$5}, {z,z,z,z};
        shl.b32 c1, c1, 1; add.s32 c0, c0, c1; mad.lo.s32 d0, d1, -2, d0; shl.b32 d0, d0, 2; add.s32 $0, c0, d0;
        shl.b32 c3, c3, 1; add.s32 c2, c2, c3; mad.lo.s32 d2, d3, -2, d2; shl.b32 d2, d2, 2; add.s32 $1, c2, d2; }
        """,
        "=&r,=&r,r,r,r,r",
        [first, second, low, high],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def means_of(words, b0, b1, b2, b3, worth):
    """Products of the means of two pages, a bit a row, with four heads in eight bits, by what each bit is worth: int32.

    To be summed over rows.
    """
    return gl.inline_asm_elementwise(
        """
        { .reg .b32 z, c<4>, d<4>, e<4>, f<4>;
        mov.b32 z, 0;
        mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {c0,c1,c2,c3}, {$2,$3}, {$4}, {z,z,z,z};
        mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {d0,d1,d2,d3}, {$2,$3}, {$6}, {z,z,z,z};
        mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {e0,e1,e2,e3}, {$2,$3}, {$8}, {z,z,z,z};
        mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {f0,f1,f2,f3}, {$2,$3}, {$10}, {z,z,z,z};
        shl.b32 c1, c1, 1; add.s32 c0, c0, c1; shl.b32 d1, d1, 1; add.s32 d0, d0, d1;
        shl.b32 e1, e1, 1; add.s32 e0, e0, e1; mad.lo.s32 f0, f1, -2, f0;
        shl.b32 d0, d0, 2; add.s32 c0, c0, d0; shl.b32 f0, f0, 2; add.s32 e0, e0, f0;
        shl.b32 e0, e0, 4; add.s32 c0, c0, e0; mul.lo.s32 $0, c0, $12;
        shl.b32 c3, c3, 1; add.s32 c2, c2, c3; shl.b32 d3, d3, 1; add.s32 d2, d2, d3;
        shl.b32 e3, e3, 1; add.s32 e2, e2, e3; mad.lo.s32 f2, f3, -2, f2;
        shl.b32 d2, d2, 2; add.s32 c2, c2, d2; shl.b32 f2, f2, 2; add.s32 e2, e2, f2;
        shl.b32 e2, e2, 4; add.s32 c2, c2, e2; mul.lo.s32 $1, c2, $12; }
        """,
        "=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r",
        [words, b0, b1, b2, b3, worth],
        dtype=gl.int32,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def for_all(x, like):
    """What is of four heads, for all pages and rows."""
    y, _ = gl.broadcast(x, like)
    return y


@gluon.jit
def physical_of(own, like):
    """The pages that lanes have of their own, to all rows, `[W, 8, 8, 4]`."""
    own = for_all(own[:, None, :, :], like)
    return gl.inline_asm_elementwise(_PHYSICAL, _PAGES_OF_ONE, [own], dtype=gl.int32, is_pure=True, pack=8)


@gluon.jit
def terms_of(part, row, mean_scale, scale, per_mean, per_sign, less):
    """What to multiply a product of signs with, and what to add, so that it is a logit: `[W, 8, 8, 4]` float32 each."""
    mean_scale, scale = for_all(mean_scale[:, None, :, :], part), for_all(scale[:, None, :, :], part)
    return gl.inline_asm_elementwise(
        _TERMS,
        _OF_TERMS,
        [part, row, mean_scale, scale, per_mean, per_sign, less],
        dtype=(gl.float32, gl.float32),
        is_pure=True,
        pack=8,
    )


@gluon.jit
def limits_of(part, row, mean_scale, scale, per_mean, per_sign, less, limit):
    """What a product of signs must reach at least, so that the logit reaches `limit`: `[W, 8, 8, 4]` int32.

    All reach it where that is not known, of a page whose keys are not finite.
    """
    mean_scale, scale = for_all(mean_scale[:, None, :, :], part), for_all(scale[:, None, :, :], part)
    return gl.inline_asm_elementwise(
        _LIMITS,
        _OF_LIMITS,
        [part, row, mean_scale, scale, per_mean, per_sign, less, limit],
        dtype=gl.int32,
        is_pure=True,
        pack=8,
    )


@gluon.jit
def named_of(first, second, limits, row):
    """Which tokens reach their limit for any of four heads, as a word of the page of a lane's row: all pages alike."""
    return gl.inline_asm_elementwise(
        _NAMED,
        _OF_NAMED,
        [first, second, limits, row],
        dtype=gl.int32,
        is_pure=True,
        pack=8,
    )
