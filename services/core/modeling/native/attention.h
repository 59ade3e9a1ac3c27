/* Attention inside each text of a packed batch, without padding, a bias table or a table of scores.
 *
 * A task is some queries of the heads that share one head of keys. It goes through the keys it sees in blocks
 * that fit the cache, and keeps for each query the peak and the sum of its weights so far. Memory does not grow
 * with the length. Source of the running softmax: Milakov and Gimelshein, arXiv 1805.02867.
 */
#ifndef SF_ATTENTION_H
#define SF_ATTENTION_H

#include "product.h"
#include "team.h"

/* Queries of a tile of scores; keys of a block; queries of a task, all heads together. */
enum { QUERY_ROWS = 12, KEY_BLOCK = 512, TASK_ROWS = 384 };

static const float UNSEEN = -3.0e38f, LOG2_E = 1.44269504f;

struct attention {
    int32_t heads, key_heads, head_dim, causal;
    int64_t query_stride, key_stride, out_stride; /* elements from token to token */
    int64_t window;                               /* keys a query sees, itself included; 0 is all */
    float scale;
    const float *slopes; /* ALiBi, one per head, or null */
};

INLINE long round_up(long n, long to) { return (n + to - 1) / to * to; }

/* Queries of a task in each of its heads. */
static long task_queries(int shared) {
    const long each = TASK_ROWS / shared / QUERY_ROWS * QUERY_ROWS;
    return each ? each : QUERY_ROWS;
}

struct attention_buffers {
    uint32_t *keys, *values;
    float *scores, *part;      /* of one tile: (QUERY_ROWS, KEY_BLOCK), (QUERY_ROWS, PANEL) */
    float *sums, *peak, *mass; /* of all queries of the task: (queries, head_dim rounded up), (queries,) */
    bf16 *weights;
};

/* Lay the buffers out from `scratch`; returns their bytes. */
static size_t lay_out(struct attention_buffers *b, void *scratch, int head_dim, int shared) {
    const long rows = task_queries(shared) * shared;
    b->keys = scratch;
    b->values = b->keys + packed_words(KEY_BLOCK, head_dim / 2);
    b->scores = (float *)(b->values + packed_words(head_dim, KEY_BLOCK / 2));
    b->part = b->scores + QUERY_ROWS * KEY_BLOCK;
    b->sums = b->part + QUERY_ROWS * PANEL;
    b->peak = b->sums + rows * round_up(head_dim, PANEL);
    b->mass = b->peak + rows;
    b->weights = (bf16 *)(b->mass + rows);
    return (size_t)round_up((char *)(b->weights + QUERY_ROWS * KEY_BLOCK) - (char *)scratch, 64);
}

/* Bytes of scratch of one thread. */
static size_t attention_scratch(int head_dim, int shared) {
    struct attention_buffers b;
    return lay_out(&b, NULL, head_dim, shared);
}

/* 16 rows of 16 words each become 16 columns: out[i * PANEL + j] = rows[j][i]. */
INLINE void transpose_words(__m512i *r) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

/* Keys (length, head_dim) as the right-hand side of query . key: columns are keys. */
static void pack_keys(const bf16 *key, ptrdiff_t stride, long length, int head_dim, uint32_t *out) {
    const long pairs = head_dim / 2;
    for (long j = 0; j < length; j += 16) {
        uint32_t *column = out + (j / PANEL) * PANEL * pairs + j % PANEL;
        for (long p = 0; p < pairs; p += 16) {
            const __mmask16 words = lanes(pairs - p);
            __m512i rows[16];
            for (int i = 0; i < 16; ++i)
                rows[i] = j + i < length ? _mm512_maskz_loadu_epi32(words, key + (j + i) * stride + 2 * p)
                                         : _mm512_setzero_si512();
            transpose_words(rows);
            for (int i = 0; i < 16 && p + i < pairs; ++i) _mm512_storeu_si512(column + (p + i) * PANEL, rows[i]);
        }
    }
}

/* Values (length, head_dim) as the right-hand side of weight . value: pairs of neighbouring keys. */
static void pack_values(const bf16 *value, ptrdiff_t stride, long length, int head_dim, uint32_t *out) {
    const long pairs = (length + 1) / 2;
    for (long d = 0; d < head_dim; d += 16) {
        const __mmask16 mask = lanes(head_dim - d);
        uint32_t *column = out + (d / PANEL) * PANEL * pairs + d % PANEL;
        for (long p = 0; p < pairs; ++p) {
            const bf16 *row = value + 2 * p * stride + d;
            const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row));
            const __m512i odd =
                2 * p + 1 < length ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row + stride))
                                   : _mm512_setzero_si512();
            _mm512_storeu_si512(column + p * PANEL, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
        }
    }
}

