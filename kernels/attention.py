"""Softmax attention: primal forward, dual forward (output and tangent in one pass), and backward.

O = P V with P = softmax(a Q K^T). With S' = a (Q' K^T + Q K'^T) the tangent is
O' = (P * S') V + P V' - rowsum(P * S') * O, and one accumulator holds (P * S') V + P V'.

A head dim that is no power of two is split into a power of two and a tail padded to one (72 = 64 + 8 padded to 16),
so that 72 costs 80 columns and not 128. Softmax runs in base 2 and float32. Strides are free; a layout that cannot be
read 16 bytes at a time is copied first.

float32 products are three TF32 products on the tensor cores, which keep float32's precision. Their operands, split in
two, do not fit into the registers for long: scores are summed over 32 columns at a time, read anew for every tile, and
a tail is padded to 32 columns or more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfengine.kernels.launch import Config, aligned, check_dtype, check_like, launch, widths

LOG2_E = tl.constexpr(1.4426950408889634)
COLUMNS = tl.constexpr(32)  # of float32 operands at a time

# ----------------------------------------------------------------------------
# Kernels. Names: BLOCK_M rows of queries, BLOCK_N rows of keys, HEAD + TAIL columns of a head.


@triton.jit
def _program(rows, BLOCK: tl.constexpr):
    """Number of the head among all samples' heads, and the rows of this block.

    One axis counts blocks and heads, since the others end at 65,535. Blocks of one head follow each other: they share
    what they read in the L2 cache.
    """
    blocks = tl.cdiv(rows, BLOCK)
    block = tl.program_id(0) % blocks
    return (tl.program_id(0) // blocks).to(tl.int64), block * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _head(x, head, heads, stride_b, stride_h, stride_row):
    """Where a head begins, and the stride of its rows.

    Launchers see to it that rows begin at multiples of 16 bytes, but the compiler knows of an argument only whether it
    is a multiple of 16. To divide and multiply shows it that strides are multiples of the elements in 16 bytes.
    """
    UNIT: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
    offset = head // heads * (stride_b // UNIT) + head % heads * (stride_h // UNIT)
    return x + offset * UNIT, stride_row // UNIT * UNIT


@triton.jit
def _tile(base, rows, num_rows, stride_row, first, WIDTH: tl.constexpr, DIM: tl.constexpr, EVEN: tl.constexpr = False):
    """Columns first to first + WIDTH of some rows, zero outside of the matrix (num_rows, DIM).

    EVEN: all rows exist. Then nothing is masked, `first` is a constant, and columns beyond DIM repeat others of their
    row. What they are multiplied by is zero, or the product is not stored.
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
    return tl.dot(a, b, acc, input_precision="tf32x3")  # which says nothing of operands in half precision


@triton.jit
def _dot_by_columns(a, a_rows, a_num, a_n, b, b_rows, b_num, b_n, acc, dim, DIM: tl.constexpr):
    """acc + A B^T over some rows of each. `dim` is DIM, but no constant, or the loop would be unrolled and spill."""
    for first in range(0, dim, COLUMNS):
        a_tile = _tile(a, a_rows, a_num, a_n, first, COLUMNS, DIM)
        b_tile = _tile(b, b_rows, b_num, b_n, first, COLUMNS, DIM)
        acc = _dot(a_tile, b_tile.T, acc)
    return acc


