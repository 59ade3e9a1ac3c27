"""The kernels. Everything is computed in fp32 and rounded once, where it is stored.

Products of matrices take their factors in the dtype of the tensors. ``UPCAST`` widens them first: Triton's
interpreter, which runs all this on a CPU, multiplies bf16 wrongly. What counts rows is never specialised on,
so that a kernel is compiled once for a network and not again for a batch of an odd size.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
_NEVER = tl.constexpr(1 << 30)
"""Behind every row."""


@triton.jit
def _attend(
    query,
    best,
    total,
    gathered,
    key_at,
    value_at,
    key_stride,
    value_stride,
    first_column,
    start,
    stop,
    end,
    rows,
    first,
    last,
    slope,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BULK: tl.constexpr,
    MASKED: tl.constexpr,
    ALIBI: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Let the rows of ``query`` gather from the keys ``[start, stop)``; unless MASKED every row sees each.

    With BULK ``key_at`` and ``value_at`` are tensor descriptors, else pointers to the head's first column.
    """
    columns = tl.arange(0, BLOCK_D)
    for offset in tl.range(start, stop, BLOCK_N):
        keys = offset + tl.arange(0, BLOCK_N)
        at = keys.to(tl.int64)[:, None]
        if BULK:
            key = key_at.load([offset, first_column])
            value = value_at.load([offset, first_column])
        elif MASKED:
            there = (keys < end)[:, None] & (columns < HEAD_DIM)[None, :]
            key = tl.load(key_at + at * key_stride + columns[None, :], mask=there, other=0.0)
            value = tl.load(value_at + at * value_stride + columns[None, :], mask=there, other=0.0)
        elif BLOCK_D != HEAD_DIM:
            there = (columns < HEAD_DIM)[None, :]
            key = tl.load(key_at + at * key_stride + columns[None, :], mask=there, other=0.0)
            value = tl.load(value_at + at * value_stride + columns[None, :], mask=there, other=0.0)
        else:
            key = tl.load(key_at + at * key_stride + columns[None, :])
            value = tl.load(value_at + at * value_stride + columns[None, :])
        if UPCAST:
            key = key.to(tl.float32)
            value = value.to(tl.float32)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        if ALIBI:
            scores = scores * scale - slope * tl.abs(rows[:, None] - keys[None, :]).to(tl.float32)
        if MASKED:
            seen = (keys[None, :] >= first[:, None]) & (keys[None, :] < last[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        # Without a bias the scale joins the subtraction below: one operation for each score less.
        rest = 1.0 if ALIBI else scale
        higher = tl.maximum(best, tl.max(scores, 1) * rest)
        if MASKED:
            # A row that has seen nothing yet must not take infinity from infinity.
            shift = tl.where(higher == float("-inf"), 0.0, higher)
        else:
            shift = higher
        weights = tl.exp2(scores * rest - shift[:, None])
        shrunk = tl.exp2(best - shift)
        total = total * shrunk + tl.sum(weights, 1)
        gathered = gathered * shrunk[:, None]
        gathered = tl.dot(weights.to(value.dtype), value, gathered, input_precision=PRECISION)
        best = higher
    return best, total, gathered


@triton.jit(do_not_specialize=["tokens"])
def attention(
    query_at,
    key_at,
    value_at,
    out_at,
    first_at,
    last_at,
    slopes_at,
    query_stride,
    key_stride,
    value_stride,
    scale,
    tokens,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BULK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    ALIBI: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend in a packed batch: row r sees the rows ``[first[r], last[r])``, fewer where CAUSAL or WINDOW.

    A program has BLOCK_M neighbouring rows of one head, whatever items they belong to: many short ones share
    its tile, and keys that all of its rows see need no mask. ``slopes`` add ``-slope |r - key|`` to the
    scores, in fp32. A row that sees nothing gets zeros. ``scale`` is above zero. With BULK keys and values
    are tensor descriptors over (tokens, heads * HEAD_DIM): rows behind the last are read as zeros.
    """
    head = tl.program_id(0) % HEADS
    block = tl.num_programs(0) // HEADS - 1 - tl.program_id(0) // HEADS
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    inside = rows < tokens
    first = tl.load(first_at + rows, mask=inside, other=_NEVER)
    last = tl.load(last_at + rows, mask=inside, other=0)
    if WINDOW:
        first = tl.where(inside, tl.maximum(first, rows - (WINDOW - 1)), _NEVER)
    if CAUSAL:
        last = tl.minimum(last, rows + 1)
    begin = tl.min(first, 0)
    end = tl.max(last, 0)
    # The keys that each row of this block sees, in whole steps from the first that any of them sees.
    shared = tl.max(tl.where(inside, first, 0), 0)
    shared_end = tl.min(tl.where(inside, last, _NEVER), 0)
    plain = begin + tl.cdiv(tl.maximum(shared - begin, 0), BLOCK_N) * BLOCK_N
    plain = tl.minimum(plain, begin + tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N) * BLOCK_N)
    plain_end = plain + (tl.maximum(shared_end - plain, 0) // BLOCK_N) * BLOCK_N

    at = query_at + head * HEAD_DIM + rows.to(tl.int64)[:, None] * query_stride + columns[None, :]
    within = inside[:, None] & (columns < HEAD_DIM)[None, :]
    query = tl.load(at, mask=within, other=0.0)
    if UPCAST:
        query = query.to(tl.float32)
    first_column = (head // GROUP) * HEAD_DIM
    if not BULK:
        key_at += first_column
        value_at += first_column
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_at + head) * LOG2_E
    scale = scale * LOG2_E
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    gathered = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    best, total, gathered = _attend(
        query, best, total, gathered, key_at, value_at, key_stride, value_stride, first_column,
        plain, plain_end, end, rows, first, last, slope, scale,
        HEAD_DIM, BLOCK_D, BLOCK_N, BULK, False, ALIBI, UPCAST, PRECISION,
    )  # fmt: skip
    best, total, gathered = _attend(
        query, best, total, gathered, key_at, value_at, key_stride, value_stride, first_column,
        begin, plain, end, rows, first, last, slope, scale,
        HEAD_DIM, BLOCK_D, BLOCK_N, BULK, True, ALIBI, UPCAST, PRECISION,
    )  # fmt: skip
    best, total, gathered = _attend(
        query, best, total, gathered, key_at, value_at, key_stride, value_stride, first_column,
        plain_end, end, end, rows, first, last, slope, scale,
        HEAD_DIM, BLOCK_D, BLOCK_N, BULK, True, ALIBI, UPCAST, PRECISION,
    )  # fmt: skip
    gathered = gathered / tl.where(total == 0.0, 1.0, total)[:, None]
    at = out_at + (rows.to(tl.int64)[:, None] * HEADS + head) * HEAD_DIM + columns[None, :]
    tl.store(at, gathered.to(out_at.dtype.element_ty), mask=within)


@triton.jit(do_not_specialize=["rows"])
def norm(
    x_at,
    residual_at,
    weight_at,
    bias_at,
    out_at,
    rows,
    epsilon,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ADDS: tl.constexpr,
    CENTRED: tl.constexpr,
):
    """``out = norm(x + residual)`` over (rows, WIDTH): layer norm if CENTRED, else RMS norm without bias."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    at = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    there = (row < rows)[:, None] & (column < WIDTH)[None, :]
    x = tl.load(x_at + at, mask=there, other=0.0).to(tl.float32)
    if ADDS:
        x += tl.load(residual_at + at, mask=there, other=0.0).to(tl.float32)
    weight = tl.load(weight_at + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    if CENTRED:
        mean = tl.sum(x, 1) / WIDTH
        x = tl.where(there, x - mean[:, None], 0.0)
    spread = tl.sum(x * x, 1) / WIDTH
    y = x * (1.0 / tl.sqrt(spread + epsilon))[:, None] * weight[None, :]
    if CENTRED:
        y += tl.load(bias_at + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    tl.store(out_at + at, y.to(out_at.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["tokens"])
def norm_rope(
    heads_at,
    cosines_at,
    sines_at,
    query_norm_at,
    key_norm_at,
    stride,
    tokens,
    epsilon,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    NORMS: tl.constexpr,
):
    """Norm each query and key head of TOKENS tokens if NORMS, then turn its halves, in place."""
    HALF: tl.constexpr = HEAD_DIM // 2
    pair = tl.arange(0, TOKENS * BLOCK_HEADS)
    token = tl.program_id(0).to(tl.int64) * TOKENS + pair // BLOCK_HEADS
    head = pair % BLOCK_HEADS
    column = tl.arange(0, BLOCK_HALF)
    half = column < HALF
    there = ((head < QUERIES + KEYS) & (token < tokens))[:, None] & half[None, :]
    at = heads_at + (token * stride + head * HEAD_DIM)[:, None] + column[None, :]
    a = tl.load(at, mask=there, other=0.0).to(tl.float32)
    b = tl.load(at + HALF, mask=there, other=0.0).to(tl.float32)
    if NORMS:
        spread = (tl.sum(a * a, 1) + tl.sum(b * b, 1)) / HEAD_DIM
        shrink = 1.0 / tl.sqrt(spread + epsilon)
        query_a = tl.load(query_norm_at + column, mask=half, other=0.0).to(tl.float32)
        query_b = tl.load(query_norm_at + HALF + column, mask=half, other=0.0).to(tl.float32)
        key_a = tl.load(key_norm_at + column, mask=half, other=0.0).to(tl.float32)
        key_b = tl.load(key_norm_at + HALF + column, mask=half, other=0.0).to(tl.float32)
        is_query = (head < QUERIES)[:, None]
        a = a * shrink[:, None] * tl.where(is_query, query_a[None, :], key_a[None, :])
        b = b * shrink[:, None] * tl.where(is_query, query_b[None, :], key_b[None, :])
    angle = token[:, None] * HALF + column[None, :]
    cosine = tl.load(cosines_at + angle, mask=there, other=0.0)
    sine = tl.load(sines_at + angle, mask=there, other=0.0)
    tl.store(at, (a * cosine - b * sine).to(heads_at.dtype.element_ty), mask=there)
    tl.store(at + HALF, (b * cosine + a * sine).to(heads_at.dtype.element_ty), mask=there)


@triton.jit
def _activated(x, GELU: tl.constexpr):
    """The erf form of GELU, or SiLU.

    GELU is what is above zero less ``|x| / 2 erfc(|x| / sqrt 2)``, with erfc by formula 7.1.26 of Abramowitz
    and Stegun, whose error is below 1.5e-7: a third of the operations of the library's erf.
    """
    if GELU:
        size = tl.abs(x)
        t = 1.0 / (1.0 + 0.23164188 * size)
        tail = t * (
            0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
        )
        return tl.maximum(x, 0.0) - 0.5 * size * tail * tl.exp2(x * x * (-0.5 * LOG2_E))
    return x / (1.0 + tl.exp2(x * -LOG2_E))


@triton.jit
def _tile_of_product(
    tile,
    x,
    weight,
    out,
    bias_at,
    rows,
    WIDTH: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
    BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    COLUMN_TILES: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    band = tile // (BAND * COLUMN_TILES)
    inside = tile % (BAND * COLUMN_TILES)
    height = tl.minimum(tl.cdiv(rows, BLOCK_M) - band * BAND, BAND)
    row = (band * BAND + inside % height) * BLOCK_M
    column = (inside // height) * BLOCK_N
    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    factor = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        a = x.load([row, start])
        b = weight.load([column, start])
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        y = tl.dot(a, b.T, y, input_precision=PRECISION)
        if GATED:
            c = weight.load([OUT + column, start])
            if UPCAST:
                c = c.to(tl.float32)
            factor = tl.dot(a, c.T, factor, input_precision=PRECISION)
    if BIAS:
        at = column + tl.arange(0, BLOCK_N)
        y += tl.load(bias_at + at, mask=at < OUT, other=0.0).to(tl.float32)[None, :]
    y = _activated(y, GELU)
    if GATED:
        y *= factor
    out.store([row, column], y.to(out.dtype))


@triton.jit(do_not_specialize=["rows"])
def product(
    x,
    weight,
    out,
    bias_at,
    rows,
    WIDTH: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    STAYS: tl.constexpr,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
    BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out = activation(x weight^T + bias)`` (rows, OUT), of ``x`` (rows, WIDTH).

    If GATED ``weight`` has 2 OUT rows, the second half of which is multiplied onto the activated first. The
    three are tensor descriptors: what is read beside them is zeros, what is written beside them is left out.
    Tiles of BAND times BLOCK_M rows come one after another, so that what they read of ``x`` and ``weight`` is
    still in the cache. A program has one tile or, if it STAYS, every so many-th, the loads of the next beside
    the end of the last.
    """
    if STAYS:
        # Not of one turn for the other case: in a loop what is stored keeps memory of its own, and of two
        # programs that share a multiprocessor one would go.
        tiles = tl.cdiv(rows, BLOCK_M) * ((OUT + BLOCK_N - 1) // BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _tile_of_product(
                tile, x, weight, out, bias_at, rows, WIDTH, OUT, BLOCK_M, BLOCK_N, BLOCK_K, BAND,
                GATED, GELU, BIAS, UPCAST, PRECISION,
            )  # fmt: skip
    else:
        _tile_of_product(
            tl.program_id(0), x, weight, out, bias_at, rows, WIDTH, OUT, BLOCK_M, BLOCK_N, BLOCK_K, BAND,
            GATED, GELU, BIAS, UPCAST, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def gate(
    x_at, out_at, rows, INNER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr
):
    """``out = activation(x[:, :INNER]) * x[:, INNER:]``, (rows, INNER)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = (row < rows)[:, None] & (column < INNER)[None, :]
    at = x_at + row[:, None] * (2 * INNER) + column[None, :]
    opened = _activated(tl.load(at, mask=there, other=0.0).to(tl.float32), GELU)
    y = opened * tl.load(at + INNER, mask=there, other=0.0).to(tl.float32)
    at = out_at + row[:, None] * INNER + column[None, :]
    tl.store(at, y.to(out_at.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["rows"])
def gelu(x_at, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The erf form of GELU of (rows, WIDTH), in place."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = (row < rows)[:, None] & (column < WIDTH)[None, :]
    at = x_at + row[:, None] * WIDTH + column[None, :]
    x = tl.load(at, mask=there, other=0.0).to(tl.float32)
    tl.store(at, _activated(x, True).to(x_at.dtype.element_ty), mask=there)


@triton.jit
def mean(hidden_at, starts_at, out_at, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Average the rows ``[starts[i], starts[i + 1])`` of each item i in fp32; zeros for an empty one."""
    item = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(starts_at + item)
    end = tl.load(starts_at + item + 1)
    summed = tl.zeros([ROWS, BLOCK], tl.float32)
    for offset in range(start, end, ROWS):
        row = offset + tl.arange(0, ROWS)
        there = (row < end)[:, None] & (column < WIDTH)[None, :]
        at = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
        summed += tl.load(hidden_at + at, mask=there, other=0.0).to(tl.float32)
    y = tl.sum(summed, 0) / tl.maximum(end - start, 1).to(tl.float32)
    tl.store(out_at + item * WIDTH + column, y, mask=column < WIDTH)


@triton.jit
def merge(
    base_at,
    down_at,
    up_at,
    out_at,
    outs,
    ins,
    RANK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out = base + up down`` (outs, ins), of ``up`` (outs, RANK) and ``down`` (RANK, ins)."""
    row = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    column = tl.program_id(1) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    at = row.to(tl.int64)[:, None] * ins + column[None, :]
    there = (row < outs)[:, None] & (column < ins)[None, :]
    y = tl.load(base_at + at, mask=there, other=0.0).to(tl.float32)
    for start in tl.static_range(0, RANK, BLOCK_RANK):
        rank = start + tl.arange(0, BLOCK_RANK)
        held = rank < RANK
        up = tl.load(
            up_at + row.to(tl.int64)[:, None] * RANK + rank[None, :],
            mask=(row < outs)[:, None] & held[None, :],
            other=0.0,
        )
        down = tl.load(
            down_at + rank.to(tl.int64)[:, None] * ins + column[None, :],
            mask=held[:, None] & (column < ins)[None, :],
            other=0.0,
        )
        if UPCAST:
            up = up.to(tl.float32)
            down = down.to(tl.float32)
        y = tl.dot(up, down, y, input_precision=PRECISION)
    tl.store(out_at + at, y.to(out_at.dtype.element_ty), mask=there)


@triton.jit
def _tasks_of(tags_at, row, inside):
    """The task of each row, -1 for none, and the first and the last of them."""
    tag = tl.load(tags_at + row, mask=inside, other=-1)
    return tag, tl.min(tl.where(tag < 0, _NEVER, tag), 0), tl.max(tag, 0)


@triton.jit(do_not_specialize=["rows"])
def shrink(
    x_at,
    tags_at,
    down_at,
    z_at,
    rows,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``z = down[tag] x`` for each row of ``x`` (rows, WIDTH), of ``down`` (tasks, RANK, WIDTH).

    ``z`` is (rows, RANK); rows without a task get zeros. Rows of a task are best neighbours: a program goes
    through the tasks between the first and the last of its rows.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rank = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < rows
    tag, task_first, task_last = _tasks_of(tags_at, row, inside)
    z = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for task in range(task_first, task_last + 1):
        down_row = (task * RANK + rank).to(tl.int64)
        made = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for start in range(0, WIDTH, BLOCK_K):
            column = start + tl.arange(0, BLOCK_K)
            x = tl.load(
                x_at + row.to(tl.int64)[:, None] * WIDTH + column[None, :],
                mask=inside[:, None] & (column < WIDTH)[None, :],
                other=0.0,
            )
            down = tl.load(
                down_at + down_row[:, None] * WIDTH + column[None, :],
                mask=(rank < RANK)[:, None] & (column < WIDTH)[None, :],
                other=0.0,
            )
            if UPCAST:
                x = x.to(tl.float32)
                down = down.to(tl.float32)
            made = tl.dot(x, tl.trans(down), made, input_precision=PRECISION)
        z = tl.where((tag == task)[:, None], made, z)
    at = row.to(tl.int64)[:, None] * RANK + rank[None, :]
    tl.store(z_at + at, z.to(z_at.dtype.element_ty), mask=inside[:, None] & (rank < RANK)[None, :])


@triton.jit(do_not_specialize=["rows"])
def expand(
    z_at,
    tags_at,
    up_at,
    y_at,
    rows,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``y += up[tag] z`` for each row of ``y`` (rows, WIDTH) with a task, of ``up`` (tasks, WIDTH, RANK)."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    tag, task_first, task_last = _tasks_of(tags_at, row, row < rows)
    added = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for task in range(task_first, task_last + 1):
        up_row = (task * WIDTH + column).to(tl.int64)
        for start in tl.static_range(0, RANK, BLOCK_R):
            rank = start + tl.arange(0, BLOCK_R)
            z = tl.load(
                z_at + row.to(tl.int64)[:, None] * RANK + rank[None, :],
                mask=(tag == task)[:, None] & (rank < RANK)[None, :],
                other=0.0,
            )
            up = tl.load(
                up_at + up_row[:, None] * RANK + rank[None, :],
                mask=(column < WIDTH)[:, None] & (rank < RANK)[None, :],
                other=0.0,
            )
            if UPCAST:
                z = z.to(tl.float32)
                up = up.to(tl.float32)
            added = tl.dot(z, tl.trans(up), added, input_precision=PRECISION)
    at = y_at + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    there = (tag >= 0)[:, None] & (column < WIDTH)[None, :]
    y = tl.load(at, mask=there, other=0.0).to(tl.float32) + added
    tl.store(at, y.to(y_at.dtype.element_ty), mask=there)
