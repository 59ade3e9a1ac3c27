/* One step of a decoder that answers: new tokens of many sequences, over keys and values kept in blocks.
 *
 * Every product is cut into rows and columns: a step of a single token keeps all threads at the weights. Each row
 * is summed up in the same order whatever stands beside it, so that an answer does not depend on its company.
 *
 * A block holds BLOCK_TOKENS keys and values of one layer and one head of keys, packed as the right-hand sides of
 * both products of attention: scores read keys, sums read values, and nothing is packed again.
 */
#ifndef SF_GENERATE_H
#define SF_GENERATE_H

#include "decoder.h"

/* Columns and rows of a task; phases of a layer; products, in numbers, that are worth a second thread. */
enum { BLOCK_TOKENS = 64, COLUMNS = 256, GENERATE_ROWS = 48, STEPS = 6, WORTH_HELP = 1 << 16 };

struct generate_layer {
    struct linear joined, attended, gate, up, down;
    const float *attention_norm, *inner_norm, *query_norm, *key_norm; /* those of heads may be null */
};

struct generator {
    int32_t width, heads, key_heads, head_dim, inner, layers;
    float epsilon;
    int32_t blocks; /* of the cache */
    struct linear head;
    const float *norm;
    const struct generate_layer *layer;
    element *keys, *values; /* of a layer behind that of another, of a block behind another */
};

/* Queries [first, first + count) of one sequence, whose blocks are `table`: the tokens from `position` on. */
struct query_run {
    int32_t first, count, position, unused;
    const int32_t *table;
};

struct generate_pass {
    const struct generator *generator;
    element *hidden, *joined, *attended, *inner; /* (tokens, width), all heads of a token, queries, inner */
    const int32_t *positions, *blocks;           /* of each token, and the block that it goes into */
    const float *cosines, *sines;                /* by position */
    const struct query_run *runs;
    const int32_t *asked; /* rows whose logits are wanted */
    float *logits;        /* (asked, vocabulary) */
    int64_t tokens, run_count, asked_count;
};

struct generating {
    const struct generate_pass *in;
    char *own;
    size_t own_size;
    long rows;
};

struct generate_buffers {
    element *normed;
    element *weights;
    float *scores, *part, *sums;
};

enum { RUN_ROWS = 12 }; /* queries of a task, heads together */

static size_t lay_generate_out(const struct generator *g, struct generate_buffers *b, void *scratch) {
    b->normed = scratch;
    b->weights = b->normed + round_up(GENERATE_ROWS * (long)g->width, 16);
    b->scores = (float *)(b->weights + RUN_ROWS * BLOCK_TOKENS);
    b->part = b->scores + RUN_ROWS * BLOCK_TOKENS;
    b->sums = b->part + RUN_ROWS * PANEL;
    return (size_t)round_up((char *)(b->sums + RUN_ROWS * round_up(g->head_dim, PANEL)) - (char *)scratch, 64);
}

static long head_elements(const struct generator *g) {
    return (long)(packed_bytes(BLOCK_TOKENS, g->head_dim, ELEMENTS) / sizeof(element));
}

static long value_elements(const struct generator *g) {
    return (long)(packed_bytes(g->head_dim, BLOCK_TOKENS, ELEMENTS) / sizeof(element));
}

/* Where the keys or values of a block are, of a head in a layer; `each` elements belong to one head. */
static element *cached(const struct generator *g, element *cache, long each, int layer, long block, int key_head) {
    return cache + (((long)layer * g->blocks + block) * g->key_heads + key_head) * each;
}

/* Write one key into its place of a block: column `at` of a right-hand side. */
INLINE void put_key(element *block, long head_dim, long at, const element *key) {
    element *panel = block + at / PANEL * PANEL * head_dim;
    const long column = at % PANEL;
    for (long d = 0; d < head_dim; ++d) panel[(d / STEP * PANEL + column) * STEP + d % STEP] = key[d];
}

/* Write one value into its place of a block: step `at` of the inner dimension. */
INLINE void put_value(element *block, long head_dim, long at, const element *value) {
    for (long d = 0; d < head_dim; ++d)
        block[d / PANEL * PANEL * BLOCK_TOKENS + (at / STEP * PANEL + d % PANEL) * STEP + at % STEP] = value[d];
}

/* The columns [n, n + COLUMNS) of a layer, as a layer of its own. */
INLINE struct linear columns_of(const struct linear *l, long n) {
    struct linear part = *l;
    part.weight = panel_at(l->weight, n, l->into, l->storage);
    part.out = least(l->out - n, COLUMNS);
    if (l->bias) part.bias = l->bias + n;
    return part;
}

static long column_tasks(const struct linear *l) { return (l->out + COLUMNS - 1) / COLUMNS; }

