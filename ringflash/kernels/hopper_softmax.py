"""The softmax of a tile in the Hopper forward: weights from scores, and the rescaling of the accumulators.

A row's maximum m need not be exact: any number near it keeps the weights in range. So m is kept until a weight would
exceed 2^8. There are two ways to detect this:

    softmax_step    compute the tile's maximum, which the four threads of a row exchange, and then the weights
    guess_step      compute the weights with the old m; if a thread's sum exceeds 2^8, its warp computes the maximum
                    and the weights again

A guess saves the maximum of a tile, one instruction per score, and the exchange, and its exponentials start at once. It
has no mask, so a row's first tile, which determines m, and the edges use softmax_step. In the loop of guesses, m, z and
acc's factors are [rows, 4]: each of a row's four threads keeps its own sum, and the sums are added after the loop.

A thread has columns 2 t + 8 k and 2 t + 8 k + 1 of two rows, where t is its number among the four and k = 0, 1, ...
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ringflash.kernels.hopper_parts import NEG_INF, ROWS, mask_scores, product_layout, softcap

SLACK = gl.constexpr(8.0)  # the largest log2 of a weight before the row's maximum is computed again; fp16 ends at 16


@gluon.jit
def softmax_step(s, m, z, key, row_start, row_end, call, EDGE: gl.constexpr):
    """Update a row's m and z with a tile of scores: the weights p, the new m and z, and acc's factor."""
    if call.CAPPED:
        s = softcap(s, call.cap_scale)
    if EDGE:
        s = mask_scores(s, row_start, row_end, key, "0fFF800000")
    best = gl.max(s, 1) * call.c
    m_new = gl.where(best > m + SLACK, best, m)
    shift = m_new
    if EDGE:
        shift = gl.where(m_new == NEG_INF, 0.0, m_new)  # a row that has seen nothing: -inf - -inf would be NaN
    p = gl.exp2(s * call.c - gl.expand_dims(shift, 1))
    alpha = gl.exp2(m - shift)
    return p, m_new, z * alpha + gl.sum(p, 1), alpha


# -- the guess


@gluon.constexpr_function
def ptx_name(dtype):
    """The name of fp16 or bf16 in PTX."""
    return {"fp16": "f16", "bf16": "bf16"}[dtype.name]


@gluon.constexpr_function
def guess_asm(count, half):
    """PTX: the weights of a thread's two rows in 16 bits, from the old maxima, or from new ones if a sum is large.

    The first `count` registers become p, in the form of `packed`. Of the next `count`, four are set: the maximum and
    the sum of the first row, then of the second. Operands: scores, maxima, c, `count` each.
    """
    s = [f"${2 * count + i}" for i in range(count)]
    c, limit = f"${4 * count}", "0f43800000"  # 2^SLACK
    weights = []
    for i in range(0, count, 2):
        row = i % 4 // 2
        weights.append(f"fma.rn.f32 t, {s[i]}, {c}, minus{row}; ex2.approx.ftz.f32 t, t;")
        weights.append(f"fma.rn.f32 u, {s[i + 1]}, {c}, minus{row}; ex2.approx.ftz.f32 u, u;")
        weights.append(f"cvt.rn.{half}x2.f32 two, u, t; mov.b32 ${i}, two; mov.b32 ${i + 1}, 0; add.f32 t, t, u;")
        weights.append(f"mov.f32 sum{row}, t;" if i < 4 else f"add.f32 sum{row}, sum{row}, t;")
    maxima = []
    for row in range(2):
        first, *others = [s[i] for i in range(count) if i % 4 // 2 == row]
        maxima.append(f"mov.f32 t, {first};" + " ".join(f"max.f32 t, t, {x};" for x in others))
        for lane in (1, 2):  # of the four threads of the row
            maxima.append(f"shfl.sync.bfly.b32 u, t, {lane}, 0x1f, 0xffffffff; max.f32 t, t, u;")
        maxima.append(f"mul.f32 t, t, {c}; max.f32 m{row}, m{row}, t; neg.f32 minus{row}, m{row};")
    return f"""{{
        .reg .pred some, other;
        .reg .b32 two;
        .reg .f32 t, u, m0, m1, minus0, minus1, sum0, sum1;
        mov.f32 m0, ${3 * count}; mov.f32 m1, ${3 * count + 2};
        neg.f32 minus0, m0; neg.f32 minus1, m1;
        {" ".join(weights)}
        setp.gt.f32 some, sum0, {limit};
        setp.gt.f32 other, sum1, {limit};
        or.pred some, some, other;
        vote.sync.any.pred some, some, 0xffffffff;
        @!some bra DONE;
        {" ".join(maxima + weights)}
        DONE:
        mov.f32 ${count}, m0; mov.f32 ${count + 1}, sum0; mov.f32 ${count + 2}, m1; mov.f32 ${count + 3}, sum1;
    }}"""


@gluon.constexpr_function
def guess_operands(count):
    """`count` weights and `count` registers of state, all written before the last operand is read; three operands."""
    return ",".join(["=&f"] * 2 * count + ["f"] * 3 * count)


@gluon.constexpr_function
def halvings(count):
    """How many halvings reduce a power of two to 1."""
    return count.bit_length() - 1


@gluon.jit
def guess_step(s, m, z, call, dtype: gl.constexpr):
    """`softmax_step` of a full tile, with m, z and alpha [rows, 4], and p as `packed` makes it."""
    if call.CAPPED:
        s = softcap(s, call.cap_scale)
    S: gl.constexpr = s.type.layout
    M: gl.constexpr = m.type.layout
    COUNT: gl.constexpr = call.BLOCK_K // 2  # registers of a thread: 64 rows over 128 threads
    asm: gl.constexpr = guess_asm(COUNT, ptx_name(dtype))
    p, state = gl.inline_asm_elementwise(
        asm, guess_operands(COUNT), [s, across(m, s), gl.full([ROWS, call.BLOCK_K], call.c, gl.float32, S)],
        dtype=(gl.float32, gl.float32), is_pure=False, pack=COUNT,
    )  # fmt: skip
    state = state.reshape([ROWS, call.BLOCK_K // 8, 4, 2]).permute((0, 2, 3, 1))
    for _ in gl.static_range(halvings(call.BLOCK_K // 8)):  # keeps each thread's first value
        state, _rest = gl.split(state.reshape([ROWS, 4, 2, state.shape[3] // 2, 2]))
    m_new, total = gl.split(state.reshape([ROWS, 4, 2]))
    m_new = gl.convert_layout(m_new, M, assert_trivial=True)
    total = gl.convert_layout(total, M, assert_trivial=True)
    alpha = gl.exp2(m - m_new)
    return p, m_new, z * alpha + total, alpha


# -- conversions between values per row and per thread of a row


@gluon.jit
def to_threads(m, z, alpha, COLUMNS: gl.constexpr):
    """A softmax state [rows] as [rows, 4], for `guess_step`; the four z add up to the row's."""
    S: gl.constexpr = product_layout(COLUMNS)
    return by_thread(m, COLUMNS, S), by_thread(z * 0.25, COLUMNS, S), by_thread(alpha, COLUMNS, S)


