/* A post-norm encoder (BERT) from token ids to hidden states in one call. */
#ifndef SF_ENCODER_H
#define SF_ENCODER_H

#include "attention.h"

/* Rows that pass through the dense layers together, so that what one layer writes the next reads from L2. */
enum { BLOCK_ROWS = 96 };

struct linear {
    const uint32_t *weight; /* packed by sf_pack */
    const float *bias;
    int64_t into, out;
};

struct norm {
    const float *weight, *bias;
};

struct layer {
    struct linear query_key_value, attended, up, down;
    struct norm attended_norm, down_norm;
};

struct encoder {
    int32_t width, heads, layers, inner;
    float epsilon;
    const bf16 *words, *positions; /* (vocabulary, width), (positions, width) */
    struct norm norm;
    const struct layer *layer;
};

enum epilogue { STORE, GELU, ADD };

/* out = epilogue(a . weight + bias): bf16 for STORE and GELU, fp32 plus the bf16 residual for ADD. */
INLINE void dense(const enum epilogue kind, const struct linear *l, const bf16 *a, long rows, void *out,
                  const bf16 *residual) {
    float sums[TILE_ROWS * PANEL];
    const long pairs = l->into / 2;
    for (long n = 0; n < l->out; n += PANEL) {
        const long wide = l->out - n < PANEL ? l->out - n : PANEL;
        for (long m = 0; m < rows;) {
            const long step = tile_rows(rows - m);
            tile(a + m * l->into, l->into, step, l->weight + n * pairs, wide, pairs, sums, PANEL);
            for (long r = 0; r < step; ++r)
                for (long i = 0; i < wide; i += 16) {
                    const long at = (m + r) * l->out + n + i;
                    __m512 x = _mm512_add_ps(_mm512_loadu_ps(sums + r * PANEL + i), _mm512_loadu_ps(l->bias + n + i));
                    if (kind == ADD)
                        _mm512_storeu_ps((float *)out + at, _mm512_add_ps(x, load_bf16(residual + at, 0xffff)));
                    else
                        store_bf16((bf16 *)out + at, 0xffff, kind == GELU ? gelu(x) : x);
                }
            m += step;
        }
    }
}

static void dense_store(const struct linear *l, const bf16 *a, long rows, bf16 *out) {
    dense(STORE, l, a, rows, out, NULL);
}

static void dense_gelu(const struct linear *l, const bf16 *a, long rows, bf16 *out) {
    dense(GELU, l, a, rows, out, NULL);
}

static void dense_add(const struct linear *l, const bf16 *a, long rows, float *out, const bf16 *residual) {
    dense(ADD, l, a, rows, out, residual);
}

static void norm_rows(const struct norm *n, const float *x, long rows, long width, float epsilon, bf16 *out) {
    for (long r = 0; r < rows; ++r)
        layer_norm(x + r * width, width, n->weight, n->bias, epsilon, out + r * width);
}

struct encoder_buffers {
    bf16 *qkv, *attended, *inner;
    float *sums;
    void *attention;
};

/* Bytes of scratch for a pass of `tokens` whose longest text has `longest`. */
static size_t encoder_scratch(const struct encoder *e, long tokens, long longest) {
    const size_t width = (size_t)e->width, rows = (size_t)tokens;
    return rows * width * 4 * 2 + BLOCK_ROWS * ((size_t)e->inner * 2 + width * 4) +
           attention_scratch(e->width / e->heads, longest);
}

static struct encoder_buffers encoder_buffers(const struct encoder *e, long tokens, void *scratch) {
    struct encoder_buffers b;
    b.qkv = scratch;
    b.attended = b.qkv + tokens * e->width * 3;
    b.inner = b.attended + tokens * e->width;
    b.sums = (float *)(b.inner + BLOCK_ROWS * (long)e->inner);
    b.attention = b.sums + BLOCK_ROWS * (long)e->width;
    return b;
}

static void embed(const struct encoder *e, const int32_t *ids, const int32_t *ends, long items, float *row,
                  bf16 *out) {
    for (long item = 0; item < items; ++item)
        for (long t = ends[item]; t < ends[item + 1]; ++t) {
            const bf16 *word = e->words + (long)ids[t] * e->width;
            const bf16 *position = e->positions + (t - ends[item]) * e->width;
            for (long i = 0; i < e->width; i += 16)
                _mm512_storeu_ps(row + i,
                                 _mm512_add_ps(load_bf16(word + i, 0xffff), load_bf16(position + i, 0xffff)));
            norm_rows(&e->norm, row, 1, e->width, e->epsilon, out + t * e->width);
        }
}

static void run_layer(const struct encoder *e, const struct layer *l, const int32_t *ends, long items,
                      const struct encoder_buffers *b, long longest, bf16 *hidden) {
    const long tokens = ends[items], width = e->width, head_dim = width / e->heads;
    const struct attention form = {
        .heads = e->heads,
        .key_heads = e->heads,
        .head_dim = (int32_t)head_dim,
        .query_stride = 3 * width,
        .key_stride = 3 * width,
        .out_stride = width,
        .scale = 1.0f / __builtin_sqrtf((float)head_dim),
    };
    for (long m = 0; m < tokens; m += BLOCK_ROWS)
        dense_store(&l->query_key_value, hidden + m * width, tokens - m < BLOCK_ROWS ? tokens - m : BLOCK_ROWS,
                    b->qkv + m * 3 * width);
    attend(&form, b->qkv, b->qkv + width, b->qkv + 2 * width, b->attended, ends, items, b->attention, longest);
    for (long m = 0; m < tokens; m += BLOCK_ROWS) {
        const long rows = tokens - m < BLOCK_ROWS ? tokens - m : BLOCK_ROWS;
        bf16 *x = hidden + m * width;
        dense_add(&l->attended, b->attended + m * width, rows, b->sums, x);
        norm_rows(&l->attended_norm, b->sums, rows, width, e->epsilon, x);
        dense_gelu(&l->up, x, rows, b->inner);
        dense_add(&l->down, b->inner, rows, b->sums, x);
        norm_rows(&l->down_norm, b->sums, rows, width, e->epsilon, x);
    }
}

#endif
