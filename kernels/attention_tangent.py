"""The backward of attention through its tangent: gradients of a loss of output and tangent, of all six inputs.

With G, H the gradients of O, O' and, per row, r = rowsum(P * S'), c = H . O and delta = G . O + H . O', and with
D = S' - r and A = H V^T - c: gS' = P * A and gS = P * (G V^T + H V'^T + A * D - delta). Then

    gV = P^T G + (P * D)^T H            gV' = P^T H
    gK = a (gS^T Q + gS'^T Q')          gK' = a gS'^T Q
    gQ = a (gS K + gS' K')              gQ' = a gS' K

All row sums come from what the forward saved, so no pass is needed for them. Nothing is added with atomics, so
gradients repeat bit for bit. Names, blocks and tiles are those of `attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfengine.kernels.attention import (
    INF,
    LOG2_E,
    Sequences,
    _dot,
    _dot_by_columns,
    _head,
    _last_key,
    _masked,
    _member,
    _pack,
    _Part,
    _problem,
    _program,
    _readable,
    _row_stats,
    _row_values,
    _seen,
    _sequence,
    _step,
    _steps,
    _store,
    _tile,
    shape_constants,
)
from mfengine.kernels.launch import Config, Launch, aligned, check_like, empty_like, misaligned, planned

# ----------------------------------------------------------------------------
# Kernels. An operand is a matrix whose rows are those of a head: where it begins, its rows, how many there are, their
# stride, and two tiles: its first HEAD columns, and TAIL others.


@triton.jit
def _operand(
    base, rows, num_rows, stride, HEAD: tl.constexpr, TAIL: tl.constexpr, DIM: tl.constexpr, EVEN: tl.constexpr = False
):
    head = _tile(base, rows, num_rows, stride, 0, HEAD, DIM, EVEN)
    tail = head
    if TAIL:
        tail = _tile(base, rows, num_rows, stride, HEAD, TAIL, DIM, EVEN)
    return base, rows, num_rows, stride, head, tail


@triton.jit
def _scores(acc, a, b, dim, DIM: tl.constexpr, TAIL: tl.constexpr):
    """acc + A B^T."""
    if a[4].dtype == tl.float32:
        return _dot_by_columns(a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], acc, dim, DIM)
    else:
        acc = _dot(a[4], b[4].T, acc)
        if TAIL:
            acc = _dot(a[5], b[5].T, acc)
        return acc


@triton.jit
def _product(head, tail, p, b, TAIL: tl.constexpr):
    """P B, added to its first columns and to the rest."""
    head = _dot(p, b[4], head)
    if TAIL:
        tail = _dot(p, b[5], tail)
    return head, tail


@triton.jit
def _store_both(base, rows, num, stride, head, tail, HEAD: tl.constexpr, TAIL: tl.constexpr, DIM: tl.constexpr):
    _store(base, rows, num, stride, head, 0, HEAD, DIM)
    if TAIL:
        _store(base, rows, num, stride, tail, HEAD, TAIL, DIM)


@triton.jit
def delta_dual_kernel(
    o, do, go, gdo, lse, mean, stats, dstats, vstats, cu_q,
    o_b, o_h, o_n, do_b, do_h, do_n, go_b, go_h, go_n, gdo_b, gdo_h, gdo_n,
    heads, queries,
    DIM: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Two row values in 8 bytes each time: log-sum-exp to base 2 and c; r and delta; log-sum-exp and r."""
    head, start_m = _program(queries, BLOCK_M)
    first, queries = _sequence(cu_q, head, heads, queries)
    rows = start_m + tl.arange(0, BLOCK_M)
    o, o_n = _head(o, head, heads, o_b, o_h, o_n, first)
    do, do_n = _head(do, head, heads, do_b, do_h, do_n, first)
    go, go_n = _head(go, head, heads, go_b, go_h, go_n, first)
    gdo, gdo_n = _head(gdo, head, heads, gdo_b, gdo_h, gdo_n, first)
    tile = _tile(o, rows, queries, o_n, 0, HEAD, DIM).to(tl.float32)
    gtile = _tile(gdo, rows, queries, gdo_n, 0, HEAD, DIM).to(tl.float32)
    c = tl.sum(tile * gtile, 1)
    delta = tl.sum(tile * _tile(go, rows, queries, go_n, 0, HEAD, DIM).to(tl.float32), 1)
    delta += tl.sum(gtile * _tile(do, rows, queries, do_n, 0, HEAD, DIM).to(tl.float32), 1)
    if TAIL:
        tile = _tile(o, rows, queries, o_n, HEAD, TAIL, DIM).to(tl.float32)
        gtile = _tile(gdo, rows, queries, gdo_n, HEAD, TAIL, DIM).to(tl.float32)
        c += tl.sum(tile * gtile, 1)
        delta += tl.sum(tile * _tile(go, rows, queries, go_n, HEAD, TAIL, DIM).to(tl.float32), 1)
        delta += tl.sum(gtile * _tile(do, rows, queries, do_n, HEAD, TAIL, DIM).to(tl.float32), 1)
    offset = _row_values(rows, head, heads, first, queries, cu_q)
    row_lse = tl.load(lse + offset, mask=rows < queries, other=0.0) * LOG2_E
    row_mean = tl.load(mean + offset, mask=rows < queries, other=0.0)
    tl.store(stats + offset, _pack(row_lse, c), mask=rows < queries)
    tl.store(dstats + offset, _pack(row_mean, delta), mask=rows < queries)
    tl.store(vstats + offset, _pack(row_lse, row_mean), mask=rows < queries)


