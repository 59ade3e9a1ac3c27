/* Linear layers over some rows, with what the task adapter of each row adds: x W^T + (x A^T) B^T + b. */
#ifndef SF_LINEAR_H
#define SF_LINEAR_H

#include "tile.h"

/* BLOCK_ROWS pass through the linear layers together: few enough for what one layer writes to be read by the next
 * from the cache, enough for weights that come from memory to be used often. Of DEPTH_BLOCK steps of the inner
 * dimension a panel stays in the first cache while all rows go over it; where the panel is too wide for that, the
 * whole dimension runs at once. */
#ifdef SET_AVX512
enum { BLOCK_ROWS = 96, DEPTH_BLOCK = 1 << 30 };
#else
enum { BLOCK_ROWS = 192, DEPTH_BLOCK = 384 };
#endif

/* What an adapter adds to a product, packed: A (rank, into) and B (out, rank); null where it adds nothing. */
struct lora {
    const void *a, *b;
};

struct linear {
    const void *weight; /* packed by sf_pack, null for no layer */
    const float *bias;  /* or null */
    const struct lora *tasks;
    int64_t into, out;
    int32_t rank, storage; /* even, and that of all its weights */
};

/* Rows [start, end) have the adapter `task`, none if it is negative. The last run of a list starts behind all. */
struct run {
    int32_t start, end, task;
};

/* n numbers of a table from number `at`. */
INLINE vec load_stored(const void *table, enum storage storage, long at, long n) {
#ifdef BF16_PRODUCTS
    (void)storage;
    return load_element((const bf16 *)table + at, n);
#else
    if (storage == FP32) return load_some((const float *)table + at, n);
    float some[LANES] = {0};
    for (long i = 0; i < least(n, LANES); ++i) some[i] = widened(((const bf16 *)table)[at + i]);
    return load(some);
#endif
}

INLINE float stored_at(const void *table, enum storage storage, long at) {
    return storage == BF16 ? widened(((const bf16 *)table)[at]) : ((const float *)table)[at];
}

/* Neighbouring rows, and the run of the first of them. */
struct rows {
    long first, count;
    const struct run *run;
};

INLINE struct rows rows_of(long first, long count, const struct run *run) {
    while (run->end <= first) ++run;
    return (struct rows){first, count, run};
}

/* The part of `run` in rows [from, to), counted as they are; 0 if the adapter of the run leaves the layer alone. */
INLINE int adapted(const struct linear *l, const struct run *run, long *from, long *to) {
    if (run->task < 0 || !l->tasks || !l->tasks[run->task].b) return 0;
    if (run->start > *from) *from = run->start;
    *to = least(run->end, *to);
    return *from < *to;
}

/* low (rows, rank) = x times the A of each row's task. */
static void lora_a(const struct linear *l, const struct rows *rows, const element *x, element *low) {
    const long end = rows->first + rows->count;
    float sums[TILE_ROWS * PANEL];
    for (const struct run *run = rows->run; run->start < end; ++run) {
        long from = rows->first, to = end;
        if (!adapted(l, run, &from, &to)) continue;
        for (long n = 0; n < l->rank; n += PANEL)
            for (long m = from - rows->first; m < to - rows->first;) {
                const long count = tile_rows(to - rows->first - m), wide = least(l->rank - n, PANEL);
                tile(x + m * l->into, l->into, count, panel_at(l->tasks[run->task].a, n, l->into, l->storage),
                     l->storage, wide, l->into, 0, sums, PANEL);
                for (long r = 0; r < count; ++r)
                    for (long i = 0; i < wide; i += LANES)
                        store_element(low + (m + r) * l->rank + n + i, wide - i, load(sums + r * PANEL + i));
                m += count;
            }
    }
}

/* sums (count, PANEL) += low times the B of each row's task, rows from m, columns [n, n + wide). */
static void lora_b(const struct linear *l, const struct rows *rows, const element *low, long m, long count, long n,
                   long wide, float *sums) {
    const long first = rows->first + m, end = first + count;
    float more[TILE_ROWS * PANEL];
    for (const struct run *run = rows->run; run->start < end; ++run) {
        long from = first, to = end;
        if (!adapted(l, run, &from, &to)) continue;
        while (from < to) {
            const long part = tile_rows(to - from);
            tile(low + (from - rows->first) * l->rank, l->rank, part,
                 panel_at(l->tasks[run->task].b, n, l->rank, l->storage), l->storage, wide, l->rank, 0, more, PANEL);
            float *at = sums + (from - first) * PANEL;
            for (long r = 0; r < part; ++r)
                for (long i = r * PANEL; i < r * PANEL + wide; i += LANES)
                    store(at + i, load(at + i) + load(more + i));
            from += part;
        }
    }
}

