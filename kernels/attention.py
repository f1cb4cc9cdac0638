"""Softmax attention: primal forward, dual forward (output and tangent in one pass), and backward.

O = P V with P = softmax(a Q K^T). With S' = a (Q' K^T + Q K'^T), the tangent is
O' = (P * S') V + P V' - rowsum(P * S') * O, and one accumulator holds (P * S') V + P V'.

A head dim that is not a power of two is split into a power of two and a tail padded to one (72 = 64 + 8 padded to 16),
so that 72 costs 80 columns, not 128. Softmax runs in base 2 and float32. Strides are free, but a layout that cannot be
read 16 bytes at a time is copied first.

float32 products are three TF32 products on the tensor cores, which keep float32's precision. Their operands, split in
two, do not stay in registers: scores are summed over 32 columns at a time, read again for every tile, and a tail is
padded to at least 32 columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from mfengine.kernels.launch import (
    Config,
    Launch,
    aligned,
    check_device,
    check_dtype,
    check_like,
    empty_like,
    misaligned,
    nothing,
    planned,
    readable,
    widths,
)

LOG2_E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(0x7F800000)  # bits of float32 infinity
COLUMNS = tl.constexpr(32)  # of float32 operands at a time

# ----------------------------------------------------------------------------
# Kernels. Names: BLOCK_M rows of queries, BLOCK_N rows of keys, HEAD + TAIL columns of a head.


@triton.jit
def _program(rows, BLOCK: tl.constexpr):
    """Index of the head among the heads of all samples, and the first row of this block.

    One axis counts both blocks and heads, because the others end at 65,535. Blocks of one head are adjacent, so that
    they share what they read in the L2 cache.
    """
    blocks = tl.cdiv(rows, BLOCK)
    return (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK


@triton.jit
def _sequence(cu_seqlens, head, heads, rows):
    """First row and number of rows of a head's sequence, if sequences are concatenated in one sample."""
    if cu_seqlens is None:
        return 0, rows
    else:
        first = tl.load(cu_seqlens + head // heads)
        return first.to(tl.int64), tl.load(cu_seqlens + head // heads + 1) - first


@triton.jit
def _row_values(x, head, heads, first, rows, cu_seqlens):
    """Start of a head's row values in (B, H, N), or in the concatenated (H, n) of sequences."""
    if cu_seqlens is None:
        return x + head * rows
    else:
        return x + first * heads + head % heads * rows


@triton.jit
def _head(x, head, heads, stride_b, stride_h, stride_row, first=0, GROUP: tl.constexpr = 1):
    """Start of row `first` of a head, and the stride of rows; GROUP query heads share one head of x.

    Launchers ensure that rows start at multiples of 16 bytes, but the compiler knows only whether an argument is a
    multiple of 16. Dividing and multiplying shows it that strides are multiples of the elements in 16 bytes.
    """
    UNIT: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
    offset = head // heads * (stride_b // UNIT) + head % heads // GROUP * (stride_h // UNIT)
    return x + (offset + first * (stride_row // UNIT)) * UNIT, stride_row // UNIT * UNIT


@triton.jit
def _tile(base, rows, num_rows, stride_row, first, WIDTH: tl.constexpr, DIM: tl.constexpr, EVEN: tl.constexpr = False):
    """Columns first to first + WIDTH of some rows, zero outside the matrix (num_rows, DIM).

    EVEN: all rows exist. Then nothing is masked, `first` is a constant, and columns beyond DIM repeat others of their
    row. Either they are multiplied by zero, or the product is not stored.
    """
    cols = tl.arange(0, WIDTH)
    if EVEN:
        if first + WIDTH > DIM:
            cols = cols % (DIM - first)
        return tl.load(base + rows[:, None] * stride_row + (first + cols)[None, :])
    else:
        cols += first
        mask = (rows < num_rows)[:, None] & (cols < DIM)[None, :]
        return tl.load(base + rows[:, None] * stride_row + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _store(base, rows, num_rows, stride_row, value, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    cols = FIRST + tl.arange(0, WIDTH)
    mask = (rows < num_rows)[:, None] & (cols < DIM)[None, :]
    value = value.to(base.dtype.element_ty)
    tl.store(base + rows[:, None] * stride_row + cols[None, :], value, mask=mask)


@triton.jit
def _dot(a, b, acc):
    return tl.dot(a, b, acc, input_precision="tf32x3")  # has no effect on half precision


@triton.jit
def _dot_by_columns(a, a_rows, a_num, a_n, b, b_rows, b_num, b_n, acc, dim, DIM: tl.constexpr):
    """acc + A B^T over some rows of each. `dim` equals DIM but is not a constant: an unrolled loop would spill."""
    for first in range(0, dim, COLUMNS):
        a_tile = _tile(a, a_rows, a_num, a_n, first, COLUMNS, DIM)
        b_tile = _tile(b, b_rows, b_num, b_n, first, COLUMNS, DIM)
        acc = _dot(a_tile, b_tile.T, acc)
    return acc


@triton.jit
def _last_key(start, queries, keys, cu_q, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr):
    """How many keys the queries from `start` on see; none after the end of a sequence."""
    if CAUSAL:
        keys = tl.minimum(keys, start + BLOCK_M)
    if cu_q is not None:
        keys = tl.where(start < queries, keys, 0)
    return keys


@triton.jit
def _steps(start, queries, keys, cu_k, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr):
    """First and last step through the queries of GROUP heads, head by head, that see keys from `start` on."""
    low = 0
    if CAUSAL:
        low = start // BLOCK_M * BLOCK_M
    high = queries
    if cu_k is not None:
        high = tl.where(start < keys, high, 0)
    if GROUP > 1:
        high = low + tl.cdiv(high - low, BLOCK_M) * BLOCK_M * GROUP
    return low, high


@triton.jit
def _step(step, low, high, GROUP: tl.constexpr):
    """First query of a step, and which of the GROUP heads the step belongs to."""
    if GROUP == 1:
        return step, 0
    else:
        return low + (step - low) % ((high - low) // GROUP), ((step - low) // ((high - low) // GROUP)).to(tl.int64)


@triton.jit
def _member(x, member, stride_h, GROUP: tl.constexpr):
    """Start of the head that is `member` heads after x, in multiples of 16 bytes."""
    if GROUP == 1:
        return x
    else:
        UNIT: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
        return x + member * (stride_h // UNIT) * UNIT


@triton.jit
def _masked(
    s, rows, cols, queries, keys, mask, mask_m, mask_n,
    EVEN: tl.constexpr, CAUSAL: tl.constexpr, TRANSPOSED: tl.constexpr = False,
):  # fmt: skip
    """Scores to base 2, and -inf if a query does not see a key. EVEN: all keys exist. TRANSPOSED: keys by queries."""
    if mask is not None:
        at, exist = rows.to(tl.int64)[:, None] * mask_m + cols[None, :] * mask_n, (rows < queries)[:, None]
        seen = tl.load(mask + at, exist & (cols < keys)[None, :], 0)
        if TRANSPOSED:  # a row of a mask is read 8 or 16 bytes at a time
            seen = seen.T
        if mask.dtype.element_ty == tl.int1:
            s = tl.where(seen, s, float("-inf"))
        else:
            s += seen.to(tl.float32) * LOG2_E
    if TRANSPOSED:
        row, col = rows[None, :], cols[:, None]
    else:
        row, col = rows[:, None], cols[None, :]
    if CAUSAL:
        s = tl.where(row >= col, s, float("-inf"))
    if not EVEN:
        s = tl.where(col < keys, s, float("-inf"))
    return s


@triton.jit
def forward_kernel(
    q, k, v, dq, dk, dv, o, do, lse, mean, mask, cu_q, cu_k,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n,
    dq_b, dq_h, dq_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    o_b, o_h, o_n, do_b, do_h, do_n, mask_b, mask_h, mask_m, mask_n,
    heads, queries, keys, dim, scale,
    DIM: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp; with tangents (otherwise None), also the output's tangent.

    `mean`, unless None, gets rowsum(P * S') of the tangent. The log-sum-exp of a row that sees no key is inf.
    EVEN: keys are a multiple of BLOCK_N, so none need be masked. GROUP: query heads that share one head of keys.
    """
    head, start_m = _program(queries, BLOCK_M)
    first_m, queries = _sequence(cu_q, head, heads, queries)
    first_n, keys = _sequence(cu_k, head, heads, keys)
    rows = start_m + tl.arange(0, BLOCK_M)
    q, q_n = _head(q, head, heads, q_b, q_h, q_n, first_m)
    k, k_n = _head(k, head, heads, k_b, k_h, k_n, first_n, GROUP)
    v, v_n = _head(v, head, heads, v_b, v_h, v_n, first_n, GROUP)
    o, o_n = _head(o, head, heads, o_b, o_h, o_n, first_m)
    if dq is not None:
        dq, dq_n = _head(dq, head, heads, dq_b, dq_h, dq_n, first_m)
        dk, dk_n = _head(dk, head, heads, dk_b, dk_h, dk_n, first_n, GROUP)
        dv, dv_n = _head(dv, head, heads, dv_b, dv_h, dv_n, first_n, GROUP)
        do, do_n = _head(do, head, heads, do_b, do_h, do_n, first_m)
    if mask is not None:
        mask += head // heads * mask_b + head % heads * mask_h

    q1 = _tile(q, rows, queries, q_n, 0, HEAD, DIM)
    acc1 = tl.zeros((BLOCK_M, HEAD), tl.float32)
    if TAIL:
        q2 = _tile(q, rows, queries, q_n, HEAD, TAIL, DIM)
        acc2 = tl.zeros((BLOCK_M, TAIL), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if dq is not None:
        dq1 = _tile(dq, rows, queries, dq_n, 0, HEAD, DIM)
        dacc1 = tl.zeros((BLOCK_M, HEAD), tl.float32)
        if TAIL:
            dq2 = _tile(dq, rows, queries, dq_n, HEAD, TAIL, DIM)
            dacc2 = tl.zeros((BLOCK_M, TAIL), tl.float32)
        dtotal = tl.zeros((BLOCK_M,), tl.float32)  # rowsum(P * S')

    for start in range(0, _last_key(start_m, queries, keys, cu_q, BLOCK_M, CAUSAL), BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        ds = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if q.dtype.element_ty == tl.float32:
            s = _dot_by_columns(q, rows, queries, q_n, k, cols, keys, k_n, s, dim, DIM)
            if dq is not None:
                ds = _dot_by_columns(dq, rows, queries, dq_n, k, cols, keys, k_n, ds, dim, DIM)
                ds = _dot_by_columns(q, rows, queries, q_n, dk, cols, keys, dk_n, ds, dim, DIM)
        else:
            k1 = _tile(k, cols, keys, k_n, 0, HEAD, DIM, EVEN)
            s = _dot(q1, k1.T, s)
            if dq is not None:
                dk1 = _tile(dk, cols, keys, dk_n, 0, HEAD, DIM, EVEN)
                ds = _dot(dq1, k1.T, ds)
                ds = _dot(q1, dk1.T, ds)
            if TAIL:
                k2 = _tile(k, cols, keys, k_n, HEAD, TAIL, DIM, EVEN)
                s = _dot(q2, k2.T, s)
                if dq is not None:
                    dk2 = _tile(dk, cols, keys, dk_n, HEAD, TAIL, DIM, EVEN)
                    ds = _dot(dq2, k2.T, ds)
                    ds = _dot(q2, dk2.T, ds)
        s *= scale * LOG2_E
        s = _masked(s, rows, cols, queries, keys, mask, mask_m, mask_n, EVEN, CAUSAL)
        higher = tl.maximum(peak, tl.max(s, 1))
        if mask is not None:  # the maximum may still be -inf: differences of infinities are NaN
            shrink = tl.exp2(peak - tl.where(higher == float("-inf"), 0.0, higher))
            p = tl.exp2(s - tl.where(higher == float("-inf"), 0.0, higher)[:, None])
        else:
            shrink = tl.exp2(peak - higher)
            p = tl.exp2(s - higher[:, None])
        peak = higher
        total = total * shrink + tl.sum(p, 1)
        if dq is not None:
            pds = p * (ds * scale)
            dtotal = dtotal * shrink + tl.sum(pds, 1)
            pds = pds.to(v.dtype.element_ty)
        p = p.to(v.dtype.element_ty)

        v1 = _tile(v, cols, keys, v_n, 0, HEAD, DIM, EVEN)
        acc1 = _dot(p, v1, acc1 * shrink[:, None])
        if dq is not None:
            dv1 = _tile(dv, cols, keys, dv_n, 0, HEAD, DIM, EVEN)
            dacc1 = _dot(pds, v1, dacc1 * shrink[:, None])
            dacc1 = _dot(p, dv1, dacc1)
        if TAIL:
            v2 = _tile(v, cols, keys, v_n, HEAD, TAIL, DIM, EVEN)
            acc2 = _dot(p, v2, acc2 * shrink[:, None])
            if dq is not None:
                dv2 = _tile(dv, cols, keys, dv_n, HEAD, TAIL, DIM, EVEN)
                dacc2 = _dot(pds, v2, dacc2 * shrink[:, None])
                dacc2 = _dot(p, dv2, dacc2)

    if mask is not None or cu_k is not None:
        peak = tl.where(total > 0, peak, float("inf"))
        total = tl.where(total > 0, total, 1.0)
    row_lse = (peak + tl.log2(total)) / LOG2_E
    o1 = acc1 / total[:, None]
    _store(o, rows, queries, o_n, o1, 0, HEAD, DIM)
    if TAIL:
        o2 = acc2 / total[:, None]
        _store(o, rows, queries, o_n, o2, HEAD, TAIL, DIM)
    if dq is not None:
        dmean = dtotal / total
        _store(do, rows, queries, do_n, dacc1 / total[:, None] - dmean[:, None] * o1, 0, HEAD, DIM)
        if TAIL:
            _store(do, rows, queries, do_n, dacc2 / total[:, None] - dmean[:, None] * o2, HEAD, TAIL, DIM)
        if mean is not None:
            mean = _row_values(mean, head, heads, first_m, queries, cu_q)
            tl.store(mean + rows, dmean, mask=rows < queries)
    lse = _row_values(lse, head, heads, first_m, queries, cu_q)
    tl.store(lse + rows, row_lse, mask=rows < queries)


@triton.jit
def _pack(low, high):
    """Two float32 in an int64."""
    low = low.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return high.to(tl.int32, bitcast=True).to(tl.int64) << 32 | low


@triton.jit
def delta_kernel(
    o, go, lse, stats, cu_q,
    o_b, o_h, o_n, go_b, go_h, go_n,
    heads, queries,
    DIM: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The row values for the softmax's backward, in 8 bytes: log-sum-exp to base 2, and rowsum(O * gradient of O).

    They are the lower and the upper half of an int64.
    """
    head, start_m = _program(queries, BLOCK_M)
    first, queries = _sequence(cu_q, head, heads, queries)
    rows = start_m + tl.arange(0, BLOCK_M)
    o, o_n = _head(o, head, heads, o_b, o_h, o_n, first)
    go, go_n = _head(go, head, heads, go_b, go_h, go_n, first)
    o1 = _tile(o, rows, queries, o_n, 0, HEAD, DIM).to(tl.float32)
    sum = tl.sum(o1 * _tile(go, rows, queries, go_n, 0, HEAD, DIM).to(tl.float32), 1)
    if TAIL:
        o2 = _tile(o, rows, queries, o_n, HEAD, TAIL, DIM).to(tl.float32)
        sum += tl.sum(o2 * _tile(go, rows, queries, go_n, HEAD, TAIL, DIM).to(tl.float32), 1)
    lse = _row_values(lse, head, heads, first, queries, cu_q)
    stats = _row_values(stats, head, heads, first, queries, cu_q)
    row_lse = tl.load(lse + rows, mask=rows < queries, other=0.0) * LOG2_E
    tl.store(stats + rows, _pack(row_lse, sum), mask=rows < queries)


@triton.jit
def _row_stats(stats, rows, queries, other: tl.constexpr, EVEN: tl.constexpr):
    """Row values from `_pack`. Rows beyond the last query get `other`; INF as log-sum-exp means probability 0."""
    both = tl.load(stats + rows) if EVEN else tl.load(stats + rows, mask=rows < queries, other=other)
    return both.to(tl.int32).to(tl.float32, bitcast=True), (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def backward_kv_kernel(
    q, k, v, go, stats, gk, gv, mask, cu_q, cu_k,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, go_b, go_h, go_n,
    gk_b, gk_h, gk_n, gv_b, gv_h, gv_n, mask_b, mask_h, mask_m, mask_n,
    heads, queries, keys, dim, scale,
    DIM: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values, over all queries. EVEN: queries are a multiple of BLOCK_M."""
    head, start_n = _program(keys, BLOCK_N)
    head *= GROUP  # the first of the query heads
    first_m, queries = _sequence(cu_q, head, heads, queries)
    first_n, keys = _sequence(cu_k, head, heads, keys)
    cols = start_n + tl.arange(0, BLOCK_N)
    q, q_n = _head(q, head, heads, q_b, q_h, q_n, first_m)
    k, k_n = _head(k, head, heads, k_b, k_h, k_n, first_n, GROUP)
    v, v_n = _head(v, head, heads, v_b, v_h, v_n, first_n, GROUP)
    go, go_n = _head(go, head, heads, go_b, go_h, go_n, first_m)
    stats = _row_values(stats, head, heads, first_m, queries, cu_q)
    if mask is not None:
        mask += head // heads * mask_b + head % heads * mask_h

    k1 = _tile(k, cols, keys, k_n, 0, HEAD, DIM)
    v1 = _tile(v, cols, keys, v_n, 0, HEAD, DIM)
    gk1 = tl.zeros((BLOCK_N, HEAD), tl.float32)
    gv1 = tl.zeros((BLOCK_N, HEAD), tl.float32)
    if TAIL:
        k2 = _tile(k, cols, keys, k_n, HEAD, TAIL, DIM)
        v2 = _tile(v, cols, keys, v_n, HEAD, TAIL, DIM)
        gk2 = tl.zeros((BLOCK_N, TAIL), tl.float32)
        gv2 = tl.zeros((BLOCK_N, TAIL), tl.float32)

    low, high = _steps(start_n, queries, keys, cu_k, BLOCK_M, CAUSAL, GROUP)
    for step in range(low, high, BLOCK_M):
        start, member = _step(step, low, high, GROUP)
        rows = start + tl.arange(0, BLOCK_M)
        q_at, go_at = _member(q, member, q_h, GROUP), _member(go, member, go_h, GROUP)
        q1 = _tile(q_at, rows, queries, q_n, 0, HEAD, DIM, EVEN)
        go1 = _tile(go_at, rows, queries, go_n, 0, HEAD, DIM, EVEN)
        if TAIL:
            q2 = _tile(q_at, rows, queries, q_n, HEAD, TAIL, DIM, EVEN)
            go2 = _tile(go_at, rows, queries, go_n, HEAD, TAIL, DIM, EVEN)
        s = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)  # transposed: keys by queries
        gp = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        if q.dtype.element_ty == tl.float32:
            s = _dot_by_columns(k, cols, keys, k_n, q_at, rows, queries, q_n, s, dim, DIM)
            gp = _dot_by_columns(v, cols, keys, v_n, go_at, rows, queries, go_n, gp, dim, DIM)
        else:
            s = _dot(k1, q1.T, s)
            gp = _dot(v1, go1.T, gp)
            if TAIL:
                s = _dot(k2, q2.T, s)
                gp = _dot(v2, go2.T, gp)
        # Keys beyond the last may get any probability, even infinity: it stays in their rows, which are not stored.
        row_lse, row_delta = _row_stats(stats + member * queries, rows, queries, INF, EVEN)
        s *= scale * LOG2_E
        mask_at = mask if mask is None else mask + member * mask_h
        s = _masked(s, rows, cols, queries, keys, mask_at, mask_m, mask_n, True, CAUSAL, True)
        p = tl.exp2(s - row_lse[None, :])
        gs = (p * (gp - row_delta[None, :])).to(q1.dtype)
        p = p.to(q1.dtype)
        gv1 = _dot(p, go1, gv1)
        gk1 = _dot(gs, q1, gk1)
        if TAIL:
            gv2 = _dot(p, go2, gv2)
            gk2 = _dot(gs, q2, gk2)

    gk, gk_n = _head(gk, head, heads, gk_b, gk_h, gk_n, first_n, GROUP)
    gv, gv_n = _head(gv, head, heads, gv_b, gv_h, gv_n, first_n, GROUP)
    _store(gk, cols, keys, gk_n, gk1 * scale, 0, HEAD, DIM)
    _store(gv, cols, keys, gv_n, gv1, 0, HEAD, DIM)
    if TAIL:
        _store(gk, cols, keys, gk_n, gk2 * scale, HEAD, TAIL, DIM)
        _store(gv, cols, keys, gv_n, gv2, HEAD, TAIL, DIM)


@triton.jit
def backward_q_kernel(
    q, k, v, go, stats, gq, mask, cu_q, cu_k,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, go_b, go_h, go_n, gq_b, gq_h, gq_n, mask_b, mask_h, mask_m, mask_n,
    heads, queries, keys, dim, scale,
    DIM: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of queries, over all keys."""
    head, start_m = _program(queries, BLOCK_M)
    first_m, queries = _sequence(cu_q, head, heads, queries)
    first_n, keys = _sequence(cu_k, head, heads, keys)
    rows = start_m + tl.arange(0, BLOCK_M)
    q, q_n = _head(q, head, heads, q_b, q_h, q_n, first_m)
    k, k_n = _head(k, head, heads, k_b, k_h, k_n, first_n, GROUP)
    v, v_n = _head(v, head, heads, v_b, v_h, v_n, first_n, GROUP)
    go, go_n = _head(go, head, heads, go_b, go_h, go_n, first_m)
    if mask is not None:
        mask += head // heads * mask_b + head % heads * mask_h
    stats = _row_values(stats, head, heads, first_m, queries, cu_q)
    row_lse, row_delta = _row_stats(stats, rows, queries, INF, False)

    q1 = _tile(q, rows, queries, q_n, 0, HEAD, DIM)
    go1 = _tile(go, rows, queries, go_n, 0, HEAD, DIM)
    gq1 = tl.zeros((BLOCK_M, HEAD), tl.float32)
    if TAIL:
        q2 = _tile(q, rows, queries, q_n, HEAD, TAIL, DIM)
        go2 = _tile(go, rows, queries, go_n, HEAD, TAIL, DIM)
        gq2 = tl.zeros((BLOCK_M, TAIL), tl.float32)

    for start in range(0, _last_key(start_m, queries, keys, cu_q, BLOCK_M, CAUSAL), BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        k1 = _tile(k, cols, keys, k_n, 0, HEAD, DIM, EVEN)
        v1 = _tile(v, cols, keys, v_n, 0, HEAD, DIM, EVEN)
        if TAIL:
            k2 = _tile(k, cols, keys, k_n, HEAD, TAIL, DIM, EVEN)
            v2 = _tile(v, cols, keys, v_n, HEAD, TAIL, DIM, EVEN)
        s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        gp = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if q.dtype.element_ty == tl.float32:
            s = _dot_by_columns(q, rows, queries, q_n, k, cols, keys, k_n, s, dim, DIM)
            gp = _dot_by_columns(go, rows, queries, go_n, v, cols, keys, v_n, gp, dim, DIM)
        else:
            s = _dot(q1, k1.T, s)
            gp = _dot(go1, v1.T, gp)
            if TAIL:
                s = _dot(q2, k2.T, s)
                gp = _dot(go2, v2.T, gp)
        s *= scale * LOG2_E
        # Keys beyond the last have score 0, whose probability overflows at a very negative log-sum-exp.
        s = _masked(s, rows, cols, queries, keys, mask, mask_m, mask_n, EVEN, CAUSAL)
        p = tl.exp2(s - row_lse[:, None])
        gs = (p * (gp - row_delta[:, None])).to(k1.dtype)
        gq1 = _dot(gs, k1, gq1)
        if TAIL:
            gq2 = _dot(gs, k2, gq2)

    gq, gq_n = _head(gq, head, heads, gq_b, gq_h, gq_n, first_m)
    _store(gq, rows, queries, gq_n, gq1 * scale, 0, HEAD, DIM)
    if TAIL:
        _store(gq, rows, queries, gq_n, gq2 * scale, HEAD, TAIL, DIM)


# ----------------------------------------------------------------------------
# Launchers. They raise ValueError for arguments that the kernels do not support, before anything is launched.


class Sequences(NamedTuple):
    """Sequences of different lengths, concatenated in one sample (1, H, T, d); each sees only its own keys."""

    cu_q: Tensor
    """(S + 1,) int32, on the device of q: the first query of each sequence, followed by T"""
    cu_k: Tensor
    """the same for keys"""
    longest_q: int
    longest_k: int


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, is_causal: bool = False, mask: Tensor | None = None,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of queries (B, H, N, d) over keys and values (B, G, M, d).

    Args:
        q, k, v: float16, bfloat16 or float32, on one device, with any strides; d a multiple of 8 up to 128. G divides
            H: each group of H / G consecutive query heads shares one head of keys and values.
        scale: factor of the scores; None takes 1 / sqrt(d).
        is_causal: query i sees key j if i >= j, even if N differs from M.
        mask: broadcastable to (B, H, N, M); bool, true where a query sees a key, or a term added to the scores, in the
            dtype of q or float32. A row that sees no key gives zero.
        sequences: the tokens' sequences, if B is 1; excludes a mask.

    Returns:
        o (B, H, N, d), stored as (B, N, H, d), and the log-sum-exp of the scores (B, H, N) float32, inf for a row that
        sees no key. For sequences the latter is the concatenated (H, n) of each.
    """
    seen, longest = _seen(mask, sequences)
    launch = _plan_forward((q, k, v, *seen), None, scale, is_causal, longest, *CONFIGS["forward"].values())
    if launch is None or misaligned(q, k, v):
        q, k, v = map(aligned, (q, k, v))
        return forward(q, k, v, scale, is_causal, mask, sequences)
    o, lse = _output(q), _row_values_of(q)
    launch(q, k, v, None, None, None, o, None, lse, None, *seen)
    return o, lse


def forward_packed(qkv: Tensor, heads: int, tokens: int, qk: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`forward` for qkv (B, N, 3 * H * d) or (B * N, 3 * H * d), whose last dimension is ordered (q, k, v), head,
    channel.

    o is (B, N, H * d) or (B * N, H * d). If given, qk (B, N, 2 * H * d) or (B * N, 2 * H * d) replaces queries and
    keys.
    """
    packed = (qkv,) if qk is None else (qk, qkv)
    launch = _plan_forward((*packed, *_ALL), (heads, tokens), None, False, None, *CONFIGS["forward"].values())
    if launch is None or misaligned(*packed):
        return forward_packed(_dense(qkv), heads, tokens, None if qk is None else _dense(qk))
    o, lse = _packed_output(qkv), _packed_row_values(qkv, heads, tokens)
    launch(packed[0], packed[0], qkv, None, None, None, o, None, lse, None, *_ALL)
    return o, lse


def forward_dual(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, scale: float | None = None,
    is_causal: bool = False, mask: Tensor | None = None, sequences: Sequences | None = None, *, mean: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Like `forward`, with tangents of the last K rows of the batch; the tangents' size gives K.

    The first rows take the primal kernel, the last ones the dual kernel.

    Args:
        q, k, v, scale, is_causal, mask, sequences: as in `forward`.
        dq: (K, H, N, d); dk, dv: (K, G, M, d), in the dtype of q.
        mean: also return rowsum(P * S').

    Returns:
        o, the log-sum-exp, and the tangent of o (K, H, N, d); with `mean`, rowsum(P * S') (K, H, N) float32, which
        `backward_dual` reads.
    """
    inputs = q, k, v, dq, dk, dv
    seen, longest = _seen(mask, sequences)
    configs = *CONFIGS["forward"].values(), *CONFIGS["dual"].values()
    plan = _plan_dual((*inputs, *seen), None, scale, is_causal, longest, *configs)
    if plan is None or misaligned(*inputs):
        q, k, v, dq, dk, dv = map(aligned, inputs)
        return forward_dual(q, k, v, dq, dk, dv, scale, is_causal, mask, sequences, mean=mean)
    o, lse, do = _output(q), _row_values_of(q), _output(dq)
    means = (_row_values_of(dq),) if mean else ()
    lead, tail = plan
    lead(q, k, v, None, None, None, o, None, lse, None, *seen)
    tail(*inputs, o, do, lse, *(means or (None,)), *seen)
    return o, lse, do, *means


def forward_dual_packed(
    qkv: Tensor, dqkv: Tensor, heads: int, tokens: int, qk: Tensor | None = None, dqk: Tensor | None = None, *,
    mean: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`forward_dual` for qkv and qk as in `forward_packed`, with dqkv and dqk for the last K samples."""
    packed = (qkv,) if qk is None else (qk, qkv)
    along = (dqkv,) if dqk is None else (dqk, dqkv)
    inputs = (*packed, *along)
    configs = *CONFIGS["forward"].values(), *CONFIGS["dual"].values()
    plan = _plan_dual((*inputs, *_ALL), (heads, tokens), None, False, None, *configs)
    if plan is None or misaligned(*inputs):
        qk, dqk = (None if x is None else _dense(x) for x in (qk, dqk))
        return forward_dual_packed(_dense(qkv), _dense(dqkv), heads, tokens, qk, dqk, mean=mean)
    o, lse, do = _packed_output(qkv), _packed_row_values(qkv, heads, tokens), _packed_output(dqkv)
    means = (_packed_row_values(dqkv, heads, tokens),) if mean else ()
    lead, tail = plan
    lead(packed[0], packed[0], qkv, None, None, None, o, None, lse, None, *_ALL)
    tail(packed[0], packed[0], qkv, along[0], along[0], dqkv, o, do, lse, *(means or (None,)), *_ALL)
    return o, lse, do, *means


def backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, go: Tensor, scale: float | None = None,
    is_causal: bool = False, mask: Tensor | None = None, sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the primal, from the gradient go of o and the results of `forward`."""
    inputs = q, k, v, o, go
    seen, longest = _seen(mask, sequences)
    plan = _plan_backward((*inputs, lse, *seen), None, scale, is_causal, longest, *_backward_configs())
    if plan is None or misaligned(*inputs):
        q, k, v, o, go = map(aligned, inputs)
        return backward(q, k, v, o, lse, go, scale, is_causal, mask, sequences)
    gq, gk, gv = (empty_like(x) for x in (q, k, v))
    plan(q, k, v, o, go, lse, *seen, gq, gk, gv)
    return gq, gk, gv


def backward_packed(
    qkv: Tensor, o: Tensor, lse: Tensor, go: Tensor, heads: int, tokens: int, qk: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`backward` for `forward_packed`; returns the gradients of qkv and qk.

    Without a qk, these are the same tensor. With one, the part of the first for queries and keys is not written.
    """
    packed = (qkv,) if qk is None else (qk, qkv)
    plan = _plan_backward((*packed, o, go, lse, *_ALL), (heads, tokens), None, False, None, *_backward_configs())
    if plan is None or misaligned(*packed, o, go):
        qkv, o, go = map(_dense, (qkv, o, go))
        return backward_packed(qkv, o, lse, go, heads, tokens, None if qk is None else _dense(qk))
    gqkv = empty_like(qkv)
    gqk = gqkv if qk is None else empty_like(qk)
    plan(packed[0], packed[0], qkv, o, go, lse, *_ALL, gqk, gqk, gqkv)
    return gqkv, gqk


_ALL = (None, None, None)  # no mask and no sequences: every query sees every key
_Seen = tuple["Tensor | None", "Tensor | None", "Tensor | None"]


def _seen(mask: Tensor | None, sequences: Sequences | None) -> tuple[_Seen, tuple[int, int] | None]:
    """The kernels' arguments for which keys a query sees, and the longest sequences."""
    if sequences is None:
        return (mask, None, None), None
    if mask is not None:
        raise ValueError("attention of sequences takes no mask")
    return (None, sequences.cu_q, sequences.cu_k), (sequences.longest_q, sequences.longest_k)


# ----------------------------------------------------------------------------
# Plans: launches for tensors of a given layout, or None if it cannot be read 16 bytes at a time. The last three tensors
# are the mask and the sequences. `packed` is None if queries, keys and values are separate tensors. Otherwise it holds
# heads and tokens, and they are parts of one or two tensors: the second has the values; its other parts are not read.


class _Problem(NamedTuple):
    """Sizes and other arguments of the kernels; with sequences, these are the `samples`."""

    samples: int
    heads: int
    queries: int
    keys: int
    dim: int
    scale: float
    mask: tuple[int, ...]
    """strides; zero without a mask"""
    constants: dict[str, Any]
    dense: bool
    """whether all samples have the length of the tensors"""
    tiles: tuple[str, ...]
    """names of configurations, the most special first: the first that a kernel has applies"""

    @property
    def scalars(self) -> tuple[Any, ...]:
        return *self.mask, self.heads, self.queries, self.keys, self.dim, self.scale

    def strides(self, *parts: _Part) -> list[int]:
        """Strides of samples, heads and rows. Sequences are in one sample."""
        return [step for p in parts for step in (p.heads.stride(0) if self.dense else 0, *p.heads.stride()[1:3])]

    def config(self, configs: dict[str, Config]) -> Config:
        return next(configs[name] for name in self.tiles if name in configs)

    def even(self, config: Config, block: str = "BLOCK_N") -> bool:
        return self.dense and (self.keys if block == "BLOCK_N" else self.queries) % config.blocks[block] == 0


def _problem(
    parts: Sequence[_Part], seen: Sequence[Tensor | None], scale: float | None, is_causal: bool,
    longest: tuple[int, int] | None,
) -> _Problem:  # fmt: skip
    q, k, v = (p.heads for p in parts)
    mask, cu_q, cu_k = seen
    check_arguments(q, k, v)
    samples, heads, queries, dim = q.shape
    keys = k.shape[2]
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        mask_strides = check_mask(mask, q, keys).stride()
    if cu_q is not None and cu_k is not None and longest is not None:
        samples = check_sequences(cu_q, cu_k, q)
        queries, keys = longest
    group = heads // max(k.shape[1], 1)
    constants = {**shape_constants(q), "CAUSAL": is_causal, "GROUP": group}
    scale = dim**-0.5 if scale is None else scale
    usual, generation = tile_class(dim, q.dtype), _generation(q)
    kind = ", causal" if is_causal else "" if mask is None else ", masked"
    tiles = f"{usual}{kind}, {generation}", f"{usual}{kind}", f"{usual}, {generation}", usual
    return _Problem(samples, heads, queries, keys, dim, scale, mask_strides, constants, cu_q is None, tiles)


@planned
def _plan_forward(
    tensors: tuple[Tensor, ...], packed: tuple[int, int] | None, scale: float | None, is_causal: bool,
    longest: tuple[int, int] | None, *_: Config,
) -> Callable[..., None] | None:  # fmt: skip
    primals = _parts(tensors[:-3], packed)
    problem = _problem(primals, tensors[-3:], scale, is_causal, longest)
    return _forward(primals, (), 0, len(primals[0].heads), problem) if _readable(primals) else None


@planned
def _plan_dual(
    tensors: tuple[Tensor, ...], packed: tuple[int, int] | None, scale: float | None, is_causal: bool,
    longest: tuple[int, int] | None, *_: Config,
) -> tuple[Callable[..., None], Callable[..., None]] | None:  # fmt: skip
    """Launches for the first rows, without a tangent, and for the last ones."""
    half = (len(tensors) - 3) // 2
    primals, tangents = _parts(tensors[:half], packed), _parts(tensors[half:-3], packed)
    problem = _problem(primals, tensors[-3:], scale, is_causal, longest)
    batch, duals = len(primals[0].heads), len(tangents[0].heads)
    if duals > batch:
        raise ValueError(f"dq has {duals} rows, more than the {batch} of q")
    for name, tangent, primal in zip(("dq", "dk", "dv"), tangents, primals, strict=True):
        check_like(name, tangent.heads, (duals, *primal.heads.shape[1:]), primal.heads)
    if not _readable((*primals, *tangents)):
        return None
    first = batch - duals
    return _forward(primals, (), 0, first, problem), _forward(primals, tangents, first, batch, problem)


def _forward(
    primals: Sequence[_Part], tangents: Sequence[_Part], first: int, last: int, problem: _Problem
) -> Callable[..., None]:
    """The launch for rows `first` to `last`; tangents cover only these. o and its tangent are (B, N, H, d)."""
    _, heads, tokens, dim = primals[0].heads.shape
    if not (last - first) * heads * tokens:
        return nothing
    if not primals[1].heads.shape[2]:
        return partial(_zero_outputs, first, last)
    config = problem.config(CONFIGS["dual" if tangents else "forward"])
    of_output = (tokens * heads * dim, dim, heads * dim)
    dense = (of_output[0] if problem.dense else 0, *of_output[1:])
    # Strides of missing tensors are never read.
    strides = [*problem.strides(*primals, *(tangents or primals)), *dense, *dense]
    starts = [p.start + first * p.heads.stride(0) for p in primals]
    along = [p.start for p in tangents] or [0, 0, 0]
    samples = last - first if problem.dense else problem.samples
    return Launch(
        forward_kernel, config.grid(problem.queries, samples * heads), (*strides, *problem.scalars),
        {**problem.constants, "EVEN": problem.even(config), **config.kwargs},
        (*starts, *along, first * of_output[0], 0, first * heads * tokens, 0, first * problem.mask[0]),
    )  # fmt: skip


def _zero_outputs(first: int, last: int, *tensors: Tensor | None) -> None:
    """The result of a launch without keys."""
    o, do, lse, mean = tensors[6:10]
    assert o is not None
    assert lse is not None
    o[first:last].zero_()
    lse[first:last] = torch.inf
    for x in (do, mean):
        if x is not None:
            x.zero_()


@planned
def _plan_backward(
    tensors: tuple[Tensor, ...], packed: tuple[int, int] | None, scale: float | None, is_causal: bool,
    longest: tuple[int, int] | None, *_: Config,
) -> Callable[..., None] | None:  # fmt: skip
    """For q, k, v, o, go, lse, the mask, sequences, and the dense gradients of q, k and v."""
    inputs, (o, go) = tensors[:-6], tensors[-6:-4]
    parts = _parts(inputs, packed)
    problem = _problem(parts, tensors[-3:], scale, is_causal, longest)
    q, k = parts[:2]
    outer = [_Part(x if packed is None else _heads(x, *packed, 1)[0], 0) for x in (o, go)]
    for name, part in zip(("o", "go"), outer, strict=True):
        check_like(name, part.heads, q.heads.shape, q.heads)
    if not q.heads.numel() or not k.heads.numel():
        return _zero_gradients
    if not _readable((*parts, *outer)):
        return None
    gradients = _parts([torch.empty(x.shape, dtype=x.dtype, device="meta") for x in inputs], packed)
    constants, programs = problem.constants, problem.samples * problem.heads
    starts = [p.start for p in parts]
    delta, backward_kv, backward_q = (problem.config(CONFIGS[kind]) for kind in ("delta", "backward_kv", "backward_q"))
    launch_delta = Launch(
        delta_kernel, delta.grid(problem.queries, programs),
        (*problem.strides(*outer), problem.heads, problem.queries),
        {**shape_constants(q.heads), **delta.kwargs},
    )  # fmt: skip
    launch_kv = Launch(
        backward_kv_kernel, backward_kv.grid(problem.keys, programs // constants["GROUP"], "BLOCK_N"),
        (*problem.strides(*parts, outer[1], *gradients[1:]), *problem.scalars),
        {**constants, "EVEN": problem.even(backward_kv, "BLOCK_M"), **backward_kv.kwargs},
        (*starts, 0, 0, *(p.start for p in gradients[1:])),
    )  # fmt: skip
    launch_q = Launch(
        backward_q_kernel, backward_q.grid(problem.queries, programs),
        (*problem.strides(*parts, outer[1], gradients[0]), *problem.scalars),
        {**constants, "EVEN": problem.even(backward_q), **backward_q.kwargs}, starts,
    )  # fmt: skip

    def launch(
        q: Tensor, k: Tensor, v: Tensor, o: Tensor, go: Tensor, lse: Tensor,
        mask: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, gq: Tensor, gk: Tensor, gv: Tensor,
    ) -> None:  # fmt: skip
        stats = empty_like(lse, torch.int64)
        launch_delta(o, go, lse, stats, cu_q)
        launch_kv(q, k, v, go, stats, gk, gv, mask, cu_q, cu_k)
        launch_q(q, k, v, go, stats, gq, mask, cu_q, cu_k)

    return launch


def _zero_gradients(*tensors: Tensor) -> None:
    for gradient in tensors[-3:]:
        gradient.zero_()


class _Part(NamedTuple):
    """Heads (B, H, N, d), and the element of their tensor at which they start."""

    heads: Tensor
    start: int


def _parts(tensors: Sequence[Tensor], packed: tuple[int, int] | None) -> list[_Part]:
    """Queries, keys and values."""
    if packed is None:
        return [_Part(x, 0) for x in tensors]
    qk, qkv = tensors[0], tensors[-1]
    *_, v = _heads(qkv, *packed, 3)
    q, k = _heads(qk, *packed, 3 if qk is qkv else 2)[:2]
    owners = ((q, qk), (k, qk), (v, qkv))
    return [_Part(part, int(part.storage_offset() - x.storage_offset())) for part, x in owners]


def _heads(x: Tensor, heads: int, tokens: int, parts: int) -> tuple[Tensor, ...]:
    """Parts (B, H, N, d) of x (B, N, parts * H * d) or (B * N, parts * H * d)."""
    batch = len(x) if x.ndim == 3 else len(x) // tokens
    return x.view(batch, tokens, parts, heads, x.shape[-1] // (parts * heads)).permute(2, 0, 3, 1, 4).unbind(0)


def _readable(parts: Sequence[_Part]) -> bool:
    return all(readable(p.heads) for p in parts)


def check_arguments(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 4:
        raise ValueError(f"q must be (B, H, N, d), not of shape {tuple(q.shape)}")
    batch, heads, _, dim = q.shape
    if dim % 8 or not 8 <= dim <= 128:
        raise ValueError(f"q has head dim {dim}; it must be a multiple of 8 from 8 to 128")
    check_dtype("q", q)
    if k.ndim != 4 or (k.shape[0], k.shape[3]) != (batch, dim) or heads % max(k.shape[1], 1):
        raise ValueError(
            f"k must be ({batch}, G, M, {dim}), G a divisor of {heads} heads, not of shape {tuple(k.shape)}"
        )
    check_like("k", k, k.shape, q)
    check_like("v", v, k.shape, q)


def check_mask(mask: Tensor, q: Tensor, keys: int) -> Tensor:
    """The mask as (B, H, N, M)."""
    shape = (*q.shape[:3], keys)
    if mask.dtype not in (torch.bool, q.dtype, torch.float32):
        raise ValueError(f"mask must be bool, {q.dtype} or float32, not {mask.dtype}")
    check_device("mask", mask, q)
    try:
        return mask.expand(shape)
    except RuntimeError:
        raise ValueError(f"mask must be broadcastable to {shape}, not of shape {tuple(mask.shape)}") from None


def check_sequences(cu_q: Tensor, cu_k: Tensor, q: Tensor) -> int:
    """The number of sequences. The values in cu_q and cu_k are not read."""
    if len(q) != 1:
        raise ValueError(f"sequences must be concatenated in one sample; q has {len(q)}")
    for name, x in (("cu_q", cu_q), ("cu_k", cu_k)):
        if x.dtype != torch.int32 or x.ndim != 1 or x.shape != cu_q.shape or not len(x) or not x.is_contiguous():
            raise ValueError(f"{name} must be int32 of shape (S + 1,), not {x.dtype} of shape {tuple(x.shape)}")
        check_device(name, x, q)
    return len(cu_q) - 1


def _output(q: Tensor) -> Tensor:
    batch, heads, queries, dim = q.shape
    return torch.empty(batch, queries, heads, dim, dtype=q.dtype, device=q.device).transpose(1, 2)


def _row_values_of(q: Tensor) -> Tensor:
    return torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


def _dense(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _packed_output(qkv: Tensor) -> Tensor:
    *rows, width = qkv.shape
    return torch.empty(*rows, width // 3, dtype=qkv.dtype, device=qkv.device)


def _packed_row_values(qkv: Tensor, heads: int, tokens: int) -> Tensor:
    batch = qkv.numel() // (tokens * qkv.shape[-1])
    return torch.empty(batch, heads, tokens, dtype=torch.float32, device=qkv.device)


def _backward_configs() -> list[Config]:
    return [config for name in ("delta", "backward_kv", "backward_q") for config in CONFIGS[name].values()]


def shape_constants(q: Tensor) -> dict[str, int]:
    """Columns of the two tiles of a row of q (B, H, N, d)."""
    dim = q.shape[-1]
    head, tail = widths(dim, COLUMNS.value if q.dtype == torch.float32 else 16)
    # With mma.sync all warps share the rows of a sum that is wider than long: each computes all scores, and they spill.
    if head == 128 and q.dtype != torch.float32 and _generation(q) == "Ampere":
        head = tail = 64
    return {"DIM": dim, "HEAD": head, "TAIL": tail}


def _generation(x: Tensor) -> str:
    """The instruction of the tensor cores on x's GPU: Ampere has mma.sync, as desktop GPUs have, too; Hopper wgmma;
    Blackwell tcgen05. For tensors on a CPU, the GPU that Triton compiles for, or Hopper in its interpreter.
    """
    if x.is_cuda:
        major = torch.cuda.get_device_capability(x.device)[0]
    elif triton.knobs.runtime.interpret:
        major = 9
    else:
        major = int(driver.active.get_current_target().arch) // 10
    return {9: "Hopper", 10: "Blackwell"}.get(major, "Ampere")


def tile_class(dim: int, dtype: torch.dtype) -> str:
    """Which configuration applies, from the columns that a row occupies and the bytes of an element."""
    if dtype == torch.float32:
        return "float32"
    columns = sum(widths(dim))
    return "narrow" if columns <= 80 else "medium" if columns <= 96 else "wide"


# No stack, except what benchmarks/static.py allows on sm_80. For sm_90, tiles were searched that keep the tensor cores
# busy for 80 % or more of a main loop's modelled cycles and leave room for two or more programs of four warps per
# multiprocessor; for the dual of "medium" (88 and 96 columns), one program of eight warps. `maxnreg` is set where the
# assembler spills before it takes more registers. Times: not measured yet.
CONFIGS: dict[str, dict[str, Config]] = {
    "forward": {
        "narrow": Config(BLOCK_M=64, BLOCK_N=128, num_warps=4, num_stages=2),
        "narrow, masked": Config(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2),
        "narrow, causal, Ampere": Config(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2),
        "narrow, causal, Blackwell": Config(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2),
        "medium": Config(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2),
        "medium, Blackwell": Config(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2, maxnreg=255),
        "wide": Config(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2),
        "float32": Config(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1, maxnreg=255),
    },
    "dual": {
        "narrow": Config(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=2),
        "medium": Config(BLOCK_M=128, BLOCK_N=32, num_warps=8, num_stages=2, maxnreg=255),
        "wide": Config(BLOCK_M=64, BLOCK_N=16, num_warps=4, num_stages=2),
        "float32": Config(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1),
    },
    "delta": dict.fromkeys(("narrow", "medium", "wide", "float32"), Config(BLOCK_M=32, num_warps=4, num_stages=1)),
    "backward_kv": {
        "narrow": Config(BLOCK_M=32, BLOCK_N=64, num_warps=4, num_stages=1),
        "narrow, masked, Ampere": Config(BLOCK_M=16, BLOCK_N=64, num_warps=4, num_stages=1),
        "narrow, masked, Blackwell": Config(BLOCK_M=32, BLOCK_N=64, num_warps=4, num_stages=2),
        "medium": Config(BLOCK_M=16, BLOCK_N=64, num_warps=4, num_stages=2, maxnreg=168),
        "medium, masked, Ampere": Config(BLOCK_M=16, BLOCK_N=64, num_warps=4, num_stages=1),
        "medium, masked, Hopper": Config(BLOCK_M=16, BLOCK_N=64, num_warps=4, num_stages=1),
        "wide": Config(BLOCK_M=32, BLOCK_N=64, num_warps=4, num_stages=2),
        "wide, Ampere": Config(BLOCK_M=16, BLOCK_N=64, num_warps=4, num_stages=2),
        "wide, masked, Ampere": Config(BLOCK_M=16, BLOCK_N=64, num_warps=4, num_stages=1),
        "wide, masked, Hopper": Config(BLOCK_M=32, BLOCK_N=64, num_warps=4, num_stages=1),
        "float32": Config(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1),
    },
    "backward_q": {
        "narrow": Config(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=2),
        "medium": Config(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=2),
        "wide": Config(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=2),
        "float32": Config(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1),
    },
}