/* One query and the keys [0, padded) of a block, of which it sees [from, to). */
struct sight {
    long from, to, padded;
    float scale, slope; /* both times log2 e */
    float distance;     /* from the query to key 0 of the block */
};

INLINE __m512 scaled(const struct sight *s, const float *score, long j, int slanted) {
    const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(score + j), _mm512_set1_ps(s->scale));
    if (!slanted) return x;
    const __m512 places = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512 apart = _mm512_abs_ps(_mm512_add_ps(places, _mm512_set1_ps(s->distance + (float)j)));
    return _mm512_fnmadd_ps(apart, _mm512_set1_ps(s->slope), x);
}

/* Scores of one query to weights 2^(score - peak) in bf16, zero for what it does not see. Takes them into its
 * running peak and sum, and returns what it had summed up before shrinks by. */
INLINE float softmax_row(const struct sight *s, const float *score, int slanted, float *peak, float *mass,
                         bf16 *weight) {
    const long first = s->from / 16 * 16;
    for (long j = 0; j < first; j += 16) store_bf16(weight + j, 0xffff, _mm512_setzero_ps());
    __m512 most = _mm512_set1_ps(*peak), sum = _mm512_setzero_ps();
    for (long j = first; j < s->to; j += 16)
        most = _mm512_mask_max_ps(most, between(s->from - j, s->to - j), most, scaled(s, score, j, slanted));
    const float before = *peak, now = _mm512_reduce_max_ps(most);
    for (long j = first; j < s->to; j += 16) {
        const __m512 x = _mm512_sub_ps(scaled(s, score, j, slanted), _mm512_set1_ps(now));
        const __m512 e = _mm512_maskz_mov_ps(between(s->from - j, s->to - j), power_of_two(x));
        sum = _mm512_add_ps(sum, e);
        store_bf16(weight + j, 0xffff, e);
    }
    for (long j = round_up(s->to, 16); j < s->padded; j += 16) store_bf16(weight + j, 0xffff, _mm512_setzero_ps());
    const float shrink = before == UNSEEN ? 0.0f
                                          : _mm512_cvtss_f32(power_of_two(_mm512_set1_ps(before - now)));
    *peak = now;
    *mass = *mass * shrink + _mm512_reduce_add_ps(sum);
    return shrink;
}

/* Some neighbouring queries of one head, and the block of keys [from, from + keys) that is packed. */
struct tile_of_queries {
    const struct attention *form;
    const struct attention_buffers *buffers;
    const bf16 *query; /* of the first of `rows` queries, at place `start` of the text */
    bf16 *out;
    long start, rows, from, keys, length;
    float slope;
    float *sums, *peak, *mass;
};

INLINE long first_seen(const struct attention *t, long query) {
    return t->window && query >= t->window ? query - t->window + 1 : 0;
}

INLINE long behind_seen(const struct attention *t, long query, long length) {
    return t->causal ? query + 1 : length;
}

/* Scores of all queries, then their weights in bf16; shrink[r] is what earlier sums are to be taken times. */
static void weigh(const struct tile_of_queries *q, long keys, float *shrink) {
    const struct attention *t = q->form;
    const struct attention_buffers *b = q->buffers;
    const long pairs = t->head_dim / 2;
    for (long r = 0; r < q->rows;) {
        const long step = tile_rows(q->rows - r);
        for (long j = 0; j < keys; j += PANEL)
            tile(q->query + r * t->query_stride, t->query_stride, step, b->keys + j * pairs,
                 keys - j < PANEL ? keys - j : PANEL, pairs, b->scores + r * KEY_BLOCK + j, KEY_BLOCK);
        r += step;
    }
    for (long r = 0; r < q->rows; ++r) {
        const long query = q->start + r, from = first_seen(t, query) - q->from;
        const long to = behind_seen(t, query, q->length) - q->from;
        const struct sight s = {
            .from = from < 0 ? 0 : from < keys ? from : keys,
            .to = to < keys ? to : keys,
            .padded = round_up(keys, 2),
            .scale = t->scale * LOG2_E,
            .slope = q->slope * LOG2_E,
            .distance = (float)(q->from - query),
        };
        const float *score = b->scores + r * KEY_BLOCK;
        bf16 *weight = b->weights + r * KEY_BLOCK;
        shrink[r] = q->slope != 0.0f ? softmax_row(&s, score, 1, q->peak + r, q->mass + r, weight)
                                     : softmax_row(&s, score, 0, q->peak + r, q->mass + r, weight);
    }
}

