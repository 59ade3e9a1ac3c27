/* Attention inside each text of a packed batch, without padding and without a bias table. */
#ifndef SF_ATTENTION_H
#define SF_ATTENTION_H

#include "product.h"
#include "team.h"

enum { QUERY_ROWS = 12 };

struct attention {
    int32_t heads, key_heads, head_dim, causal;
    int64_t query_stride, key_stride, out_stride; /* elements from token to token */
    float scale;
    const float *slopes; /* ALiBi, one per head, or null */
};

INLINE long round_up(long n, long to) { return (n + to - 1) / to * to; }

/* Bytes of scratch of one thread for texts of up to `longest` tokens. */
static size_t attention_scratch(int head_dim, long longest) {
    const long keys = round_up(longest, PANEL);
    const size_t bytes = (packed_words(keys, head_dim / 2) + packed_words(head_dim, keys / 2)) * 4 +
                         (size_t)QUERY_ROWS * (size_t)(keys * 6 + round_up(head_dim, PANEL) * 4);
    return (size_t)round_up((long)bytes, 64);
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

/* Scores of one query to weights e^(s - max) in bf16; keys in [visible, padded) get zero. Returns 1 / sum. */
INLINE float softmax_row(float *score, long visible, long padded, float scale, float slope, long query,
                         bf16 *weight) {
    const __m512 factor = _mm512_set1_ps(scale), slant = _mm512_set1_ps(-slope);
    const __m512 step = _mm512_set1_ps(16.0f), lowest = _mm512_set1_ps(-3.0e38f);
    const __m512 first = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512 distance = _mm512_sub_ps(first, _mm512_set1_ps((float)query));
    __m512 most = lowest;
    for (long j = 0; j < visible; j += 16) {
        __m512 s = _mm512_mul_ps(_mm512_loadu_ps(score + j), factor);
        if (slope != 0.0f) {
            s = _mm512_fmadd_ps(_mm512_abs_ps(distance), slant, s);
            distance = _mm512_add_ps(distance, step);
        }
        s = _mm512_mask_blend_ps(lanes(visible - j), lowest, s);
        _mm512_storeu_ps(score + j, s);
        most = _mm512_max_ps(most, s);
    }
    const __m512 peak = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    __m512 sum = _mm512_setzero_ps();
    for (long j = 0; j < visible; j += 16) {
        const __m512 e = _mm512_maskz_mov_ps(lanes(visible - j),
                                             exponential(_mm512_sub_ps(_mm512_loadu_ps(score + j), peak)));
        sum = _mm512_add_ps(sum, e);
        store_bf16(weight + j, 0xffff, e);
    }
    for (long j = round_up(visible, 16); j < padded; j += 16) store_bf16(weight + j, 0xffff, _mm512_setzero_ps());
    return 1.0f / _mm512_reduce_add_ps(sum);
}

struct attention_buffers {
    uint32_t *keys, *values;
    float *scores, *sums;
    bf16 *weights;
    long padded;
};

static struct attention_buffers attention_buffers(void *scratch, int head_dim, long longest) {
    struct attention_buffers b = {.padded = round_up(longest, PANEL)};
    b.keys = scratch;
    b.values = b.keys + packed_words(b.padded, head_dim / 2);
    b.scores = (float *)(b.values + packed_words(head_dim, b.padded / 2));
    b.sums = b.scores + QUERY_ROWS * b.padded;
    b.weights = (bf16 *)(b.sums + QUERY_ROWS * round_up(head_dim, PANEL));
    return b;
}

/* Queries [start, start + rows) of one head of one text, its keys and values being packed. */
static void attend_rows(const struct attention *t, const bf16 *query, bf16 *out, long start, long rows,
                        long length, float slope, const struct attention_buffers *b) {
    const long pairs = t->head_dim / 2, visible = t->causal ? start + rows : length;
    const long value_pairs = (length + 1) / 2, used_pairs = (visible + 1) / 2;
    float inverse[QUERY_ROWS];
    for (long r = 0; r < rows;) {
        const long step = tile_rows(rows - r);
        for (long j = 0; j < visible; j += PANEL)
            tile(query + (start + r) * t->query_stride, t->query_stride, step, b->keys + j * pairs,
                 visible - j < PANEL ? visible - j : PANEL, pairs, b->scores + r * b->padded + j, b->padded);
        r += step;
    }
    for (long r = 0; r < rows; ++r)
        inverse[r] = softmax_row(b->scores + r * b->padded, t->causal ? start + r + 1 : length,
                                 2 * used_pairs, t->scale, slope, start + r, b->weights + r * b->padded);
    for (long d = 0; d < t->head_dim; d += PANEL) {
        const long wide = t->head_dim - d < PANEL ? t->head_dim - d : PANEL;
        for (long r = 0; r < rows;) {
            const long step = tile_rows(rows - r);
            tile(b->weights + r * b->padded, b->padded, step, b->values + d * value_pairs, wide, used_pairs,
                 b->sums + r * PANEL, PANEL);
            r += step;
        }
        for (long r = 0; r < rows; ++r)
            for (long i = 0; i < wide; i += 16)
                store_bf16(out + (start + r) * t->out_stride + d + i, lanes(wide - i),
                           _mm512_mul_ps(_mm512_loadu_ps(b->sums + r * PANEL + i), _mm512_set1_ps(inverse[r])));
    }
}

/* One head of keys of one text, with all the query heads that share it. */
static void attend_head(const struct attention *t, const bf16 *query, const bf16 *key, const bf16 *value, bf16 *out,
                        long first, long length, int key_head, const struct attention_buffers *b) {
    const int shared = t->heads / t->key_heads;
    const long at = first * t->key_stride + (long)key_head * t->head_dim;
    pack_keys(key + at, t->key_stride, length, t->head_dim, b->keys);
    pack_values(value + at, t->key_stride, length, t->head_dim, b->values);
    for (int head = key_head * shared; head < (key_head + 1) * shared; ++head) {
        const bf16 *q = query + first * t->query_stride + (long)head * t->head_dim;
        bf16 *o = out + first * t->out_stride + (long)head * t->head_dim;
        for (long start = 0; start < length; start += QUERY_ROWS)
            attend_rows(t, q, o, start, length - start < QUERY_ROWS ? length - start : QUERY_ROWS, length,
                        t->slopes ? t->slopes[head] : 0.0f, b);
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

static long attention_tasks(const void *context, int phase) {
    (void)phase;
    const struct attention_call *c = context;
    return c->items * c->form->key_heads;
}

static void attention_task(const void *context, int phase, long task, int member) {
    (void)phase;
    const struct attention_call *c = context;
    const long item = task / c->form->key_heads, first = c->ends[item], length = c->ends[item + 1] - first;
    const struct attention_buffers b =
        attention_buffers(c->scratch + (size_t)member * c->scratch_step, c->form->head_dim, c->longest);
    attend_head(c->form, c->query, c->key, c->value, c->out, first, length, (int)(task % c->form->key_heads), &b);
}

#endif
