/* A post-norm encoder (BERT, XLM-R, JinaBERT) from token ids to hidden states in one call. */
#ifndef SF_ENCODER_H
#define SF_ENCODER_H

#include "attention.h"
#include "linear.h"
#include "rope.h"

struct norm {
    const float *weight, *bias; /* null for none */
};

/* Query and key may have norms over their full width; with an `input_norm` the layer's input is added once more
 * behind the norm of attention, and normed again; without a gate the MLP is up, GELU, down. */
struct encoder_layer {
    struct linear query_key_value, attention_output, gate, up, down;
    struct norm query_norm, key_norm, attention_norm, input_norm, output_norm;
};

struct encoder {
    int32_t width, heads, layers, inner, storage, rank; /* the rank of adapters, 0 without */
    float epsilon;
    int32_t added_by_task;
    const void *words;              /* (vocabulary, width) as stored */
    const void *added;              /* rows added to the words: of the position, or of the task + 1; as stored */
    const struct lora *word_tasks;  /* or null; as stored: A (vocabulary, rank), B (rank, width) */
    const float *slopes;            /* of ALiBi, (heads,), or null */
    struct norm norm;
    const struct encoder_layer *layer;
};

/* What a pass is given. */
struct encoder_pass {
    const struct encoder *encoder;
    const int32_t *ids, *ends, *visible; /* `visible` as in struct attention */
    const float *cosines, *sines;        /* (longest, head_dim / 2), or null without rotary positions */
    const struct run *runs;
    int64_t items, longest;
    element *hidden; /* (tokens, width) */
};

/* A pass under way: phase 0 embeds and projects, then two phases a layer, attention and the rest. */
struct encoding {
    const struct encoder_pass *in;
    struct attention form;
    struct attention_call attention;
    long tokens, rows; /* rows of a task */
    element *qkv, *attended;
    int32_t *positions;
    char *own; /* scratch of member 0, the others behind it */
    size_t own_size;
};

struct encoder_buffers {
    float *sums;
    element *inner, *low, *low_up;
};

static size_t lay_encoder_out(const struct encoder *e, struct encoder_buffers *b, void *scratch) {
    b->sums = scratch;
    b->inner = (element *)(b->sums + BLOCK_ROWS * (long)e->width);
    b->low = b->inner + BLOCK_ROWS * (long)(e->inner > e->width ? e->inner : e->width);
    b->low_up = b->low + BLOCK_ROWS * (long)e->rank;
    return (size_t)round_up((char *)(b->low_up + BLOCK_ROWS * (long)e->rank) - (char *)scratch, 64);
}

static size_t encoder_own_scratch(const struct encoder *e) {
    struct encoder_buffers b;
    return lay_encoder_out(e, &b, NULL) + attention_scratch(e->width / e->heads, 1);
}

/* Bytes of what the members share: the projections of all tokens, what they attended to, their positions. */
static size_t encoder_shared_scratch(const struct encoder *e, long tokens) {
    const size_t token = (size_t)e->width * 4 * sizeof(element) + sizeof(int32_t);
    return (size_t)round_up((long)((size_t)tokens * token), 64);
}

/* Bytes of scratch for a pass of `tokens`. */
static size_t encoder_scratch(const struct encoder *e, long tokens, int members) {
    return encoder_shared_scratch(e, tokens) + (size_t)members * encoder_own_scratch(e);
}

static void norm_rows(const struct norm *n, const float *x, long rows, long width, float epsilon, element *out) {
    for (long r = 0; r < rows; ++r)
        layer_norm(x + r * width, width, n->weight, n->bias, epsilon, out + r * width);
}

static void add_word_task(const struct encoder *e, const struct lora *task, long id, float *sums) {
    for (long k = 0; k < e->rank; ++k) {
        const vec low = splat(stored_at(task->a, e->storage, id * e->rank + k));
        for (long i = 0; i < e->width; i += LANES)
            store_some(sums + i, e->width - i,
                       mul_add(low, load_stored(task->b, e->storage, k * e->width + i, e->width - i),
                               load_some(sums + i, e->width - i)));
    }
}

static void embed(const struct encoding *p, const struct rows *rows, float *sums) {
    const struct encoder *e = p->in->encoder;
    const struct run *run = rows->run;
    for (long t = rows->first; t < rows->first + rows->count; ++t) {
        while (run->end <= t) ++run;
        const int task = run->start <= t ? run->task : -1;
        const long word = (long)p->in->ids[t] * e->width;
        const long added = (long)(e->added_by_task ? task + 1 : p->positions[t]) * e->width;
        for (long i = 0; i < e->width; i += LANES)
            store_some(sums + i, e->width - i,
                       load_stored(e->words, e->storage, word + i, e->width - i) +
                           load_stored(e->added, e->storage, added + i, e->width - i));
        if (task >= 0 && e->word_tasks) add_word_task(e, e->word_tasks + task, p->in->ids[t], sums);
        norm_rows(&e->norm, sums, 1, e->width, e->epsilon, p->in->hidden + t * e->width);
    }
}

/* Norm a row of elements in place. */
static void norm_elements(const struct norm *n, const struct encoder *e, element *x, float *sums) {
    for (long i = 0; i < e->width; i += LANES) store_some(sums + i, e->width - i, load_element(x + i, e->width - i));
    norm_rows(n, sums, 1, e->width, e->epsilon, x);
}

