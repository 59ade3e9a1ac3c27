/* Attention inside each text of a packed batch, without padding, a bias table or a table of scores.
 *
 * A task is some queries of the heads that share one head of keys. It goes through the keys it sees in blocks
 * that fit the cache, and keeps for each query the maximum of its scores and the sum of its weights so far.
 * Memory does not grow with the length. Source of the running softmax: Milakov and Gimelshein, arXiv 1805.02867.
 */
#ifndef SF_ATTENTION_H
#define SF_ATTENTION_H

#include "team.h"
#include "tile.h"

/* Queries of a tile of scores; keys of a block; queries of a task, all heads together. */
enum { QUERY_ROWS = 12, KEY_BLOCK = 512, TASK_ROWS = 384 };

static const float UNSEEN = -3.0e38f, LOG2_E = 1.44269504f;

struct attention {
    int32_t heads, key_heads, head_dim, causal;
    int64_t query_stride, key_stride, out_stride; /* elements from token to token */
    int64_t window;                               /* keys a query sees, itself included; 0 is all */
    float scale;
    const float *slopes;   /* ALiBi, one per head, or null */
    const int32_t *visible; /* how many of its first keys each text shows, or null for all */
};

/* Queries of a task in each of its heads. */
static long task_queries(int shared) {
    const long each = TASK_ROWS / shared / QUERY_ROWS * QUERY_ROWS;
    return each ? each : QUERY_ROWS;
}

struct attention_buffers {
    void *keys, *values;
    float *scores, *part;           /* of one tile: (QUERY_ROWS, KEY_BLOCK), (QUERY_ROWS, PANEL) */
    float *sums, *row_max, *row_sum; /* of all queries of the task: (queries, head_dim rounded up), (queries,) */
    element *weights;
};

/* Lay the buffers out from `scratch`; returns their bytes. */
static size_t lay_out(struct attention_buffers *b, void *scratch, int head_dim, int shared) {
    const long rows = task_queries(shared) * shared;
    b->keys = scratch;
    b->values = (char *)b->keys + packed_bytes(KEY_BLOCK, head_dim, ELEMENTS);
    b->scores = (float *)((char *)b->values + packed_bytes(head_dim, KEY_BLOCK, ELEMENTS));
    b->part = b->scores + QUERY_ROWS * KEY_BLOCK;
    b->sums = b->part + QUERY_ROWS * PANEL;
    b->row_max = b->sums + rows * round_up(head_dim, PANEL);
    b->row_sum = b->row_max + rows;
    b->weights = (element *)(b->row_sum + rows);
    return (size_t)round_up((char *)(b->weights + QUERY_ROWS * KEY_BLOCK) - (char *)scratch, 64);
}

/* Bytes of scratch of one thread. */
static size_t attention_scratch(int head_dim, int shared) {
    struct attention_buffers b;
    return lay_out(&b, NULL, head_dim, shared);
}

/* One query and the keys [0, padded) of a block, of which it sees [from, to). */
struct mask {
    long from, to, padded;
    float scale, slope; /* both times log2 e */
    float distance;     /* from the query to key 0 of the block */
};

INLINE vec scaled(const struct mask *m, const float *score, long j, int alibi) {
    const vec x = load(score + j) * splat(m->scale);
    if (!alibi) return x;
    return neg_mul_add(magnitude(places() + splat(m->distance + (float)j)), splat(m->slope), x);
}

INLINE int inside(const struct mask *m, long j) { return j >= m->from && j + LANES <= m->to; }

/* Scores of one query to weights 2^(score - maximum), zero for what it does not see. Takes them into its running
 * maximum and sum, and returns what it had summed up before shrinks by. */
INLINE float softmax_row(const struct mask *m, const float *score, int alibi, float *row_max, float *row_sum,
                         element *weight) {
    const long first = m->from / LANES * LANES;
    for (long j = 0; j < first; j += LANES) store_element(weight + j, LANES, zero());
    vec most = splat(*row_max), sum = zero();
    for (long j = first; j < m->to; j += LANES) {
        const vec x = scaled(m, score, j, alibi);
        most = larger(inside(m, j) ? x : choose(m->from - j, m->to - j, x, most), most);
    }
    const float before = *row_max, now = largest_of(most);
    for (long j = first; j < m->to; j += LANES) {
        const vec x = power_of_two(scaled(m, score, j, alibi) - splat(now));
        const vec e = inside(m, j) ? x : choose(m->from - j, m->to - j, x, zero());
        sum = sum + e;
        store_element(weight + j, LANES, e);
    }
    for (long j = round_up(m->to, LANES); j < m->padded; j += LANES) store_element(weight + j, LANES, zero());
    const float shrink = before == UNSEEN ? 0.0f : first_of(power_of_two(splat(before - now)));
    *row_max = now;
    *row_sum = *row_sum * shrink + sum_of(sum);
    return shrink;
}

/* Some neighbouring queries of one head, and the block of keys [from, from + keys) that is packed. */
struct query_tile {
    const struct attention *form;
    const struct attention_buffers *buffers;
    const element *query; /* of the first of `rows` queries, at place `start` of the text */
    element *out;
    long start, rows, from, keys, length; /* `length` counts the keys that the text shows */
    float slope;
    float *sums, *row_max, *row_sum;
};

INLINE long first_seen(const struct attention *t, long query) {
    return t->window && query >= t->window ? query - t->window + 1 : 0;
}

INLINE long behind_seen(const struct attention *t, long query, long length) {
    return t->causal ? least(query + 1, length) : length;
}

