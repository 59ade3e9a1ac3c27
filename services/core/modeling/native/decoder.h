/* A pre-norm decoder (Qwen2, Qwen3, EuroBERT) with task adapters, from token ids to hidden states in one call. */
#ifndef SF_DECODER_H
#define SF_DECODER_H

#include "attention.h"

/* Rows that pass through the products together: enough for weights that come from memory to be used often. */
enum { READ_ROWS = 96 };

/* What an adapter adds to a product, packed: (rank, into) and (out, rank); null where it adds nothing. */
struct low_rank {
    const uint32_t *down, *up;
};

struct projection {
    const uint32_t *weight; /* packed by sf_pack */
    const float *bias;      /* or null */
    const struct low_rank *tasks;
    int64_t into, out;
};

struct decoder_layer {
    struct projection query, key, value, attended, gate, up, down;
    const float *attention_norm, *inner_norm, *query_norm, *key_norm; /* those of heads may be null */
    int64_t window;
};

struct decoder {
    int32_t width, heads, key_heads, head_dim, inner, layers, rank, causal;
    float epsilon;
    const bf16 *words; /* (vocabulary, width) */
    const float *norm;
    const struct decoder_layer *layer;
};

/* Rows [start, end) have the adapter `task`, none if it is negative. The last run of a list starts behind all. */
struct run {
    int32_t start, end, task;
};

/* What a pass is given. `wanted` are the rows whose last states are asked for, `wanted_runs` count by them. */
struct text_pass {
    const struct decoder *decoder;
    const int32_t *ids, *positions, *ends, *wanted; /* `wanted` is null for all rows */
    const float *cosines, *sines;                   /* (longest, head_dim / 2) */
    const struct run *runs, *wanted_runs;
    int64_t items, longest, tokens, wanted_count;
    bf16 *hidden, *joined, *attended; /* (tokens, width), all heads of a token, query heads of a token */
};

struct reading {
    const struct text_pass *in;
    struct attention_call attention;
    long rows; /* of a task */
    char *own; /* scratch of member 0, the others behind it */
    size_t own_size;
};

/* Neighbouring rows, and the run of the first of them. */
struct rows {
    long first, count;
    const struct run *run;
};

struct row_buffers {
    bf16 *normed, *states, *inner, *low, *low_up;
};

static size_t lay_rows_out(const struct decoder *d, struct row_buffers *b, void *scratch) {
    const long queries = (long)d->heads * d->head_dim, inner = d->inner > queries ? d->inner : queries;
    b->normed = scratch;
    b->states = b->normed + READ_ROWS * (long)d->width;
    b->inner = b->states + READ_ROWS * (long)d->width;
    b->low = b->inner + READ_ROWS * inner;
    b->low_up = b->low + READ_ROWS * (long)d->rank;
    return (size_t)round_up((char *)(b->low_up + READ_ROWS * (long)d->rank) - (char *)scratch, 64);
}

/* Bytes of scratch of one thread. */
static size_t decoder_scratch(const struct decoder *d) {
    struct row_buffers b;
    return lay_rows_out(d, &b, NULL) + attention_scratch(d->head_dim, d->heads / d->key_heads);
}

INLINE long least(long a, long b) { return a < b ? a : b; }

/* The part of `run` in rows [from, to), counted as they are; 0 if the adapter of the run leaves `p` alone. */
INLINE int narrowed(const struct projection *p, const struct run *run, long *from, long *to) {
    if (run->task < 0 || !p->tasks[run->task].up) return 0;
    if (run->start > *from) *from = run->start;
    *to = least(run->end, *to);
    return *from < *to;
}

/* low = x times the narrow weight of each row's task. */
static void narrow(const struct decoder *d, const struct projection *p, const struct rows *rows, const bf16 *x,
                   bf16 *low) {
    const long end = rows->first + rows->count, pairs = p->into / 2;
    float sums[TILE_ROWS * PANEL];
    for (const struct run *run = rows->run; run->start < end; ++run) {
        long from = rows->first, to = end;
        if (!narrowed(p, run, &from, &to)) continue;
        for (long n = 0; n < d->rank; n += PANEL)
            for (long m = from - rows->first; m < to - rows->first;) {
                const long step = tile_rows(to - rows->first - m), wide = least(d->rank - n, PANEL);
                tile(x + m * p->into, p->into, step, p->tasks[run->task].down + n * pairs, wide, pairs, sums, PANEL);
                for (long r = 0; r < step; ++r)
                    for (long i = 0; i < wide; i += 16)
                        store_bf16(low + (m + r) * d->rank + n + i, lanes(wide - i),
                                   _mm512_loadu_ps(sums + r * PANEL + i));
                m += step;
            }
    }
}