/* What comes before attention in one layer: query, key and value, with their norms and positions. */
static void project_qkv(const struct encoding *p, const struct encoder_layer *l, const struct rows *rows,
                        const struct encoder_buffers *b) {
    const struct encoder *e = p->in->encoder;
    const long stride = 3L * e->width, head_dim = e->width / e->heads;
    element *qkv = p->qkv + rows->first * stride;
    project(&l->query_key_value, rows, p->in->hidden + rows->first * e->width, b->low, qkv, stride);
    for (long r = 0; r < rows->count; ++r, qkv += stride) {
        if (l->query_norm.weight) norm_elements(&l->query_norm, e, qkv, b->sums);
        if (l->key_norm.weight) norm_elements(&l->key_norm, e, qkv + e->width, b->sums);
        if (!p->in->cosines) continue;
        const long angle = p->positions[rows->first + r] * (head_dim / 2);
        norm_rope_heads(qkv, 2L * e->heads, head_dim, NULL, 0.0f, p->in->cosines + angle, p->in->sines + angle);
    }
}

/* x = norm(norm of attention + x), for the sums of attention's output and x. */
static void norm_input_again(const struct encoder *e, const struct encoder_layer *l, float *sums, element *normed,
                             element *x) {
    norm_rows(&l->attention_norm, sums, 1, e->width, e->epsilon, normed);
    for (long i = 0; i < e->width; i += LANES) {
        const long n = e->width - i;
        store_some(sums + i, n, load_element(normed + i, n) + load_element(x + i, n));
    }
    norm_rows(&l->input_norm, sums, 1, e->width, e->epsilon, x);
}

/* What follows attention in one layer, for some rows. */
static void attention_output_and_mlp(const struct encoding *p, const struct encoder_layer *l, const struct rows *rows,
                                     const struct encoder_buffers *b) {
    const struct encoder *e = p->in->encoder;
    const long width = e->width;
    element *x = p->in->hidden + rows->first * width;
    project_add_fp32(&l->attention_output, rows, p->attended + rows->first * width, b->low, b->sums, width, x);
    if (l->input_norm.weight)
        for (long r = 0; r < rows->count; ++r)
            norm_input_again(e, l, b->sums + r * width, b->inner, x + r * width);
    else
        norm_rows(&l->attention_norm, b->sums, rows->count, width, e->epsilon, x);
    if (l->gate.weight)
        project_gated(&l->gate, &l->up, 1, rows, x, b->low, b->low_up, b->inner, l->up.out);
    else
        project_gelu(&l->up, rows, x, b->low, b->inner, e->inner);
    project_add_fp32(&l->down, rows, b->inner, b->low, b->sums, width, x);
    norm_rows(&l->output_norm, b->sums, rows->count, width, e->epsilon, x);
}

static long encoding_tasks(const void *context, int phase) {
    const struct encoding *p = context;
    return phase % 2 ? attention_tasks(&p->attention, 0) : (p->tokens + p->rows - 1) / p->rows;
}

static void encoding_task(const void *context, int phase, long task, int member) {
    const struct encoding *p = context;
    const struct encoder *e = p->in->encoder;
    if (phase % 2) {
        attention_task(&p->attention, 0, task, member);
        return;
    }
    struct encoder_buffers b;
    lay_encoder_out(e, &b, p->own + (size_t)member * p->own_size);
    const long first = task * p->rows;
    const struct rows rows = rows_of(first, least(p->tokens - first, p->rows), p->in->runs);
    const int layer = phase / 2; /* the layer whose projections come next */
    if (layer == 0)
        embed(p, &rows, b.sums);
    else
        attention_output_and_mlp(p, e->layer + layer - 1, &rows, &b);
    if (layer < e->layers) project_qkv(p, e->layer + layer, &rows, &b);
}

/* Do a pass with up to `members` threads. */
static void encode(const struct encoder_pass *in, char *scratch, int members) {
    const struct encoder *e = in->encoder;
    const long tokens = in->ends[in->items], width = e->width, head_dim = width / e->heads;
    struct encoder_buffers b;
    members = members_for(tokens, members);
    struct encoding p = {.in = in, .tokens = tokens};
    p.rows = fair_rows(tokens, members, BLOCK_ROWS);
    p.qkv = (element *)scratch;
    p.attended = p.qkv + tokens * width * 3;
    p.positions = (int32_t *)(p.attended + tokens * width);
    p.own_size = encoder_own_scratch(e);
    p.own = scratch + encoder_shared_scratch(e, tokens);
    for (long item = 0; item < in->items; ++item)
        for (int32_t t = in->ends[item]; t < in->ends[item + 1]; ++t) p.positions[t] = t - in->ends[item];
    p.form = (struct attention){
        .heads = e->heads,
        .key_heads = e->heads,
        .head_dim = (int32_t)head_dim,
        .query_stride = 3 * width,
        .key_stride = 3 * width,
        .out_stride = width,
        .scale = 1.0f / __builtin_sqrtf((float)head_dim),
        .slopes = e->slopes,
        .visible = in->visible,
    };
    p.attention = (struct attention_call){
        .form = &p.form,
        .query = p.qkv,
        .key = p.qkv + width,
        .value = p.qkv + 2 * width,
        .out = p.attended,
        .ends = in->ends,
        .items = in->items,
        .longest = in->longest,
        .scratch = p.own + lay_encoder_out(e, &b, NULL),
        .scratch_step = p.own_size,
    };
    struct job job = {.phases = 2 * e->layers + 1, .tasks = encoding_tasks, .run = encoding_task, .context = &p};
    work(&job, members);
}

#endif
