/* A pre-norm decoder (Qwen2, Qwen3, EuroBERT) with task adapters, from token ids to hidden states in one call. */
#ifndef SF_DECODER_H
#define SF_DECODER_H

#include "attention.h"
#include "linear.h"
#include "rope.h"

struct decoder_layer {
    struct linear query, key, value, attention_output, gate, up, down;
    const float *attention_norm, *mlp_norm, *query_norm, *key_norm; /* those of heads may be null */
    int64_t window;
};

struct decoder {
    int32_t width, heads, key_heads, head_dim, inner, layers, rank, causal, storage;
    float epsilon;
    const void *words; /* (vocabulary, width) as stored */
    const float *norm;
    const struct decoder_layer *layer;
};

/* What a pass is given. `requested` are the rows whose last states are asked for, `requested_runs` count
 * by them. */
struct decoder_pass {
    const struct decoder *decoder;
    const int32_t *ids, *positions, *ends, *requested; /* `requested` is null for all rows */
    const float *cosines, *sines;                   /* (positions, head_dim / 2) */
    const struct run *runs, *requested_runs;
    const int32_t *inserted_rows; /* of each token its row in `inserted`, -1 for that of its id; may be null */
    const element *inserted;      /* (rows, width) */
    int64_t items, longest, tokens, requested_count;
    element *hidden, *qkv, *attended; /* (tokens, width), all heads of a token, query heads of a token */
};

struct decoding {
    const struct decoder_pass *in;
    struct attention_call attention;
    long rows; /* of a task */
    char *own; /* scratch of member 0, the others behind it */
    size_t own_size;
};

struct row_buffers {
    element *normed, *states, *inner, *low, *low_up;
};

static size_t lay_rows_out(const struct decoder *d, struct row_buffers *b, void *scratch) {
    const long queries = (long)d->heads * d->head_dim, inner = d->inner > queries ? d->inner : queries;
    b->normed = scratch;
    b->states = b->normed + BLOCK_ROWS * (long)d->width;
    b->inner = b->states + BLOCK_ROWS * (long)d->width;
    b->low = b->inner + BLOCK_ROWS * inner;
    b->low_up = b->low + BLOCK_ROWS * (long)d->rank;
    return (size_t)round_up((char *)(b->low_up + BLOCK_ROWS * (long)d->rank) - (char *)scratch, 64);
}

/* Bytes of scratch of one thread. */
static size_t decoder_scratch(const struct decoder *d) {
    struct row_buffers b;
    return lay_rows_out(d, &b, NULL) + attention_scratch(d->head_dim, d->heads / d->key_heads);
}

static void embed_word(const struct decoder *d, long id, element *x) {
    for (long i = 0; i < d->width; i += LANES)
        store_element(x + i, d->width - i, load_stored(d->words, d->storage, id * d->width + i, d->width - i));
}

static void embed_token(const struct decoding *p, long token, element *x) {
    const struct decoder *d = p->in->decoder;
    const long row = p->in->inserted_rows ? p->in->inserted_rows[token] : -1;
    if (row < 0)
        embed_word(d, p->in->ids[token], x);
    else
        memcpy(x, p->in->inserted + row * d->width, sizeof(element) * (size_t)d->width);
}

static void rms_rows(const float *weight, const element *x, long rows, long width, float epsilon, element *out) {
    for (long r = 0; r < rows; ++r) {
        const vec scale = splat(rms_scale(x + r * width, width, epsilon));
        for (long i = 0; i < width; i += LANES) {
            const long n = width - i;
            const vec gain = scale * load_some(weight + i, n);
            store_element(out + r * width + i, n, load_element(x + r * width + i, n) * gain);
        }
    }
}

/* What comes before attention in one layer: query, key and value of some rows, with their positions. */
static void norm_and_project_qkv(const struct decoding *p, const struct decoder_layer *l, const struct rows *rows,
                                 const struct row_buffers *b) {
    const struct decoder *d = p->in->decoder;
    const long stride = p->attention.form->query_stride, half = d->head_dim / 2;
    element *query = p->in->qkv + rows->first * stride;
    element *key = query + (long)d->heads * d->head_dim, *value = key + (long)d->key_heads * d->head_dim;
    rms_rows(l->attention_norm, p->in->hidden + rows->first * d->width, rows->count, d->width, d->epsilon, b->normed);
    project(&l->query, rows, b->normed, b->low, query, stride);
    project(&l->key, rows, b->normed, b->low, key, stride);
    project(&l->value, rows, b->normed, b->low, value, stride);
    for (long r = 0; r < rows->count; ++r) {
        const long angle = p->in->positions[rows->first + r] * half;
        const float *cosines = p->in->cosines + angle, *sines = p->in->sines + angle;
        norm_rope_heads(query + r * stride, d->heads, d->head_dim, l->query_norm, d->epsilon, cosines, sines);
        norm_rope_heads(key + r * stride, d->key_heads, d->head_dim, l->key_norm, d->epsilon, cosines, sines);
    }
}