/* Rows [m, m + step) and columns [n, n + wide) of x times the weight, with what tasks and bias add. */
static void product(const struct decoder *d, const struct projection *p, const struct rows *rows, const bf16 *x,
                    const bf16 *low, long m, long step, long n, long wide, float *sums) {
    const long end = rows->first + m + step;
    tile(x + m * p->into, p->into, step, p->weight + n * (p->into / 2), wide, p->into / 2, sums, PANEL);
    for (const struct run *run = rows->run; run->start < end; ++run) {
        long from = rows->first + m, to = end;
        float more[TILE_ROWS * PANEL];
        if (!narrowed(p, run, &from, &to)) continue;
        tile(low + (from - rows->first) * d->rank, d->rank, to - from,
             p->tasks[run->task].up + n * (d->rank / 2), wide, d->rank / 2, more, PANEL);
        float *at = sums + (from - rows->first - m) * PANEL;
        for (long r = 0; r < to - from; ++r)
            for (long i = r * PANEL; i < r * PANEL + wide; i += 16)
                _mm512_storeu_ps(at + i, _mm512_add_ps(_mm512_loadu_ps(at + i), _mm512_loadu_ps(more + i)));
    }
    if (!p->bias) return;
    for (long i = 0; i < wide; i += 16) {
        const __m512 bias = _mm512_maskz_loadu_ps(lanes(wide - i), p->bias + n + i);
        for (long r = 0; r < step; ++r)
            _mm512_storeu_ps(sums + r * PANEL + i, _mm512_add_ps(_mm512_loadu_ps(sums + r * PANEL + i), bias));
    }
}

/* out = x times the weight, or out += it; rows of `out` are `stride` apart. */
static void project(const struct decoder *d, const struct projection *p, const struct rows *rows, const bf16 *x,
                    bf16 *low, bf16 *out, long stride, int add) {
    float sums[TILE_ROWS * PANEL];
    narrow(d, p, rows, x, low);
    for (long n = 0; n < p->out; n += PANEL) {
        const long wide = least(p->out - n, PANEL);
        for (long m = 0; m < rows->count;) {
            const long step = tile_rows(rows->count - m);
            product(d, p, rows, x, low, m, step, n, wide, sums);
            for (long r = 0; r < step; ++r)
                for (long i = 0; i < wide; i += 16) {
                    const __mmask16 mask = lanes(wide - i);
                    bf16 *at = out + (m + r) * stride + n + i;
                    const __m512 sum = _mm512_loadu_ps(sums + r * PANEL + i);
                    store_bf16(at, mask, add ? _mm512_add_ps(sum, load_bf16(at, mask)) : sum);
                }
            m += step;
        }
    }
}

/* inner = silu(gate x) * (up x). */
static void project_gated(const struct decoder *d, const struct decoder_layer *l, const struct rows *rows,
                          const struct row_buffers *b) {
    float gates[TILE_ROWS * PANEL], ups[TILE_ROWS * PANEL];
    narrow(d, &l->gate, rows, b->normed, b->low);
    narrow(d, &l->up, rows, b->normed, b->low_up);
    for (long n = 0; n < d->inner; n += PANEL) {
        const long wide = least(d->inner - n, PANEL);
        for (long m = 0; m < rows->count;) {
            const long step = tile_rows(rows->count - m);
            product(d, &l->gate, rows, b->normed, b->low, m, step, n, wide, gates);
            product(d, &l->up, rows, b->normed, b->low_up, m, step, n, wide, ups);
            for (long r = 0; r < step; ++r)
                for (long i = 0; i < wide; i += 16)
                    store_bf16(b->inner + (m + r) * d->inner + n + i, lanes(wide - i),
                               _mm512_mul_ps(silu(_mm512_loadu_ps(gates + r * PANEL + i)),
                                             _mm512_loadu_ps(ups + r * PANEL + i)));
            m += step;
        }
    }
}