@triton.jit
def forward_kernel(
    q, k, v, dq, dk, dv, o, do, lse,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n,
    dq_b, dq_h, dq_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    o_b, o_h, o_n, do_b, do_h, do_n,
    heads, queries, keys, dim, scale,
    DIM: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp; the output's tangent too where tangents are given, which are None otherwise.

    EVEN: keys are a multiple of BLOCK_N, so that none need be masked.
    """
    head, rows = _program(queries, BLOCK_M)
    q, q_n = _head(q, head, heads, q_b, q_h, q_n)
    k, k_n = _head(k, head, heads, k_b, k_h, k_n)
    v, v_n = _head(v, head, heads, v_b, v_h, v_n)
    o, o_n = _head(o, head, heads, o_b, o_h, o_n)
    if dq is not None:
        dq, dq_n = _head(dq, head, heads, dq_b, dq_h, dq_n)
        dk, dk_n = _head(dk, head, heads, dk_b, dk_h, dk_n)
        dv, dv_n = _head(dv, head, heads, dv_b, dv_h, dv_n)
        do, do_n = _head(do, head, heads, do_b, do_h, do_n)

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

    for start in range(0, keys, BLOCK_N):
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
        if not EVEN:
            s = tl.where((cols < keys)[None, :], s, float("-inf"))
        higher = tl.maximum(peak, tl.max(s, 1))
        shrink = tl.exp2(peak - higher)
        peak = higher
        p = tl.exp2(s - peak[:, None])
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

    o1 = acc1 / total[:, None]
    _store(o, rows, queries, o_n, o1, 0, HEAD, DIM)
    if TAIL:
        o2 = acc2 / total[:, None]
        _store(o, rows, queries, o_n, o2, HEAD, TAIL, DIM)
    if dq is not None:
        mean = (dtotal / total)[:, None]
        _store(do, rows, queries, do_n, dacc1 / total[:, None] - mean * o1, 0, HEAD, DIM)
        if TAIL:
            _store(do, rows, queries, do_n, dacc2 / total[:, None] - mean * o2, HEAD, TAIL, DIM)
    tl.store(lse + head * queries + rows, (peak + tl.log2(total)) / LOG2_E, mask=rows < queries)


@triton.jit
def delta_kernel(
    o, go, lse, stats,
    o_b, o_h, o_n, go_b, go_h, go_n,
    heads, queries,
    DIM: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """What the softmax's backward takes of a row, in 8 bytes: its log-sum-exp to base 2, and rowsum(O * gradient of O).

    The latter is the upper half of an int64, the former the lower.
    """
    head, rows = _program(queries, BLOCK_M)
    o, o_n = _head(o, head, heads, o_b, o_h, o_n)
    go, go_n = _head(go, head, heads, go_b, go_h, go_n)
    o1 = _tile(o, rows, queries, o_n, 0, HEAD, DIM).to(tl.float32)
    sum = tl.sum(o1 * _tile(go, rows, queries, go_n, 0, HEAD, DIM).to(tl.float32), 1)
    if TAIL:
        o2 = _tile(o, rows, queries, o_n, HEAD, TAIL, DIM).to(tl.float32)
        sum += tl.sum(o2 * _tile(go, rows, queries, go_n, HEAD, TAIL, DIM).to(tl.float32), 1)
    at = head * queries + rows
    row_lse = tl.load(lse + at, mask=rows < queries, other=0.0) * LOG2_E
    low = row_lse.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    tl.store(stats + at, sum.to(tl.int32, bitcast=True).to(tl.int64) << 32 | low, mask=rows < queries)


@triton.jit
def _row_stats(stats, rows, queries, EVEN: tl.constexpr):
    """What `delta_kernel` stored. Rows beyond the last query get a log-sum-exp of infinity, so probability 0."""
    both = tl.load(stats + rows) if EVEN else tl.load(stats + rows, mask=rows < queries, other=0x7F800000)
    return both.to(tl.int32).to(tl.float32, bitcast=True), (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def backward_kv_kernel(
    q, k, v, go, stats, gk, gv,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, go_b, go_h, go_n,
    gk_b, gk_h, gk_n, gv_b, gv_h, gv_n,
    heads, queries, keys, dim, scale,
    DIM: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values, over all queries. EVEN: these are a multiple of BLOCK_M."""
    head, cols = _program(keys, BLOCK_N)
    q, q_n = _head(q, head, heads, q_b, q_h, q_n)
    k, k_n = _head(k, head, heads, k_b, k_h, k_n)
    v, v_n = _head(v, head, heads, v_b, v_h, v_n)
    go, go_n = _head(go, head, heads, go_b, go_h, go_n)
    stats += head * queries

    k1 = _tile(k, cols, keys, k_n, 0, HEAD, DIM)
    v1 = _tile(v, cols, keys, v_n, 0, HEAD, DIM)
    gk1 = tl.zeros((BLOCK_N, HEAD), tl.float32)
    gv1 = tl.zeros((BLOCK_N, HEAD), tl.float32)
    if TAIL:
        k2 = _tile(k, cols, keys, k_n, HEAD, TAIL, DIM)
        v2 = _tile(v, cols, keys, v_n, HEAD, TAIL, DIM)
        gk2 = tl.zeros((BLOCK_N, TAIL), tl.float32)
        gv2 = tl.zeros((BLOCK_N, TAIL), tl.float32)

    for start in range(0, queries, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q1 = _tile(q, rows, queries, q_n, 0, HEAD, DIM, EVEN)
        go1 = _tile(go, rows, queries, go_n, 0, HEAD, DIM, EVEN)
        if TAIL:
            q2 = _tile(q, rows, queries, q_n, HEAD, TAIL, DIM, EVEN)
            go2 = _tile(go, rows, queries, go_n, HEAD, TAIL, DIM, EVEN)
        s = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)  # transposed: keys by queries
        gp = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        if q.dtype.element_ty == tl.float32:
            s = _dot_by_columns(k, cols, keys, k_n, q, rows, queries, q_n, s, dim, DIM)
            gp = _dot_by_columns(v, cols, keys, v_n, go, rows, queries, go_n, gp, dim, DIM)
        else:
            s = _dot(k1, q1.T, s)
            gp = _dot(v1, go1.T, gp)
            if TAIL:
                s = _dot(k2, q2.T, s)
                gp = _dot(v2, go2.T, gp)
        # Keys beyond the last may get any probability, also infinity: it stays in their rows, which are not stored.
        row_lse, row_delta = _row_stats(stats, rows, queries, EVEN)
        p = tl.exp2(s * (scale * LOG2_E) - row_lse[None, :])
        gs = (p * (gp - row_delta[None, :])).to(q1.dtype)
        p = p.to(q1.dtype)
        gv1 = _dot(p, go1, gv1)
        gk1 = _dot(gs, q1, gk1)
        if TAIL:
            gv2 = _dot(p, go2, gv2)
            gk2 = _dot(gs, q2, gk2)

    gk, gk_n = _head(gk, head, heads, gk_b, gk_h, gk_n)
    gv, gv_n = _head(gv, head, heads, gv_b, gv_h, gv_n)
    _store(gk, cols, keys, gk_n, gk1 * scale, 0, HEAD, DIM)
    _store(gv, cols, keys, gv_n, gv1, 0, HEAD, DIM)
    if TAIL:
        _store(gk, cols, keys, gk_n, gk2 * scale, HEAD, TAIL, DIM)
        _store(gv, cols, keys, gv_n, gv2, HEAD, TAIL, DIM)


@triton.jit
def backward_q_kernel(
    q, k, v, go, stats, gq,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, go_b, go_h, go_n, gq_b, gq_h, gq_n,
    heads, queries, keys, dim, scale,
    DIM: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of queries, over all keys."""
    head, rows = _program(queries, BLOCK_M)
    q, q_n = _head(q, head, heads, q_b, q_h, q_n)
    k, k_n = _head(k, head, heads, k_b, k_h, k_n)
    v, v_n = _head(v, head, heads, v_b, v_h, v_n)
    go, go_n = _head(go, head, heads, go_b, go_h, go_n)
    row_lse, row_delta = _row_stats(stats + head * queries, rows, queries, False)

    q1 = _tile(q, rows, queries, q_n, 0, HEAD, DIM)
    go1 = _tile(go, rows, queries, go_n, 0, HEAD, DIM)
    gq1 = tl.zeros((BLOCK_M, HEAD), tl.float32)
    if TAIL:
        q2 = _tile(q, rows, queries, q_n, HEAD, TAIL, DIM)
        go2 = _tile(go, rows, queries, go_n, HEAD, TAIL, DIM)
        gq2 = tl.zeros((BLOCK_M, TAIL), tl.float32)

    for start in range(0, keys, BLOCK_N):
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
        if not EVEN:
            # Keys beyond the last have score 0, whose probability overflows where the log-sum-exp is very negative.
            s = tl.where((cols < keys)[None, :], s, float("-inf"))
        p = tl.exp2(s - row_lse[:, None])
        gs = (p * (gp - row_delta[:, None])).to(k1.dtype)
        gq1 = _dot(gs, k1, gq1)
        if TAIL:
            gq2 = _dot(gs, k2, gq2)

    gq, gq_n = _head(gq, head, heads, gq_b, gq_h, gq_n)
    _store(gq, rows, queries, gq_n, gq1 * scale, 0, HEAD, DIM)
    if TAIL:
        _store(gq, rows, queries, gq_n, gq2 * scale, HEAD, TAIL, DIM)


# ----------------------------------------------------------------------------
# Launchers. They raise ValueError for arguments that the kernels cannot take, before anything is launched.


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention of queries (B, H, N, d) over keys and values (B, H, M, d).

    Args:
        q, k, v: float16, bfloat16 or float32, on one device, with any strides; d a multiple of 8 up to 128.
        scale: of the scores; 1 / sqrt(d) if None.

    Returns:
        o (B, H, N, d), stored as (B, N, H, d), and the log-sum-exp of the scores (B, H, N) float32.
    """
    check_arguments(q, k, v)
    o, lse = _outputs(q)
    _launch_forward(q, k, v, o, lse, scale)
    return o, lse


def forward_dual(
    q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`forward`, with the tangents of the last K rows of the batch, K being theirs.

    Leading rows take the primal kernel, trailing rows the dual one.

    Args:
        q, k, v, scale: as `forward`.
        dq: (K, H, N, d); dk, dv: (K, H, M, d), in the dtype of q.

    Returns:
        o, the log-sum-exp, and the tangent of o (K, H, N, d).
    """
    check_arguments(q, k, v)
    duals = dq.shape[0]
    if duals > q.shape[0]:
        raise ValueError(f"dq has {duals} rows, more than the {q.shape[0]} of q")
    for name, tangent, primal in (("dq", dq, q), ("dk", dk, k), ("dv", dv, v)):
        check_like(name, tangent, (duals, *primal.shape[1:]), primal)
    first = q.shape[0] - duals
    o, lse = _outputs(q)
    do, _ = _outputs(dq)
    _launch_forward(q[:first], k[:first], v[:first], o[:first], lse[:first], scale)
    _launch_forward(q[first:], k[first:], v[first:], o[first:], lse[first:], scale, (dq, dk, dv, do))
    return o, lse, do


def backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, go: Tensor, gq: Tensor, gk: Tensor, gv: Tensor,
    scale: float | None = None,
) -> None:  # fmt: skip
    """Gradients of the primal: fills gq, gk, gv from go, the gradient of o, and what `forward` returned."""
    check_arguments(q, k, v)
    for name, x, like in (("o", o, q), ("go", go, q), ("gq", gq, q), ("gk", gk, k), ("gv", gv, v)):
        check_like(name, x, like.shape, like)
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    if not q.numel() or not k.numel():
        for g in (gq, gk, gv):
            g.zero_()
        return
    q, k, v, o, go = map(aligned, (q, k, v, o, go))
    outputs = gq, gk, gv
    gq, gk, gv = written = [aligned(x) for x in outputs]
    constants = shape_constants(dim, q.dtype)
    rest = (heads, queries, keys, dim, _scale(scale, dim), *constants)
    stats = torch.empty(lse.shape, dtype=torch.int64, device=lse.device)
    config = CONFIGS["delta"][tile_class(dim, q.dtype)]
    launch(
        delta_kernel, config.grid(queries, batch * heads), q,
        o, go, lse, stats, *_strides(o, go), heads, queries, *constants, **config.kwargs,
    )  # fmt: skip
    config = CONFIGS["backward_kv"][tile_class(dim, q.dtype)]
    launch(
        backward_kv_kernel, config.grid(keys, batch * heads, "BLOCK_N"), q,
        q, k, v, go, stats, gk, gv, *_strides(q, k, v, go, gk, gv), *rest,
        EVEN=queries % config.blocks["BLOCK_M"] == 0, **config.kwargs,
    )  # fmt: skip
    config = CONFIGS["backward_q"][tile_class(dim, q.dtype)]
    launch(
        backward_q_kernel, config.grid(queries, batch * heads), q,
        q, k, v, go, stats, gq, *_strides(q, k, v, go, gq), *rest, EVEN=config.even(keys), **config.kwargs,
    )  # fmt: skip
    for x, other in zip(outputs, written, strict=True):
        if other is not x:
            x.copy_(other)


def _launch_forward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float | None,
    tangents: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """Fill o and lse and, of the tangents of q, k, v and o, that of o."""
    batch, heads, queries, dim = q.shape
    if not q.numel():
        return
    if not k.numel():
        o.zero_()
        if tangents:
            tangents[-1].zero_()
        return
    config = CONFIGS["dual" if tangents else "forward"][tile_class(dim, q.dtype)]
    q, k, v = map(aligned, (q, k, v))
    # Strides of what is not there are never read.
    along = tuple(map(aligned, tangents[:3])) if tangents else (q, k, v)
    outputs = (o, tangents[3]) if tangents else (o,)
    written = [*map(aligned, outputs)]
    strides = _strides(q, k, v, *along, written[0], written[-1])
    launch(
        forward_kernel, config.grid(queries, batch * heads), q,
        q, k, v, *(along if tangents else (None,) * 3), written[0], written[1] if tangents else None, lse,
        *strides, heads, queries, k.shape[2], dim, _scale(scale, dim),
        *shape_constants(dim, q.dtype), EVEN=config.even(k.shape[2]), **config.kwargs,
    )  # fmt: skip
    for output, filled in zip(outputs, written, strict=True):
        if filled is not output:
            output.copy_(filled)


def check_arguments(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 4:
        raise ValueError(f"q must be (B, H, N, d), not of shape {tuple(q.shape)}")
    batch, heads, _, dim = q.shape
    if dim % 8 or not 8 <= dim <= 128:
        raise ValueError(f"q has head dim {dim}; accepted are multiples of 8 from 8 to 128")
    check_dtype("q", q)
    if k.ndim != 4 or (k.shape[0], k.shape[1], k.shape[3]) != (batch, heads, dim):
        raise ValueError(f"k must be ({batch}, {heads}, M, {dim}), not of shape {tuple(k.shape)}")
    check_like("k", k, k.shape, q)
    check_like("v", v, k.shape, q)


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, queries, dim = q.shape
    o = torch.empty(batch, queries, heads, dim, dtype=q.dtype, device=q.device).transpose(1, 2)
    return o, torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)


def _strides(*tensors: Tensor) -> list[int]:
    """Strides of samples, heads and rows."""
    return [step for x in tensors for step in x.stride()[:3]]


def _scale(scale: float | None, dim: int) -> float:
    return dim**-0.5 if scale is None else scale


def shape_constants(dim: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """DIM, HEAD and TAIL of a head dim."""
    return (dim, *widths(dim, COLUMNS.value if dtype == torch.float32 else 16))


def tile_class(dim: int, dtype: torch.dtype) -> str:
    """Which configuration fits: by the columns that a row occupies and the bytes of an element."""
    if dtype == torch.float32:
        return "float32"
    columns = sum(widths(dim))
    return "narrow" if columns <= 80 else "medium" if columns <= 96 else "wide"


# No stack on sm_80, sm_90, sm_100 by `python -m benchmarks.static`. For sm_90 tiles were searched that keep the tensor
# cores busy for 80 % or more of a main loop's modelled cycles and leave room for two or more programs of four warps per
# multiprocessor; of the dual for "medium", 88 and 96 columns, one of eight. `maxnreg` stands where the assembler would
# rather spill than take more registers. Times: not measured yet.
CONFIGS: dict[str, dict[str, Config]] = {
    "forward": {
        "narrow": Config(BLOCK_M=64, BLOCK_N=128, num_warps=4, num_stages=2),
        "medium": Config(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2),
        "wide": Config(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2),
        "float32": Config(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1),
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
        "medium": Config(BLOCK_M=16, BLOCK_N=64, num_warps=4, num_stages=2, maxnreg=168),
        "wide": Config(BLOCK_M=32, BLOCK_N=64, num_warps=4, num_stages=2),
        "float32": Config(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1),
    },
    "backward_q": {
        "narrow": Config(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=2),
        "medium": Config(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=2),
        "wide": Config(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=2),
        "float32": Config(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1),
    },
}