@triton.jit
def backward_kv_kernel(
    q, k, v, dq, dk, dv, go, gdo, stats, dstats, gk, gv, gdk, gdv, mask, cu_q, cu_k,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, dq_b, dq_h, dq_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    go_b, go_h, go_n, gdo_b, gdo_h, gdo_n, gk_b, gk_h, gk_n, gv_b, gv_h, gv_n, gdk_b, gdk_h, gdk_n, gdv_b, gdv_h, gdv_n,
    mask_b, mask_h, mask_m, mask_n, heads, queries, keys, dim, scale,
    DIM: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys, of values and of their tangents, except those that are None.

    `stats` and `dstats` are those of `delta_dual_kernel`; for values alone, `stats` is its `vstats`, so that every read
    of a row value is 8 bytes wide.
    """
    SCORES: tl.constexpr = gk is not None or gdk is not None
    head, start_n = _program(keys, BLOCK_N)
    head *= GROUP  # the first of the query heads
    first_m, queries = _sequence(cu_q, head, heads, queries)
    first_n, keys = _sequence(cu_k, head, heads, keys)
    cols = start_n + tl.arange(0, BLOCK_N)
    q, q_n = _head(q, head, heads, q_b, q_h, q_n, first_m)
    k, k_n = _head(k, head, heads, k_b, k_h, k_n, first_n, GROUP)
    v, v_n = _head(v, head, heads, v_b, v_h, v_n, first_n, GROUP)
    dq, dq_n = _head(dq, head, heads, dq_b, dq_h, dq_n, first_m)
    dk, dk_n = _head(dk, head, heads, dk_b, dk_h, dk_n, first_n, GROUP)
    dv, dv_n = _head(dv, head, heads, dv_b, dv_h, dv_n, first_n, GROUP)
    go, go_n = _head(go, head, heads, go_b, go_h, go_n, first_m)
    gdo, gdo_n = _head(gdo, head, heads, gdo_b, gdo_h, gdo_n, first_m)
    stats = _row_values(stats, head, heads, first_m, queries, cu_q)
    if dstats is not None:
        dstats = _row_values(dstats, head, heads, first_m, queries, cu_q)
    if mask is not None:
        mask += head // heads * mask_b + head % heads * mask_h

    k_all = _operand(k, cols, keys, k_n, HEAD, TAIL, DIM)
    dk_all = _operand(dk, cols, keys, dk_n, HEAD, TAIL, DIM)
    REST: tl.constexpr = TAIL if TAIL else 16  # columns of a tail, which nothing reads if there is none
    if SCORES:
        v_all = _operand(v, cols, keys, v_n, HEAD, TAIL, DIM)
    if gk is not None:
        dv_all = _operand(dv, cols, keys, dv_n, HEAD, TAIL, DIM)
        gk1, gk2 = tl.zeros((BLOCK_N, HEAD), tl.float32), tl.zeros((BLOCK_N, REST), tl.float32)
    if gdk is not None:
        gdk1, gdk2 = tl.zeros((BLOCK_N, HEAD), tl.float32), tl.zeros((BLOCK_N, REST), tl.float32)
    if gv is not None:
        gv1, gv2 = tl.zeros((BLOCK_N, HEAD), tl.float32), tl.zeros((BLOCK_N, REST), tl.float32)
    if gdv is not None:
        gdv1, gdv2 = tl.zeros((BLOCK_N, HEAD), tl.float32), tl.zeros((BLOCK_N, REST), tl.float32)

    low, high = _steps(start_n, queries, keys, cu_k, BLOCK_M, CAUSAL, GROUP)
    for step in range(low, high, BLOCK_M):
        start, member = _step(step, low, high, GROUP)
        rows = start + tl.arange(0, BLOCK_M)
        q_rows = _operand(_member(q, member, q_h, GROUP), rows, queries, q_n, HEAD, TAIL, DIM, EVEN)
        dq_rows = _operand(_member(dq, member, dq_h, GROUP), rows, queries, dq_n, HEAD, TAIL, DIM, EVEN)
        go_rows = _operand(_member(go, member, go_h, GROUP), rows, queries, go_n, HEAD, TAIL, DIM, EVEN)
        gdo_rows = _operand(_member(gdo, member, gdo_h, GROUP), rows, queries, gdo_n, HEAD, TAIL, DIM, EVEN)
        row_lse, row_sum = _row_stats(stats + member * queries, rows, queries, INF, EVEN)
        if dstats is not None:
            row_mean, row_delta = _row_stats(dstats + member * queries, rows, queries, 0, EVEN)
        else:
            row_mean = row_sum
        zero = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)  # scores are transposed: keys by queries
        s = _scores(zero, k_all, q_rows, dim, DIM, TAIL) * (scale * LOG2_E)
        mask_at = mask if mask is None else mask + member * mask_h
        s = _masked(s, rows, cols, queries, keys, mask_at, mask_m, mask_n, True, CAUSAL, True)
        p = tl.exp2(s - row_lse[None, :])
        if gk is not None or gv is not None:
            ds = _scores(zero, k_all, dq_rows, dim, DIM, TAIL)
            ds = _scores(ds, dk_all, q_rows, dim, DIM, TAIL) * scale - row_mean[None, :]
        if gv is not None:
            pds = (p * ds).to(q.dtype.element_ty)
            gv1, gv2 = _product(gv1, gv2, p.to(q.dtype.element_ty), go_rows, TAIL)
            gv1, gv2 = _product(gv1, gv2, pds, gdo_rows, TAIL)
        if gdv is not None:
            gdv1, gdv2 = _product(gdv1, gdv2, p.to(q.dtype.element_ty), gdo_rows, TAIL)
        if SCORES:
            a = _scores(zero, v_all, gdo_rows, dim, DIM, TAIL) - row_sum[None, :]
            gds = (p * a).to(q.dtype.element_ty)
        if gk is not None:
            gp = _scores(a * ds - row_delta[None, :], v_all, go_rows, dim, DIM, TAIL)
            gp = _scores(gp, dv_all, gdo_rows, dim, DIM, TAIL)
            gs = (p * gp).to(q.dtype.element_ty)
            gk1, gk2 = _product(gk1, gk2, gs, q_rows, TAIL)
            gk1, gk2 = _product(gk1, gk2, gds, dq_rows, TAIL)
        if gdk is not None:
            gdk1, gdk2 = _product(gdk1, gdk2, gds, q_rows, TAIL)

    if gk is not None:
        gk, gk_n = _head(gk, head, heads, gk_b, gk_h, gk_n, first_n, GROUP)
        _store_both(gk, cols, keys, gk_n, gk1 * scale, gk2 * scale, HEAD, TAIL, DIM)
    if gdk is not None:
        gdk, gdk_n = _head(gdk, head, heads, gdk_b, gdk_h, gdk_n, first_n, GROUP)
        _store_both(gdk, cols, keys, gdk_n, gdk1 * scale, gdk2 * scale, HEAD, TAIL, DIM)
    if gv is not None:
        gv, gv_n = _head(gv, head, heads, gv_b, gv_h, gv_n, first_n, GROUP)
        _store_both(gv, cols, keys, gv_n, gv1, gv2, HEAD, TAIL, DIM)
    if gdv is not None:
        gdv, gdv_n = _head(gdv, head, heads, gdv_b, gdv_h, gdv_n, first_n, GROUP)
        _store_both(gdv, cols, keys, gdv_n, gdv1, gdv2, HEAD, TAIL, DIM)


@triton.jit
def backward_q_kernel(
    q, k, v, dq, dk, dv, go, gdo, stats, dstats, gq, gdq, mask, cu_q, cu_k,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, dq_b, dq_h, dq_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    go_b, go_h, go_n, gdo_b, gdo_h, gdo_n, gq_b, gq_h, gq_n, gdq_b, gdq_h, gdq_n,
    mask_b, mask_h, mask_m, mask_n, heads, queries, keys, dim, scale,
    DIM: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of queries and of their tangents, except one that is None, over all keys."""
    head, start_m = _program(queries, BLOCK_M)
    first_m, queries = _sequence(cu_q, head, heads, queries)
    first_n, keys = _sequence(cu_k, head, heads, keys)
    rows = start_m + tl.arange(0, BLOCK_M)
    q, q_n = _head(q, head, heads, q_b, q_h, q_n, first_m)
    k, k_n = _head(k, head, heads, k_b, k_h, k_n, first_n, GROUP)
    v, v_n = _head(v, head, heads, v_b, v_h, v_n, first_n, GROUP)
    dq, dq_n = _head(dq, head, heads, dq_b, dq_h, dq_n, first_m)
    dk, dk_n = _head(dk, head, heads, dk_b, dk_h, dk_n, first_n, GROUP)
    dv, dv_n = _head(dv, head, heads, dv_b, dv_h, dv_n, first_n, GROUP)
    go, go_n = _head(go, head, heads, go_b, go_h, go_n, first_m)
    gdo, gdo_n = _head(gdo, head, heads, gdo_b, gdo_h, gdo_n, first_m)
    if mask is not None:
        mask += head // heads * mask_b + head % heads * mask_h
    row_lse, row_c = _row_stats(_row_values(stats, head, heads, first_m, queries, cu_q), rows, queries, INF, False)
    row_mean, row_delta = _row_stats(_row_values(dstats, head, heads, first_m, queries, cu_q), rows, queries, 0, False)

    q_all = _operand(q, rows, queries, q_n, HEAD, TAIL, DIM)
    dq_all = _operand(dq, rows, queries, dq_n, HEAD, TAIL, DIM)
    go_all = _operand(go, rows, queries, go_n, HEAD, TAIL, DIM)
    gdo_all = _operand(gdo, rows, queries, gdo_n, HEAD, TAIL, DIM)
    REST: tl.constexpr = TAIL if TAIL else 16  # columns of a tail, which nothing reads if there is none
    if gq is not None:
        gq1, gq2 = tl.zeros((BLOCK_M, HEAD), tl.float32), tl.zeros((BLOCK_M, REST), tl.float32)
    if gdq is not None:
        gdq1, gdq2 = tl.zeros((BLOCK_M, HEAD), tl.float32), tl.zeros((BLOCK_M, REST), tl.float32)

    for start in range(0, _last_key(start_m, queries, keys, cu_q, BLOCK_M, CAUSAL), BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        k_cols = _operand(k, cols, keys, k_n, HEAD, TAIL, DIM, EVEN)
        v_cols = _operand(v, cols, keys, v_n, HEAD, TAIL, DIM, EVEN)
        dk_cols = _operand(dk, cols, keys, dk_n, HEAD, TAIL, DIM, EVEN)
        dv_cols = _operand(dv, cols, keys, dv_n, HEAD, TAIL, DIM, EVEN)
        zero = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        s = _scores(zero, q_all, k_cols, dim, DIM, TAIL) * (scale * LOG2_E)
        s = _masked(s, rows, cols, queries, keys, mask, mask_m, mask_n, EVEN, CAUSAL)
        p = tl.exp2(s - row_lse[:, None])
        a = _scores(zero, gdo_all, v_cols, dim, DIM, TAIL) - row_c[:, None]
        gds = (p * a).to(q.dtype.element_ty)
        if gq is not None:
            ds = _scores(zero, dq_all, k_cols, dim, DIM, TAIL)
            ds = _scores(ds, q_all, dk_cols, dim, DIM, TAIL) * scale - row_mean[:, None]
            gp = _scores(a * ds - row_delta[:, None], go_all, v_cols, dim, DIM, TAIL)
            gp = _scores(gp, gdo_all, dv_cols, dim, DIM, TAIL)
            gs = (p * gp).to(q.dtype.element_ty)
            gq1, gq2 = _product(gq1, gq2, gs, k_cols, TAIL)
            gq1, gq2 = _product(gq1, gq2, gds, dk_cols, TAIL)
        if gdq is not None:
            gdq1, gdq2 = _product(gdq1, gdq2, gds, k_cols, TAIL)

    if gq is not None:
        gq, gq_n = _head(gq, head, heads, gq_b, gq_h, gq_n, first_m)
        _store_both(gq, rows, queries, gq_n, gq1 * scale, gq2 * scale, HEAD, TAIL, DIM)
    if gdq is not None:
        gdq, gdq_n = _head(gdq, head, heads, gdq_b, gdq_h, gdq_n, first_m)
        _store_both(gdq, rows, queries, gdq_n, gdq1 * scale, gdq2 * scale, HEAD, TAIL, DIM)


# ----------------------------------------------------------------------------
# Launcher.


def backward_dual(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, do: Tensor,
    mean: Tensor, go: Tensor, gdo: Tensor, scale: float | None = None, is_causal: bool = False,
    mask: Tensor | None = None, sequences: Sequences | None = None, gradients: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of q, k, v and of their tangents, from those of the output and of its tangent.

    Args:
        q, k, v, dq, dk, dv, scale, is_causal, mask, sequences: as in `attention.forward_dual`; every sample has a
            tangent.
        o, lse, do, mean: its results.
        go, gdo: gradients of o and do (B, H, N, d), in the dtype of q.
        gradients: tensors to write to, like q, k, v, dq, dk, dv, with rows of multiples of 16 bytes.
    """
    inputs = q, k, v, dq, dk, dv, o, do, go, gdo
    if gradients is None:
        gradients = tuple(empty_like(x) for x in inputs[:6])
    seen, longest = _seen(mask, sequences)
    configs = [config for kind in CONFIGS.values() for config in kind.values()]
    plan = _plan((*inputs, *gradients, *seen), scale, is_causal, longest, *configs)
    if plan is None or misaligned(*inputs):
        q, k, v, dq, dk, dv, o, do, go, gdo = map(aligned, inputs)
        options = scale, is_causal, mask, sequences, gradients
        return backward_dual(q, k, v, o, lse, dq, dk, dv, do, mean, go, gdo, *options)
    plan(inputs, lse, mean, seen, gradients)
    return tuple(gradients)


@planned
def _plan(
    tensors: tuple[Tensor, ...], scale: float | None, is_causal: bool, longest: tuple[int, int] | None, *_: Config
) -> Callable[..., None] | None:
    inputs, outputs, seen = tensors[:10], tensors[10:16], tensors[16:]
    parts, results = ([_Part(x, 0) for x in xs] for xs in (inputs, outputs))
    problem = _problem(parts[:3], seen, scale, is_causal, longest)
    q, k, v = inputs[:3]
    names = "dq", "dk", "dv", "o", "do", "go", "gdo", "gq", "gk", "gv", "gdq", "gdk", "gdv"
    for name, x, like in zip(names, tensors[3:16], (q, k, v, q, q, q, q, q, k, v, q, k, v), strict=True):
        check_like(name, x, like.shape, q)
    if not q.numel() or not k.numel():
        return _zero_gradients
    if not _readable(parts):
        return None
    if not _readable(results):
        raise ValueError("gradients must have rows of multiples of 16 bytes")
    delta, backward_kv, backward_q = (problem.config(CONFIGS[kind]) for kind in ("delta", "backward_kv", "backward_q"))
    programs, operands = problem.samples * problem.heads, problem.strides(*parts[:6], *parts[8:])
    o, do, go, gdo = parts[6:]
    gq, gk, gv, gdq, gdk, gdv = results
    launch_delta = Launch(
        delta_dual_kernel, delta.grid(problem.queries, programs),
        (*problem.strides(o, do, go, gdo), problem.heads, problem.queries),
        {**shape_constants(q), **delta.kwargs},
    )  # fmt: skip
    pieces_kv, pieces_q = pieces(problem.tiles)
    launches_kv = [
        Launch(
            backward_kv_kernel, backward_kv.grid(problem.keys, programs // problem.constants["GROUP"], "BLOCK_N"),
            (*operands, *problem.strides(gk, gv, gdk, gdv), *problem.scalars),
            {**problem.constants, "EVEN": problem.even(backward_kv, "BLOCK_M"), **backward_kv.kwargs},
        )
        for _ in pieces_kv
    ]  # fmt: skip
    launches_q = [
        Launch(
            backward_q_kernel, backward_q.grid(problem.queries, programs),
            (*operands, *problem.strides(gq, gdq), *problem.scalars),
            {**problem.constants, "EVEN": problem.even(backward_q), **backward_q.kwargs},
        )
        for _ in pieces_q
    ]  # fmt: skip

    def launch(
        inputs: Sequence[Tensor], lse: Tensor, mean: Tensor, seen: Sequence[Any], gradients: Sequence[Tensor]
    ) -> None:
        o, do, go, gdo = inputs[6:]
        gq, gk, gv, gdq, gdk, gdv = gradients
        stats, dstats, vstats = (empty_like(lse, torch.int64) for _ in range(3))
        launch_delta(o, do, go, gdo, lse, mean, stats, dstats, vstats, seen[1])
        read = (*inputs[:6], go, gdo)
        for run, wanted in zip(launches_kv, pieces_kv, strict=True):
            of_keys = wanted[0] or wanted[2]
            rows = (stats, dstats if wanted[0] else None) if of_keys else (vstats, None)
            run(*read, *rows, *_chosen((gk, gv, gdk, gdv), wanted), *seen)
        for run, wanted in zip(launches_q, pieces_q, strict=True):
            run(*read, stats, dstats, *_chosen((gq, gdq), wanted), *seen)

    return launch


def _chosen(tensors: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    return [x if want else None for x, want in zip(tensors, wanted, strict=True)]


def _zero_gradients(inputs: Any, lse: Tensor, mean: Tensor, seen: Any, gradients: Sequence[Tensor]) -> None:
    for gradient in gradients:
        gradient.zero_()


# No stack on sm_90 and sm_100; benchmarks/static.py says where sm_80 keeps 8 or 16 bytes. To be read ahead, an additive
# mask is copied 4 bytes at a time, so kernels with a mask have one stage, except on Blackwell, which copies it well.
# Without `maxnreg` the assembler spills before it takes more registers. Times: not measured yet.
CONFIGS: dict[str, dict[str, Config]] = {
    "delta": dict.fromkeys(("narrow", "medium", "wide", "float32"), Config(BLOCK_M=32, num_warps=4, num_stages=1)),
    "backward_kv": {
        "narrow": Config(BLOCK_M=16, BLOCK_N=64, num_warps=4, num_stages=1),
        "narrow, masked, Blackwell": Config(BLOCK_M=16, BLOCK_N=64, num_warps=4, num_stages=2),
        "medium": Config(BLOCK_M=16, BLOCK_N=64, num_warps=4, num_stages=2),
        "medium, masked, Ampere": Config(BLOCK_M=16, BLOCK_N=64, num_warps=4, num_stages=1),
        "medium, masked, Hopper": Config(BLOCK_M=16, BLOCK_N=64, num_warps=4, num_stages=1),
        "wide": Config(BLOCK_M=16, BLOCK_N=64, num_warps=4, num_stages=2),
        "wide, masked, Ampere": Config(BLOCK_M=16, BLOCK_N=64, num_warps=4, num_stages=1),
        "wide, masked, Hopper": Config(BLOCK_M=16, BLOCK_N=64, num_warps=4, num_stages=1),
        "wide, masked, Blackwell": Config(BLOCK_M=16, BLOCK_N=64, num_warps=4, num_stages=2, maxnreg=255),
        "float32": Config(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1),
    },
    "backward_q": {
        "narrow": Config(BLOCK_M=64, BLOCK_N=16, num_warps=4, num_stages=1),
        "narrow, masked, Ampere": Config(BLOCK_M=64, BLOCK_N=16, num_warps=4, num_stages=2),
        "medium": Config(BLOCK_M=64, BLOCK_N=16, num_warps=4, num_stages=2, maxnreg=255),
        "wide": Config(BLOCK_M=64, BLOCK_N=16, num_warps=4, num_stages=2, maxnreg=255),
        "float32": Config(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1),
    },
}


def pieces(tiles: tuple[str, ...]) -> tuple[list[tuple[bool, ...]], list[tuple[bool, ...]]]:
    """Which of the gradients gk, gv, gdk, gdv, and which of gq, gdq, one launch computes.

    Each is a sum in registers, and four do not fit together in half precision. A block takes 15 products for keys and
    values of up to 96 columns and 17 beyond, and 9 or 11 for queries. Ampere has less room beside a mask.
    """
    special, *_, usual = tiles
    if usual == "float32":
        return [(True,) * 4], [(True, True)]
    three: list[tuple[bool, ...]]
    three = [(True, False, False, False), (False, True, False, False), (False, False, True, True)]
    if usual == "wide":
        return three, [(True, False), (False, True)]
    if special == "medium, masked, Ampere":
        return three, [(True, True)]
    return [(True, False, True, False), (False, True, False, True)], [(True, True)]
