"""The end of a query tile in the Hopper forward, in Gluon: merge with the carry, divide, store.

The softmax state (m, z, acc) is merged with the carried Partial, a state with z = 1, at M = max(m, m_carry):

    z' = 2^(m - M) z + 2^(m_carry - M)    acc' = 2^(m - M) acc + 2^(m_carry - M) carry
    out = acc' / z'                       lse = ln(2) (M + log2 z')

The copy engine moves the carry and out through shared memory. At head_dim 256, which has no room for them (DIRECT),
they move directly between registers and memory.
"""

# Annotations stay objects in this file (no `from __future__ import annotations`), as in all files of Gluon kernels.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from ringflash.kernels.gluon_names import copy_out, reinterpret
from ringflash.kernels.hopper_parts import NEG_INF

LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def elements(x, stride_b, stride_s, stride_h, job, first_row, tile):
    """Pointers to the rows of x [B, S, H, D] from `first_row` that correspond to a tile of accumulators."""
    A: gl.constexpr = tile.type.layout
    rows = first_row + gl.arange(0, tile.shape[0], layout=gl.SliceLayout(1, A))
    columns = gl.arange(0, tile.shape[1], layout=gl.SliceLayout(0, A))
    x += job.batch.to(gl.int64) * stride_b + job.head.to(gl.int64) * stride_h
    return x + gl.expand_dims(rows.to(gl.int64) * stride_s, 1) + gl.expand_dims(columns, 0)


@gluon.jit
def inside(first_row, tile, call):
    """Which elements of a tile of accumulators are rows of the sequence."""
    rows = first_row + gl.arange(0, tile.shape[0], layout=gl.SliceLayout(1, tile.type.layout))
    return gl.broadcast(gl.expand_dims(rows < call.queries, 1), tile)[0]


@gluon.jit
def result(acc, m, z, m_carry, carry_pipe, number, carry, job, first_row, call):
    """out and lse of rows whose softmax state is (m, z, acc), merged with the carried state."""
    A: gl.constexpr = acc.type.layout
    if call.CARRY:
        m_new = gl.maximum(m, m_carry)
        shift = gl.where(m_new == NEG_INF, 0.0, m_new)
        alpha = gl.exp2(m - shift)
        alpha_carry = gl.exp2(m_carry - shift)
        z = z * alpha + alpha_carry
        m = m_new
        if call.DIRECT:
            at = elements(carry, call.carry_stride_b, call.carry_stride_s, call.carry_stride_h, job, first_row, acc)
            carried = gl.load(at, inside(first_row, acc, call), 0.0)
            acc = acc * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, A)), 1)
        else:
            carry_pipe.wait_full(number)  # the copy engine
            acc = acc * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, A)), 1)
            carried = carry_pipe.tile(number).load(A)
        acc += carried * gl.expand_dims(gl.convert_layout(alpha_carry, gl.SliceLayout(1, A)), 1)
    seen = z > 0
    z = gl.where(seen, z, 1.0)  # a row that has seen nothing: acc is 0 already
    acc = acc * gl.expand_dims(gl.convert_layout(1.0 / z, gl.SliceLayout(1, A)), 1)
    return acc, gl.where(seen, (m + gl.log2(z)) * LN_2, NEG_INF)


@gluon.jit
def write(acc, out, stride_b, stride_s, stride_h, carry_pipe, number, job, first_row, call):
    """Store rows of the result from `first_row` on. out: a pointer with strides if DIRECT, otherwise a descriptor."""
    if call.DIRECT:
        at = elements(out, stride_b, stride_s, stride_h, job, first_row, acc)
        gl.store(at, acc.to(out.dtype.element_ty), inside(first_row, acc, call))
    else:
        store_output(acc, [job.batch, job.head, first_row, 0], carry_pipe.tile(number), out)


@gluon.jit
def store_output(acc, place, staged, out):
    """Start storing rows of out, through shared memory. The copy engine clips rows past the end."""
    if staged.dtype != out.dtype:
        layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([acc.shape[0], acc.shape[1]], out.dtype)
        staged = reinterpret(staged, out.dtype, acc.shape, layout)
    staged.store(acc.to(out.dtype))
    fence_async_shared()  # makes the threads' writes visible to the copy engine
    copy_out(out, place, staged)