/* Add the values of the block, weighted, to the sums; behind the last block that a query sees write them out. */
static void attend_tile(const struct tile_of_queries *q) {
    const struct attention *t = q->form;
    const struct attention_buffers *b = q->buffers;
    const long end = behind_seen(t, q->start + q->rows - 1, q->length), wide_row = round_up(t->head_dim, PANEL);
    if (q->from >= end || q->from + q->keys <= first_seen(t, q->start)) return;
    const int last = q->from + q->keys >= end;
    const long keys = last ? end - q->from : q->keys, value_pairs = (q->keys + 1) / 2;
    float shrink[QUERY_ROWS];
    weigh(q, keys, shrink);
    for (long d = 0; d < t->head_dim; d += PANEL) {
        const long wide = t->head_dim - d < PANEL ? t->head_dim - d : PANEL;
        for (long r = 0; r < q->rows;) {
            const long step = tile_rows(q->rows - r);
            tile(b->weights + r * KEY_BLOCK, KEY_BLOCK, step, b->values + d * value_pairs, wide, (keys + 1) / 2,
                 b->part + r * PANEL, PANEL);
            r += step;
        }
        for (long r = 0; r < q->rows; ++r)
            for (long i = 0; i < wide; i += 16) {
                float *sum = q->sums + r * wide_row + d + i;
                const __m512 x = _mm512_fmadd_ps(_mm512_loadu_ps(sum), _mm512_set1_ps(shrink[r]),
                                                 _mm512_loadu_ps(b->part + r * PANEL + i));
                if (last)
                    store_bf16(q->out + r * t->out_stride + d + i, lanes(wide - i),
                               _mm512_mul_ps(x, _mm512_set1_ps(1.0f / q->mass[r])));
                else
                    _mm512_storeu_ps(sum, x);
            }
    }
}

struct attention_call {
    const struct attention *form;
    const bf16 *query, *key, *value;
    bf16 *out;
    const int32_t *ends;
    long items, longest;
    char *scratch; /* of member 0, the others behind it */
    size_t scratch_step;
};

INLINE int shared_heads(const struct attention *t) { return t->heads / t->key_heads; }

INLINE long tasks_of_head(const struct attention_call *c) {
    const long queries = task_queries(shared_heads(c->form));
    return (c->longest + queries - 1) / queries;
}

static long attention_tasks(const void *context, int phase) {
    (void)phase;
    const struct attention_call *c = context;
    return c->items * c->form->key_heads * tasks_of_head(c);
}

/* Queries [start, start + rows) of one text, of the heads that share `key_head`. */
static void attend(const struct attention_call *c, long first, long length, int key_head, long start, long rows,
                   const struct attention_buffers *b) {
    const struct attention *t = c->form;
    const int shared = shared_heads(t);
    const long end = behind_seen(t, start + rows - 1, length), wide_row = round_up(t->head_dim, PANEL);
    const long key_at = first * t->key_stride + (long)key_head * t->head_dim;
    memset(b->sums, 0, sizeof(float) * (size_t)(shared * rows * wide_row));
    for (long r = 0; r < shared * rows; ++r) {
        b->peak[r] = UNSEEN;
        b->mass[r] = 0.0f;
    }
    for (long from = first_seen(t, start); from < end; from += KEY_BLOCK) {
        const long keys = end - from < KEY_BLOCK ? end - from : KEY_BLOCK;
        pack_keys(c->key + key_at + from * t->key_stride, t->key_stride, keys, t->head_dim, b->keys);
        pack_values(c->value + key_at + from * t->key_stride, t->key_stride, keys, t->head_dim, b->values);
        for (int i = 0; i < shared; ++i)
            for (long r = 0; r < rows; r += QUERY_ROWS) {
                const int head = key_head * shared + i;
                const long token = first + start + r, place = i * rows + r;
                const struct tile_of_queries q = {
                    .form = t,
                    .buffers = b,
                    .query = c->query + token * t->query_stride + (long)head * t->head_dim,
                    .out = c->out + token * t->out_stride + (long)head * t->head_dim,
                    .start = start + r,
                    .rows = rows - r < QUERY_ROWS ? rows - r : QUERY_ROWS,
                    .from = from,
                    .keys = keys,
                    .length = length,
                    .slope = t->slopes ? t->slopes[head] : 0.0f,
                    .sums = b->sums + place * wide_row,
                    .peak = b->peak + place,
                    .mass = b->mass + place,
                };
                attend_tile(&q);
            }
    }
}

/* Tasks of the end of a text come first: where attention is causal they take longest. */
static void attention_task(const void *context, int phase, long task, int member) {
    (void)phase;
    const struct attention_call *c = context;
    const long parts = tasks_of_head(c), queries = task_queries(shared_heads(c->form));
    const long item = task / parts / c->form->key_heads, start = (parts - 1 - task % parts) * queries;
    const long first = c->ends[item], length = c->ends[item + 1] - first;
    if (start >= length) return;
    struct attention_buffers b;
    lay_out(&b, c->scratch + (size_t)member * c->scratch_step, c->form->head_dim, shared_heads(c->form));
    attend(c, first, length, (int)(task / parts % c->form->key_heads), start,
           length - start < queries ? length - start : queries, &b);
}

#endif