/* Rows of `left` that `product` is to be given together. */
INLINE long product_rows(const struct linear *l, long left) { return l->into > DEPTH_BLOCK ? left : tile_rows(left); }

/* sums (count, PANEL) = rows [m, m + count) and columns [n, n + wide) of the product, but for the bias. */
static void product(const struct linear *l, const struct rows *rows, const element *x, const element *low, long m,
                    long count, long n, long wide, float *sums) {
    const char *panel = panel_at(l->weight, n, l->into, l->storage);
    const size_t step = packed_bytes(PANEL, 2, l->storage) / 2;
    for (long k = 0; k < l->into; k += DEPTH_BLOCK)
        for (long r = 0; r < count;) {
            const long part = tile_rows(count - r);
            tile(x + (m + r) * l->into + k, l->into, part, panel + (size_t)k * step, l->storage, wide,
                 least(l->into - k, DEPTH_BLOCK), k > 0, sums + r * PANEL, PANEL);
            r += part;
        }
    if (l->tasks) lora_b(l, rows, low, m, count, n, wide, sums);
}

INLINE vec biased(const struct linear *l, const float *sum, long n, long left) {
    vec y = load(sum);
    if (l->bias) y = y + load_some(l->bias + n, left);
    return y;
}

/* What becomes of a product: an element, an element under GELU, added to the element there, or added to the element
 * of `residual` as fp32. */
enum epilogue { STORE, GELU, ADD, ADD_FP32 };

/* Rows of `out` and `residual` are `stride` apart. */
INLINE void project_as(const enum epilogue kind, const struct linear *l, const struct rows *rows, const element *x,
                       element *low, void *out, long stride, const element *residual) {
    float sums[BLOCK_ROWS * PANEL];
    if (l->tasks) lora_a(l, rows, x, low);
    for (long n = 0; n < l->out; n += PANEL) {
        const long wide = least(l->out - n, PANEL);
        for (long m = 0; m < rows->count;) {
            const long count = product_rows(l, rows->count - m);
            product(l, rows, x, low, m, count, n, wide, sums);
            for (long r = 0; r < count; ++r)
                for (long i = 0; i < wide; i += LANES) {
                    const long at = (m + r) * stride + n + i, left = wide - i;
                    element *to = (element *)out + at;
                    vec y = biased(l, sums + r * PANEL + i, n + i, left);
                    if (kind == GELU) y = gelu(y);
                    if (kind == ADD) y = y + load_element(to, left);
                    if (kind == ADD_FP32)
                        store_some((float *)out + at, left, y + load_element(residual + at, left));
                    else
                        store_element(to, left, y);
                }
            m += count;
        }
    }
}

static void project(const struct linear *l, const struct rows *rows, const element *x, element *low, element *out,
                    long stride) {
    project_as(STORE, l, rows, x, low, out, stride, NULL);
}

static void project_gelu(const struct linear *l, const struct rows *rows, const element *x, element *low,
                         element *out, long stride) {
    project_as(GELU, l, rows, x, low, out, stride, NULL);
}

static void project_add(const struct linear *l, const struct rows *rows, const element *x, element *low,
                        element *out, long stride) {
    project_as(ADD, l, rows, x, low, out, stride, NULL);
}

static void project_add_fp32(const struct linear *l, const struct rows *rows, const element *x, element *low,
                             float *out, long stride, const element *residual) {
    project_as(ADD_FP32, l, rows, x, low, out, stride, residual);
}

/* out = activation(gate x) * (up x); the activation is SiLU, or GELU. Rows of `out` are `stride` apart. */
static void project_gated(const struct linear *gate, const struct linear *up, int under_gelu, const struct rows *rows,
                          const element *x, element *low_gate, element *low_up, element *out, long stride) {
    float gates[BLOCK_ROWS * PANEL], ups[BLOCK_ROWS * PANEL];
    if (gate->tasks) lora_a(gate, rows, x, low_gate);
    if (up->tasks) lora_a(up, rows, x, low_up);
    for (long n = 0; n < up->out; n += PANEL) {
        const long wide = least(up->out - n, PANEL);
        for (long m = 0; m < rows->count;) {
            const long count = product_rows(up, rows->count - m);
            product(gate, rows, x, low_gate, m, count, n, wide, gates);
            product(up, rows, x, low_up, m, count, n, wide, ups);
            for (long r = 0; r < count; ++r)
                for (long i = 0; i < wide; i += LANES) {
                    const vec g = biased(gate, gates + r * PANEL + i, n + i, wide - i);
                    const vec u = biased(up, ups + r * PANEL + i, n + i, wide - i);
                    store_element(out + (m + r) * stride + n + i, wide - i, (under_gelu ? gelu(g) : silu(g)) * u);
                }
            m += count;
        }
    }
}

#endif