static void rms_rows(const float *weight, const bf16 *x, long rows, long width, float epsilon, bf16 *out) {
    for (long r = 0; r < rows; ++r) {
        const __m512 scale = _mm512_set1_ps(rms_scale(x + r * width, width, epsilon));
        for (long i = 0; i < width; i += 16) {
            const __mmask16 mask = lanes(width - i);
            const __m512 gain = _mm512_mul_ps(scale, _mm512_maskz_loadu_ps(mask, weight + i));
            store_bf16(out + r * width + i, mask, _mm512_mul_ps(load_bf16(x + r * width + i, mask), gain));
        }
    }
}

/* Norm each head of a token, if there is a weight, and turn its halves against each other. */
static void place_heads(const struct decoder *d, const float *weight, bf16 *x, long heads, const float *cosines,
                        const float *sines) {
    const long half = d->head_dim / 2;
    for (; heads > 0; --heads, x += d->head_dim) {
        const __m512 scale = _mm512_set1_ps(weight ? rms_scale(x, d->head_dim, d->epsilon) : 1.0f);
        for (long i = 0; i < half; i += 16) {
            const __mmask16 mask = lanes(half - i);
            const __m512 cosine = _mm512_maskz_loadu_ps(mask, cosines + i);
            const __m512 sine = _mm512_maskz_loadu_ps(mask, sines + i);
            __m512 a = load_bf16(x + i, mask), b = load_bf16(x + half + i, mask);
            if (weight) {
                a = _mm512_mul_ps(a, _mm512_mul_ps(scale, _mm512_maskz_loadu_ps(mask, weight + i)));
                b = _mm512_mul_ps(b, _mm512_mul_ps(scale, _mm512_maskz_loadu_ps(mask, weight + half + i)));
            }
            store_bf16(x + i, mask, _mm512_fnmadd_ps(b, sine, _mm512_mul_ps(a, cosine)));
            store_bf16(x + half + i, mask, _mm512_fmadd_ps(a, sine, _mm512_mul_ps(b, cosine)));
        }
    }
}

/* What comes before attention in one layer: query, key and value of some rows, with their positions. */
static void open_layer(const struct reading *p, const struct decoder_layer *l, const struct rows *rows,
                       const struct row_buffers *b) {
    const struct decoder *d = p->in->decoder;
    const long stride = p->attention.form->query_stride, half = d->head_dim / 2;
    bf16 *joined = p->in->joined + rows->first * stride;
    bf16 *key = joined + (long)d->heads * d->head_dim, *value = key + (long)d->key_heads * d->head_dim;
    rms_rows(l->attention_norm, p->in->hidden + rows->first * d->width, rows->count, d->width, d->epsilon, b->normed);
    project(d, &l->query, rows, b->normed, b->low, joined, stride, 0);
    project(d, &l->key, rows, b->normed, b->low, key, stride, 0);
    project(d, &l->value, rows, b->normed, b->low, value, stride, 0);
    for (long r = 0; r < rows->count; ++r) {
        const long angle = p->in->positions[rows->first + r] * half;
        place_heads(d, l->query_norm, joined + r * stride, d->heads, p->in->cosines + angle, p->in->sines + angle);
        place_heads(d, l->key_norm, key + r * stride, d->key_heads, p->in->cosines + angle, p->in->sines + angle);
    }
}

/* What comes behind it; `x` are the rows' states, changed in place. */
static void close_layer_of_decoder(const struct decoder *d, const struct decoder_layer *l, const struct rows *rows,
                                   const bf16 *attended, bf16 *x, const struct row_buffers *b) {
    project(d, &l->attended, rows, attended, b->low, x, d->width, 1);
    rms_rows(l->inner_norm, x, rows->count, d->width, d->epsilon, b->normed);
    project_gated(d, l, rows, b);
    project(d, &l->down, rows, b->inner, b->low, x, d->width, 1);
}

