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

/* One pass of an encoder: phase 0 embeds and projects, then two phases a layer, attention and the rest. */
struct pass {
    const struct encoder *encoder;
    struct attention form;
    struct attention_call attention;
    const int32_t *ids;
    long tokens, rows; /* rows of a task */
    bf16 *hidden, *qkv, *attended;
    int32_t *positions;
    char *own; /* scratch of member 0, the others behind it */
    size_t own_size;
};

static size_t own_scratch(const struct encoder *e) {
    const size_t block = (size_t)BLOCK_ROWS * ((size_t)e->inner * 2 + (size_t)e->width * 4);
    return block + attention_scratch(e->width / e->heads, 1);
}

/* Bytes of scratch for a pass of `tokens`. */
static size_t encoder_scratch(const struct encoder *e, long tokens, int members) {
    const size_t shared = (size_t)tokens * ((size_t)e->width * 8 + 4);
    return (size_t)round_up((long)shared, 64) + (size_t)members * own_scratch(e);
}

static void embed(const struct pass *p, long first, long rows, float *sums) {
    const struct encoder *e = p->encoder;
    for (long t = first; t < first + rows; ++t) {
        const bf16 *word = e->words + (long)p->ids[t] * e->width;
        const bf16 *position = e->positions + (long)p->positions[t] * e->width;
        for (long i = 0; i < e->width; i += 16)
            _mm512_storeu_ps(sums + i, _mm512_add_ps(load_bf16(word + i, 0xffff), load_bf16(position + i, 0xffff)));
        norm_rows(&e->norm, sums, 1, e->width, e->epsilon, p->hidden + t * e->width);
    }
}

/* What follows attention in one layer, for some rows. */
static void close_layer(const struct pass *p, const struct layer *l, long first, long rows, bf16 *inner,
                        float *sums) {
    const struct encoder *e = p->encoder;
    bf16 *x = p->hidden + first * e->width;
    dense_add(&l->attended, p->attended + first * e->width, rows, sums, x);
    norm_rows(&l->attended_norm, sums, rows, e->width, e->epsilon, x);
    dense_gelu(&l->up, x, rows, inner);
    dense_add(&l->down, inner, rows, sums, x);
    norm_rows(&l->down_norm, sums, rows, e->width, e->epsilon, x);
}

static long pass_tasks(const void *context, int phase) {
    const struct pass *p = context;
    return phase % 2 ? attention_tasks(&p->attention, 0) : (p->tokens + p->rows - 1) / p->rows;
}

static void pass_task(const void *context, int phase, long task, int member) {
    const struct pass *p = context;
    const struct encoder *e = p->encoder;
    if (phase % 2) {
        attention_task(&p->attention, 0, task, member);
        return;
    }
    const long first = task * p->rows, left = p->tokens - first, rows = left < p->rows ? left : p->rows;
    float *sums = (float *)(p->own + (size_t)member * p->own_size);
    bf16 *inner = (bf16 *)(sums + BLOCK_ROWS * (long)e->width);
    const int layer = phase / 2; /* the layer whose projections come next */
    if (layer == 0)
        embed(p, first, rows, sums);
    else
        close_layer(p, e->layer + layer - 1, first, rows, inner, sums);
    if (layer < e->layers)
        dense_store(&e->layer[layer].query_key_value, p->hidden + first * e->width, rows,
                    p->qkv + first * 3 * e->width);
}

static void encode(const struct encoder *e, const int32_t *ids, const int32_t *ends, long items, long longest,
                   bf16 *hidden, char *scratch, int members) {
    const long tokens = ends[items], width = e->width, head_dim = width / e->heads;
    members = members_for(tokens, members);
    struct pass p = {.encoder = e, .ids = ids, .tokens = tokens, .hidden = hidden};
    p.rows = fair_rows(tokens, members, BLOCK_ROWS);
    p.qkv = (bf16 *)scratch;
    p.attended = p.qkv + tokens * width * 3;
    p.positions = (int32_t *)(p.attended + tokens * width);
    p.own_size = own_scratch(e);
    p.own = scratch + round_up(tokens * (width * 8 + 4), 64);
    for (long item = 0; item < items; ++item)
        for (int32_t t = ends[item]; t < ends[item + 1]; ++t) p.positions[t] = t - ends[item];
    p.form = (struct attention){
        .heads = e->heads,
        .key_heads = e->heads,
        .head_dim = (int32_t)head_dim,
        .query_stride = 3 * width,
        .key_stride = 3 * width,
        .out_stride = width,
        .scale = 1.0f / __builtin_sqrtf((float)head_dim),
    };
    p.attention = (struct attention_call){
        .form = &p.form,
        .query = p.qkv,
        .key = p.qkv + width,
        .value = p.qkv + 2 * width,
        .out = p.attended,
        .ends = ends,
        .items = items,
        .longest = longest,
        .scratch = p.own + BLOCK_ROWS * ((size_t)e->inner * 2 + (size_t)width * 4),
        .scratch_step = p.own_size,
    };
    struct job job = {.phases = 2 * e->layers + 1, .tasks = pass_tasks, .run = pass_task, .context = &p};
    work(&job, members);
}

#endif