@gluon.jit
def by_thread(x, COLUMNS: gl.constexpr, layout: gl.constexpr):
    """x [rows] as [rows, 4]: each of a row's four threads holds its own copy."""
    wide = gl.broadcast(gl.expand_dims(x, 1), gl.zeros([ROWS, COLUMNS], gl.float32, layout))[0]
    return gl.max(gl.max(wide.reshape([ROWS, COLUMNS // 8, 4, 2]), 3), 1)


@gluon.jit
def to_rows(m, z, COLUMNS: gl.constexpr):
    """m and z [rows] from [rows, 4]."""
    R: gl.constexpr = gl.SliceLayout(1, product_layout(COLUMNS))
    return gl.convert_layout(gl.max(m, 1), R), gl.convert_layout(gl.sum(z, 1), R)


@gluon.jit
def across(x, tile):
    """x [rows] or [rows, 4] broadcast over all columns of a tile; with [rows, 4], each thread uses its own value."""
    L: gl.constexpr = tile.type.layout
    if len(x.shape) == 1:
        wide = gl.broadcast(gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, L)), 1), tile)[0]
    else:
        by_four = gl.zeros(tile.shape, gl.float32, L).reshape([ROWS, tile.shape[1] // 8, 4, 2])
        T: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, by_four.type.layout))
        x = gl.expand_dims(gl.expand_dims(gl.convert_layout(x, T, assert_trivial=True), 1), 3)
        wide = gl.broadcast(x, by_four)[0].reshape(tile.shape)
        wide = gl.convert_layout(wide, L, assert_trivial=True)
    return wide


# -- scaling the accumulators, and p as an operand


@gluon.constexpr_function
def scale_asm(count):
    """PTX: multiply `count` registers $0.. by $2count.. in place, unless all of a warp's factors are 1.

    A thread has two rows, whose factors alternate in pairs.
    """
    scale = " ".join(f"mul.f32 ${i}, ${i}, ${2 * count + i};" for i in range(count))
    return f"""{{
        .reg .pred some, other;
        setp.neu.f32 some, ${2 * count}, 0f3F800000;
        setp.neu.f32 other, ${2 * count + 2}, 0f3F800000;
        or.pred some, some, other;
        vote.sync.any.pred some, some, 0xffffffff;
        @!some bra DONE;
        {scale}
        DONE:
    }}"""


@gluon.constexpr_function
def scale_operands(count):
    """`count` results, initialised from the first `count` operands, and `count` factors."""
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["f"] * count)


@gluon.jit
def scale_rows(acc, alpha):
    """acc with each row multiplied by its alpha. Each warp branches on its own; Triton's `if` is uniform."""
    COUNT: gl.constexpr = acc.shape[1] // 2  # registers of a thread: 64 rows over 128 threads
    return gl.inline_asm_elementwise(
        scale_asm(COUNT), scale_operands(COUNT), [acc, across(alpha, acc)], dtype=gl.float32, is_pure=True, pack=COUNT
    )


@gluon.constexpr_function
def packed_asm(half):
    """PTX: two numbers in 16 bits, in the first of two registers."""
    return f"{{.reg .b32 two; cvt.rn.{half}x2.f32 two, $3, $2; mov.b32 $0, two; mov.b32 $1, 0;}}"


@gluon.jit
def packed(p, dtype: gl.constexpr):
    """p in 16 bits, two numbers in every other register. In a loop, 16-bit values would take one register each.

    The PTX is volatile so that LLVM does not postpone it, which would keep two tiles in registers.
    """
    asm: gl.constexpr = packed_asm(ptx_name(dtype))
    return gl.inline_asm_elementwise(asm, "=f,=f,f,f", [p], dtype=gl.float32, is_pure=False, pack=2)


@gluon.jit
def unpacked(p, dtype: gl.constexpr):
    """The inverse of `packed`: p as 16-bit values."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,f,f", [p], dtype=dtype.value, is_pure=True, pack=2)