/* What follows attention in one layer; `x` are the rows' states, changed in place. */
static void decoder_attention_output_and_mlp(const struct decoder *d, const struct decoder_layer *l,
                                             const struct rows *rows, const element *attended, element *x,
                                             const struct row_buffers *b) {
    project_add(&l->attention_output, rows, attended, b->low, x, d->width);
    rms_rows(l->mlp_norm, x, rows->count, d->width, d->epsilon, b->normed);
    project_gated(&l->gate, &l->up, 0, rows, b->normed, b->low, b->low_up, b->inner, l->up.out);
    project_add(&l->down, rows, b->inner, b->low, x, d->width);
}

/* The last layer and the last norm, in place; states of rows that nobody asked for stay those of the layer before. */
static void finish_rows(const struct decoding *p, const struct rows *rows, const struct row_buffers *b) {
    const struct decoder *d = p->in->decoder;
    const long queries = (long)d->heads * d->head_dim;
    const int32_t *requested = p->in->requested ? p->in->requested + rows->first : NULL;
    const size_t row = sizeof(element) * (size_t)d->width;
    element *x = requested ? b->states : p->in->hidden + rows->first * d->width;
    for (long r = 0; requested && r < rows->count; ++r) {
        memcpy(x + r * d->width, p->in->hidden + (long)requested[r] * d->width, row);
        memcpy(b->inner + r * queries, p->in->attended + requested[r] * queries, sizeof(element) * (size_t)queries);
    }
    decoder_attention_output_and_mlp(d, d->layer + d->layers - 1, rows,
                           requested ? b->inner : p->in->attended + rows->first * queries, x, b);
    rms_rows(d->norm, x, rows->count, d->width, d->epsilon, x);
    for (long r = 0; requested && r < rows->count; ++r)
        memcpy(p->in->hidden + (long)requested[r] * d->width, x + r * d->width, row);
}

static long decoding_tasks(const void *context, int phase) {
    const struct decoding *p = context;
    if (phase % 2) return attention_tasks(&p->attention, 0);
    const long rows = phase == 2 * p->in->decoder->layers ? p->in->requested_count : p->in->tokens;
    return (rows + p->rows - 1) / p->rows;
}

static void attend_layer(const struct decoding *p, const struct decoder_layer *l, long task, int member) {
    struct attention form = *p->attention.form;
    struct attention_call call = p->attention;
    form.window = l->window;
    call.form = &form;
    attention_task(&call, 0, task, member);
}

/* Phase 0 embeds and opens the first layer, then two phases a layer: attention, and the rest with the opening of
 * the next. */
static void decoding_task(const void *context, int phase, long task, int member) {
    const struct decoding *p = context;
    const struct decoder *d = p->in->decoder;
    const int layer = phase / 2, last = layer == d->layers;
    if (phase % 2) {
        attend_layer(p, d->layer + layer, task, member);
        return;
    }
    struct row_buffers b;
    lay_rows_out(d, &b, p->own + (size_t)member * p->own_size);
    const long first = task * p->rows, all = last ? p->in->requested_count : p->in->tokens;
    const struct rows rows = rows_of(first, least(all - first, p->rows), last ? p->in->requested_runs : p->in->runs);
    if (last) {
        finish_rows(p, &rows, &b);
        return;
    }
    element *x = p->in->hidden + rows.first * d->width;
    if (layer == 0)
        for (long r = 0; r < rows.count; ++r)
            embed_token(p, rows.first + r, x + r * d->width);
    else
        decoder_attention_output_and_mlp(d, d->layer + layer - 1, &rows,
                               p->in->attended + rows.first * d->heads * d->head_dim, x, &b);
    norm_and_project_qkv(p, d->layer + layer, &rows, &b);
}

/* Do a pass with up to `members` threads. */
static void decode(const struct decoder_pass *in, char *scratch, int members) {
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
    struct decoding p = {.in = in, .own = scratch, .own_size = decoder_scratch(d)};
    p.rows = fair_rows(in->tokens, members, BLOCK_ROWS);
    p.attention = (struct attention_call){
        .form = &form,
        .query = in->qkv,
        .key = in->qkv + queries,
        .value = in->qkv + queries + keys,
        .out = in->attended,
        .ends = in->ends,
        .items = in->items,
        .longest = in->longest,
        .scratch = scratch + lay_rows_out(d, &b, NULL),
        .scratch_step = p.own_size,
    };
    struct job job = {.phases = 2 * d->layers + 1, .tasks = decoding_tasks, .run = decoding_task, .context = &p};
    work(&job, members);
}

#endif