static void turn_and_keep(const struct generate_pass *in, int layer, long first, long count) {
    const struct generator *g = in->generator;
    const struct generate_layer *l = g->layer + layer;
    const long stride = (long)(g->heads + 2 * g->key_heads) * g->head_dim, half = g->head_dim / 2;
    for (long r = first; r < first + count; ++r) {
        const float *cosines = in->cosines + in->positions[r] * half, *sines = in->sines + in->positions[r] * half;
        element *query = in->joined + r * stride, *key = query + (long)g->heads * g->head_dim;
        const element *value = key + (long)g->key_heads * g->head_dim;
        norm_rope_heads(query, g->heads, g->head_dim, l->query_norm, g->epsilon, cosines, sines);
        norm_rope_heads(key, g->key_heads, g->head_dim, l->key_norm, g->epsilon, cosines, sines);
        const long at = in->positions[r] % BLOCK_TOKENS;
        for (int h = 0; h < g->key_heads; ++h) {
            put_key(cached(g, g->keys, head_elements(g), layer, in->blocks[r], h), g->head_dim, at,
                    key + (long)h * g->head_dim);
            put_value(cached(g, g->values, value_elements(g), layer, in->blocks[r], h), g->head_dim, at,
                      value + (long)h * g->head_dim);
        }
    }
}

/* Queries of one head of keys, `count` tokens in each of the heads that share it, over all blocks they see. */
static void attend_blocks(const struct generate_pass *in, int layer, const struct query_run *run, int key_head,
                          const struct generate_buffers *b) {
    const struct generator *g = in->generator;
    const long stride = (long)(g->heads + 2 * g->key_heads) * g->head_dim, wide_row = round_up(g->head_dim, PANEL);
    const int shared = g->heads / g->key_heads;
    const float scale = LOG2_E / __builtin_sqrtf((float)g->head_dim);
    for (int s = 0; s < shared; ++s) {
        const int head = key_head * shared + s;
        const element *query = in->joined + run->first * stride + (long)head * g->head_dim;
        float row_max[RUN_ROWS], row_sum[RUN_ROWS];
        for (long r = 0; r < run->count; ++r) {
            row_max[r] = UNSEEN;
            row_sum[r] = 0.0f;
        }
        memset(b->sums, 0, sizeof(float) * (size_t)(run->count * wide_row));
        const long end = run->position + run->count;
        for (long from = 0; from < end; from += BLOCK_TOKENS) {
            const long block = run->table[from / BLOCK_TOKENS], keys = least(end - from, BLOCK_TOKENS);
            const element *key = cached(g, g->keys, head_elements(g), layer, block, key_head);
            const element *value = cached(g, g->values, value_elements(g), layer, block, key_head);
            float shrink[RUN_ROWS];
            for (long r = 0; r < run->count;) {
                const long rows = tile_rows(run->count - r);
                for (long j = 0; j < keys; j += PANEL)
                    tile(query + r * stride, stride, rows, panel_at(key, j, g->head_dim, ELEMENTS), ELEMENTS, PANEL,
                         g->head_dim, 0, b->scores + r * BLOCK_TOKENS + j, BLOCK_TOKENS);
                r += rows;
            }
            for (long r = 0; r < run->count; ++r) {
                const long seen = run->position + r + 1 - from;
                const struct mask m = {
                    .from = 0, .to = seen < 0 ? 0 : least(seen, keys), .padded = BLOCK_TOKENS, .scale = scale,
                };
                shrink[r] = 1.0f;
                if (m.to)
                    shrink[r] = softmax_row(&m, b->scores + r * BLOCK_TOKENS, 0, row_max + r, row_sum + r,
                                            b->weights + r * BLOCK_TOKENS);
                else
                    memset(b->weights + r * BLOCK_TOKENS, 0, sizeof(element) * BLOCK_TOKENS);
            }
            for (long d = 0; d < g->head_dim; d += PANEL) {
                const long wide = least(g->head_dim - d, PANEL);
                for (long r = 0; r < run->count;) {
                    const long rows = tile_rows(run->count - r);
                    tile(b->weights + r * BLOCK_TOKENS, BLOCK_TOKENS, rows, panel_at(value, d, BLOCK_TOKENS, ELEMENTS),
                         ELEMENTS, wide, round_up(keys, STEP), 0, b->part + r * PANEL, PANEL);
                    r += rows;
                }
                for (long r = 0; r < run->count; ++r)
                    for (long i = 0; i < wide; i += LANES) {
                        float *sum = b->sums + r * wide_row + d + i;
                        store(sum, mul_add(load(sum), splat(shrink[r]), load(b->part + r * PANEL + i)));
                    }
            }
        }
        for (long r = 0; r < run->count; ++r)
            for (long d = 0; d < g->head_dim; d += LANES)
                store_element(in->attended + ((run->first + r) * g->heads + head) * g->head_dim + d, g->head_dim - d,
                              load(b->sums + r * wide_row + d) * splat(1.0f / row_sum[r]));
    }
}