/* Scores of all queries, then their weights; shrink[r] is what earlier sums are to be taken times. */
static void softmax_block(const struct query_tile *q, long keys, float *shrink) {
    const struct attention *t = q->form;
    const struct attention_buffers *b = q->buffers;
    for (long r = 0; r < q->rows;) {
        const long rows = tile_rows(q->rows - r);
        for (long j = 0; j < keys; j += PANEL)
            tile(q->query + r * t->query_stride, t->query_stride, rows, panel_at(b->keys, j, t->head_dim, ELEMENTS),
                 ELEMENTS, least(keys - j, PANEL), t->head_dim, 0, b->scores + r * KEY_BLOCK + j, KEY_BLOCK);
        r += rows;
    }
    for (long r = 0; r < q->rows; ++r) {
        const long query = q->start + r, from = first_seen(t, query) - q->from;
        const long to = behind_seen(t, query, q->length) - q->from;
        const struct mask m = {
            .from = from < 0 ? 0 : least(from, keys),
            .to = to < 0 ? 0 : least(to, keys),
            .padded = round_up(keys, STEP),
            .scale = t->scale * LOG2_E,
            .slope = q->slope * LOG2_E,
            .distance = (float)(q->from - query),
        };
        const float *score = b->scores + r * KEY_BLOCK;
        element *weight = b->weights + r * KEY_BLOCK;
        shrink[r] = q->slope != 0.0f ? softmax_row(&m, score, 1, q->row_max + r, q->row_sum + r, weight)
                                     : softmax_row(&m, score, 0, q->row_max + r, q->row_sum + r, weight);
    }
}

/* Add the values of the block, weighted, to the sums; behind the last block that a query sees write them out. */
static void attend_tile(const struct query_tile *q) {
    const struct attention *t = q->form;
    const struct attention_buffers *b = q->buffers;
    const long end = behind_seen(t, q->start + q->rows - 1, q->length), wide_row = round_up(t->head_dim, PANEL);
    if (q->from >= end || q->from + q->keys <= first_seen(t, q->start)) return;
    const int last = q->from + q->keys >= end;
    const long keys = last ? end - q->from : q->keys;
    float shrink[QUERY_ROWS];
    softmax_block(q, keys, shrink);
    for (long d = 0; d < t->head_dim; d += PANEL) {
        const long wide = least(t->head_dim - d, PANEL);
        for (long r = 0; r < q->rows;) {
            const long rows = tile_rows(q->rows - r);
            tile(b->weights + r * KEY_BLOCK, KEY_BLOCK, rows,
                 panel_at(b->values, d, round_up(q->keys, STEP), ELEMENTS), ELEMENTS, wide, round_up(keys, STEP), 0,
                 b->part + r * PANEL, PANEL);
            r += rows;
        }
        for (long r = 0; r < q->rows; ++r)
            for (long i = 0; i < wide; i += LANES) {
                float *sum = q->sums + r * wide_row + d + i;
                const vec x = mul_add(load(sum), splat(shrink[r]), load(b->part + r * PANEL + i));
                if (last)
                    store_element(q->out + r * t->out_stride + d + i, wide - i, x * splat(1.0f / q->row_sum[r]));
                else
                    store(sum, x);
            }
    }
}

struct attention_call {
    const struct attention *form;
    const element *query, *key, *value;
    element *out;
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

/* Queries [start, start + rows) of the text that begins at token `first` and shows `length` keys, of the heads
 * that share `key_head`. */
static void attend(const struct attention_call *c, long first, long length, int key_head, long start, long rows,
                   const struct attention_buffers *b) {
    const struct attention *t = c->form;
    const int shared = shared_heads(t);
    const long end = behind_seen(t, start + rows - 1, length), wide_row = round_up(t->head_dim, PANEL);
    const long key_at = first * t->key_stride + (long)key_head * t->head_dim;
    memset(b->sums, 0, sizeof(float) * (size_t)(shared * rows * wide_row));
    for (long r = 0; r < shared * rows; ++r) {
        b->row_max[r] = UNSEEN;
        b->row_sum[r] = 0.0f;
    }
    for (long from = first_seen(t, start); from < end; from += KEY_BLOCK) {
        const long keys = least(end - from, KEY_BLOCK);
        pack_keys(c->key + key_at + from * t->key_stride, t->key_stride, keys, t->head_dim, b->keys);
        pack_values(c->value + key_at + from * t->key_stride, t->key_stride, keys, t->head_dim, b->values);
        for (int i = 0; i < shared; ++i)
            for (long r = 0; r < rows; r += QUERY_ROWS) {
                const int head = key_head * shared + i;
                const long token = first + start + r, place = i * rows + r;
                const struct query_tile q = {
                    .form = t,
                    .buffers = b,
                    .query = c->query + token * t->query_stride + (long)head * t->head_dim,
                    .out = c->out + token * t->out_stride + (long)head * t->head_dim,
                    .start = start + r,
                    .rows = least(rows - r, QUERY_ROWS),
                    .from = from,
                    .keys = keys,
                    .length = length,
                    .slope = t->slopes ? t->slopes[head] : 0.0f,
                    .sums = b->sums + place * wide_row,
                    .row_max = b->row_max + place,
                    .row_sum = b->row_sum + place,
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
    attend(c, first, c->form->visible ? c->form->visible[item] : length, (int)(task / parts % c->form->key_heads),
           start, least(length - start, queries), &b);
}

#endif