/* The last layer and the last norm, in place; states of rows that nobody wants stay those of the layer before. */
static void finish_rows(const struct reading *p, const struct rows *rows, const struct row_buffers *b) {
    const struct decoder *d = p->in->decoder;
    const long queries = (long)d->heads * d->head_dim;
    const int32_t *wanted = p->in->wanted ? p->in->wanted + rows->first : NULL;
    const size_t row = sizeof(bf16) * (size_t)d->width;
    bf16 *x = wanted ? b->states : p->in->hidden + rows->first * d->width;
    for (long r = 0; wanted && r < rows->count; ++r) {
        memcpy(x + r * d->width, p->in->hidden + (long)wanted[r] * d->width, row);
        memcpy(b->inner + r * queries, p->in->attended + wanted[r] * queries, sizeof(bf16) * (size_t)queries);
    }
    close_layer_of_decoder(d, d->layer + d->layers - 1, rows,
                           wanted ? b->inner : p->in->attended + rows->first * queries, x, b);
    rms_rows(d->norm, x, rows->count, d->width, d->epsilon, x);
    for (long r = 0; wanted && r < rows->count; ++r)
        memcpy(p->in->hidden + (long)wanted[r] * d->width, x + r * d->width, row);
}

static long reading_tasks(const void *context, int phase) {
    const struct reading *p = context;
    if (phase % 2) return attention_tasks(&p->attention, 0);
    const long rows = phase == 2 * p->in->decoder->layers ? p->in->wanted_count : p->in->tokens;
    return (rows + p->rows - 1) / p->rows;
}

static void attend_layer(const struct reading *p, const struct decoder_layer *l, long task, int member) {
    struct attention form = *p->attention.form;
    struct attention_call call = p->attention;
    form.window = l->window;
    call.form = &form;
    attention_task(&call, 0, task, member);
}

/* Phase 0 embeds and opens the first layer, then two phases a layer: attention, and the rest with the opening of
 * the next. */
static void reading_task(const void *context, int phase, long task, int member) {
    const struct reading *p = context;
    const struct decoder *d = p->in->decoder;
    const int layer = phase / 2, last = layer == d->layers;
    if (phase % 2) {
        attend_layer(p, d->layer + layer, task, member);
        return;
    }
    struct row_buffers b;
    lay_rows_out(d, &b, p->own + (size_t)member * p->own_size);
    struct rows rows = {.first = task * p->rows, .run = last ? p->in->wanted_runs : p->in->runs};
    rows.count = least((last ? p->in->wanted_count : p->in->tokens) - rows.first, p->rows);
    while (rows.run->end <= rows.first) ++rows.run;
    if (last) {
        finish_rows(p, &rows, &b);
        return;
    }
    bf16 *x = p->in->hidden + rows.first * d->width;
    if (layer == 0)
        for (long r = 0; r < rows.count; ++r)
            memcpy(x + r * d->width, d->words + (long)p->in->ids[rows.first + r] * d->width,
                   sizeof(bf16) * (size_t)d->width);
    else
        close_layer_of_decoder(d, d->layer + layer - 1, &rows,
                               p->in->attended + rows.first * d->heads * d->head_dim, x, &b);
    open_layer(p, d->layer + layer, &rows, &b);
}

/* Do a pass with up to `members` threads. */
static void read_pass(const struct text_pass *in, char *scratch, int members) {
    const struct decoder *d = in->decoder;
    const long queries = (long)d->heads * d->head_dim, keys = (long)d->key_heads * d->head_dim;
    struct row_buffers b;
    const struct attention form = {
        .heads = d->heads,
        .key_heads = d->key_heads,
        .head_dim = d->head_dim,
        .causal = d->causal,
        .query_stride = queries + 2 * keys,
        .key_stride = queries + 2 * keys,
        .out_stride = queries,
        .scale = 1.0f / __builtin_sqrtf((float)d->head_dim),
    };
    members = members_for(in->tokens, members);
    struct reading p = {.in = in, .own = scratch, .own_size = decoder_scratch(d)};
    p.rows = fair_rows(in->tokens, members, READ_ROWS);
    p.attention = (struct attention_call){
        .form = &form,
        .query = in->joined,
        .key = in->joined + queries,
        .value = in->joined + queries + keys,
        .out = in->attended,
        .ends = in->ends,
        .items = in->items,
        .longest = in->longest,
        .scratch = scratch + lay_rows_out(d, &b, NULL),
        .scratch_step = p.own_size,
    };
    struct job job = {.phases = 2 * d->layers + 1, .tasks = reading_tasks, .run = reading_task, .context = &p};
    work(&job, members);
}

#endif