static long generating_tasks(const void *context, int phase) {
    const struct generating *p = context;
    const struct generator *g = p->in->generator;
    const long row_tasks = (p->in->tokens + p->rows - 1) / p->rows;
    if (phase == STEPS * g->layers)
        return (p->in->asked_count + GENERATE_ROWS - 1) / GENERATE_ROWS * column_tasks(&g->head);
    const struct generate_layer *l = g->layer + phase / STEPS;
    switch (phase % STEPS) {
    case 0: return row_tasks * column_tasks(&l->joined);
    case 1: return row_tasks;
    case 2: return p->in->run_count * g->key_heads;
    case 3: return row_tasks * column_tasks(&l->attended);
    case 4: return row_tasks * column_tasks(&l->up);
    default: return row_tasks * column_tasks(&l->down);
    }
}

/* The last norm of the rows that are asked for, and some columns of their logits. */
static void ask(const struct generate_pass *in, long task, const struct generate_buffers *b) {
    static const struct run none = {0, INT32_MAX, -1};
    const struct generator *g = in->generator;
    const long n = task % column_tasks(&g->head) * COLUMNS, first = task / column_tasks(&g->head) * GENERATE_ROWS;
    const struct rows rows = {0, least(in->asked_count - first, GENERATE_ROWS), &none};
    const struct linear part = columns_of(&g->head, n);
    float sums[GENERATE_ROWS * PANEL];
    for (long r = 0; r < rows.count; ++r)
        rms_rows(g->norm, in->hidden + (long)in->asked[first + r] * g->width, 1, g->width, g->epsilon,
                 b->normed + r * g->width);
    for (long c = 0; c < part.out; c += PANEL) {
        const long wide = least(part.out - c, PANEL);
        for (long m = 0; m < rows.count;) {
            const long count = product_rows(&part, rows.count - m);
            product(&part, &rows, b->normed, NULL, m, count, c, wide, sums);
            for (long r = 0; r < count; ++r)
                for (long i = 0; i < wide; i += LANES)
                    store_some(in->logits + (first + m + r) * g->head.out + n + c + i, wide - i,
                               load(sums + r * PANEL + i));
            m += count;
        }
    }
}

static void generating_task(const void *context, int phase, long task, int member) {
    static const struct run none = {0, INT32_MAX, -1};
    const struct generating *p = context;
    const struct generate_pass *in = p->in;
    const struct generator *g = in->generator;
    struct generate_buffers b;
    lay_generate_out(g, &b, p->own + (size_t)member * p->own_size);
    if (phase == STEPS * g->layers) {
        ask(in, task, &b);
        return;
    }
    const int layer = phase / STEPS;
    const struct generate_layer *l = g->layer + layer;
    const struct linear *const of[STEPS] = {&l->joined, NULL, NULL, &l->attended, &l->up, &l->down};
    const struct linear *whole = of[phase % STEPS];
    const long row_tasks = (in->tokens + p->rows - 1) / p->rows;
    if (phase % STEPS == 2) {
        attend_blocks(in, layer, in->runs + task / g->key_heads, (int)(task % g->key_heads), &b);
        return;
    }
    const long first = task % row_tasks * p->rows, n = whole ? task / row_tasks * COLUMNS : 0;
    const struct rows rows = {first, least(in->tokens - first, p->rows), &none};
    if (phase % STEPS == 1) {
        turn_and_keep(in, layer, first, rows.count);
        return;
    }
    const struct linear part = columns_of(whole, n);
    element *hidden = in->hidden + first * g->width;
    switch (phase % STEPS) {
    case 0:
        rms_rows(l->attention_norm, hidden, rows.count, g->width, g->epsilon, b.normed);
        project(&part, &rows, b.normed, NULL, in->joined + first * whole->out + n, whole->out);
        break;
    case 3:
        project_add(&part, &rows, in->attended + first * whole->into, NULL, hidden + n, g->width);
        break;
    case 4: {
        const struct linear gate = columns_of(&l->gate, n);
        rms_rows(l->inner_norm, hidden, rows.count, g->width, g->epsilon, b.normed);
        project_gated(&gate, &part, 0, &rows, b.normed, NULL, NULL, in->inner + first * g->inner + n, g->inner);
        break;
    }
    default: project_add(&part, &rows, in->inner + first * whole->into, NULL, hidden + n, g->width);
    }
}

/* Bytes of scratch of one thread. */
static size_t generate_scratch(const struct generator *g) {
    struct generate_buffers b;
    return lay_generate_out(g, &b, NULL);
}

/* Do a step with up to `members` threads. */
static void generate(const struct generate_pass *in, char *scratch, int members) {
    struct generating p = {.in = in, .own = scratch, .own_size = generate_scratch(in->generator)};
    p.rows = GENERATE_ROWS;
    struct job job = {
        .phases = STEPS * in->generator->layers + 1, .tasks = generating_tasks, .run = generating_task, .context = &p,
    };
    work(&job, (long)in->generator->width * in->generator->inner < WORTH_HELP ? 1 : members);
}

#endif
