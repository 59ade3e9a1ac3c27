/* Products of matrices with fp32 sums, tile by tile.
 *
 * The right-hand side is packed in panels of PANEL columns. A panel has for each step of the product's inner
 * dimension PANEL numbers behind one another: of fp32 one column's number, of bf16 a word with those of a pair of
 * steps, (2p, 2p+1), as vdpbf16ps takes them. A tile of up to TILE_ROWS x PANEL results lives in registers while
 * the inner dimension runs.
 */
#ifndef SF_TILE_H
#define SF_TILE_H

#include "simd.h"

/* How the right-hand side is stored. Where elements are bf16 it is always bf16. */
enum storage { FP32, BF16 };

/* The vectors of a panel leave room for a row of them and one number of the left-hand side. */
#if defined(SET_AVX512) || defined(SET_NEON)
enum { VECTORS = 4 };
#else
enum { VECTORS = 2 };
#endif
enum { PANEL = VECTORS * LANES, TILE_ROWS = 6, AHEAD = 2048 / PANEL }; /* steps that are fetched ahead: 8 KiB */

/* How elements are stored, and what their number in an inner dimension must be a multiple of. */
#ifdef BF16_PRODUCTS
static const enum storage ELEMENTS = BF16;
enum { STEP = 2 };
#else
static const enum storage ELEMENTS = FP32;
enum { STEP = 1 };
#endif

INLINE long round_up(long n, long to) { return (n + to - 1) / to * to; }
INLINE long least(long a, long b) { return a < b ? a : b; }

/* Bytes of `columns` packed ones over an inner dimension of `depth`, which is even for bf16. */
INLINE size_t packed_bytes(long columns, long depth, enum storage storage) {
    return (size_t)round_up(columns, PANEL) * (size_t)depth * (storage == BF16 ? sizeof(bf16) : sizeof(float));
}

/* The panel that begins with column n, a multiple of PANEL. */
INLINE const void *panel_at(const void *packed, long n, long depth, enum storage storage) {
    return (const char *)packed + packed_bytes(n, depth, storage);
}

INLINE int32_t pair_at(const bf16 *p) {
    int32_t word;
    memcpy(&word, p, sizeof word);
    return word;
}

/* sum += the product of a[r][2p .. 2p+1] of `rows` rows, `stride` apart, and one step of a panel. */
#ifdef BF16_PRODUCTS
INLINE void step(const int rows, const int wide, const enum storage storage, const bf16 *low, const bf16 *high,
                 ptrdiff_t stride, const uint32_t *b, vec sum[TILE_ROWS][VECTORS]) {
    (void)storage;
    __m512bh column[VECTORS];
#pragma GCC unroll 4
    for (int w = 0; w < wide; ++w) column[w] = (__m512bh)_mm512_loadu_si512(b + LANES * w);
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
        const __m512bh x = (__m512bh)_mm512_set1_epi32(pair_at(r < 3 ? low + r * stride : high + (r - 3) * stride));
#pragma GCC unroll 4
        for (int w = 0; w < wide; ++w) sum[r][w] = _mm512_dpbf16_ps(sum[r][w], x, column[w]);
    }
}
#else
INLINE void add_products(const int rows, const int wide, const float *low, const float *high, ptrdiff_t stride,
                         const vec column[VECTORS], vec sum[TILE_ROWS][VECTORS]) {
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
        const vec x = splat(*(r < 3 ? low + r * stride : high + (r - 3) * stride));
#pragma GCC unroll 4
        for (int w = 0; w < wide; ++w) sum[r][w] = mul_add(x, column[w], sum[r][w]);
    }
}

INLINE void step(const int rows, const int wide, const enum storage storage, const float *low, const float *high,
                 ptrdiff_t stride, const uint32_t *b, vec sum[TILE_ROWS][VECTORS]) {
    vec column[VECTORS], next[VECTORS];
#pragma GCC unroll 4
    for (int w = 0; w < wide; ++w)
        if (storage == BF16)
            widen(b + LANES * w, column + w, next + w);
        else
            column[w] = load((const float *)b + LANES * w);
    add_products(rows, wide, low, high, stride, column, sum);
    if (storage == BF16) add_products(rows, wide, low + 1, high + 1, stride, next, sum);
}
#endif

/* c[r][0 .. LANES * wide) = a[r] . panel, `depth` long, or += it with `more`; rows, wide and storage are
 * compile-time constants. */
INLINE void tile_body(const int rows, const int wide, const enum storage storage, const element *a,
                      ptrdiff_t stride, const void *panel, long depth, int more, float *c,
                      ptrdiff_t c_stride) {
    vec sum[TILE_ROWS][VECTORS];
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int w = 0; w < wide; ++w) sum[r][w] = more ? load(c + r * c_stride + LANES * w) : zero();
    const long each = storage == BF16 ? 2 : 1;
    const element *low = a, *high = a + 3 * stride;
    const uint32_t *b = panel;
    for (long p = 0; p < depth; p += each) {
        /* Far enough ahead for weights that come from memory: 10 % for a lone short text. */
#pragma GCC unroll 4
        for (int w = 0; w < wide * LANES * 4; w += 64)
            __builtin_prefetch((const char *)(b + AHEAD * PANEL) + w, 0, 3);
        step(rows, wide, storage, low, high, stride, b, sum);
        low += each;
        high += each;
        b += PANEL;
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int w = 0; w < wide; ++w) store(c + r * c_stride + LANES * w, sum[r][w]);
}

typedef void tile_function(const element *, ptrdiff_t, const void *, long, int, float *, ptrdiff_t);

#define TILE(S, R, W)                                                                                           \
    static __attribute__((noinline)) void tile_##S##_##R##_##W(const element *a, ptrdiff_t stride, const void *b, \
                                                               long depth, int more, float *c,                  \
                                                               ptrdiff_t c_stride) {                            \
        tile_body(R, W, S, a, stride, b, depth, more, c, c_stride);                                             \
    }
#if defined(SET_AVX512) || defined(SET_NEON)
#define TILES(S, R) TILE(S, R, 1) TILE(S, R, 2) TILE(S, R, 3) TILE(S, R, 4)
#define ROW(S, R) {tile_##S##_##R##_1, tile_##S##_##R##_2, tile_##S##_##R##_3, tile_##S##_##R##_4}
#else
#define TILES(S, R) TILE(S, R, 1) TILE(S, R, 2)
#define ROW(S, R) {tile_##S##_##R##_1, tile_##S##_##R##_2}
#endif
#define ALL_TILES(S) TILES(S, 1) TILES(S, 2) TILES(S, 3) TILES(S, 4) TILES(S, 5) TILES(S, 6)
#define ROWS(S) {ROW(S, 1), ROW(S, 2), ROW(S, 3), ROW(S, 4), ROW(S, 5), ROW(S, 6)}

ALL_TILES(BF16)
#ifdef BF16_PRODUCTS
static tile_function *const TILE_OF[2][TILE_ROWS][VECTORS] = {[BF16] = ROWS(BF16)};
#else
ALL_TILES(FP32)
static tile_function *const TILE_OF[2][TILE_ROWS][VECTORS] = {[FP32] = ROWS(FP32), [BF16] = ROWS(BF16)};
#endif

/* Rows of the next tile when `left` remain: even tiles, since one of a single row wastes the multiplier. */
INLINE long tile_rows(long left) {
    const long tiles = (left + TILE_ROWS - 1) / TILE_ROWS;
    return (left + tiles - 1) / tiles;
}

/* One tile of `rows` <= TILE_ROWS by `columns` <= PANEL into c, rounded up to whole vectors of columns; added to what
 * is there with `more`. */
INLINE void tile(const element *a, ptrdiff_t stride, long rows, const void *panel, enum storage storage,
                 long columns, long depth, int more, float *c, ptrdiff_t c_stride) {
    TILE_OF[storage][rows - 1][(columns + LANES - 1) / LANES - 1](a, stride, panel, depth, more, c, c_stride);
}

/* Pack a linear layer's weight (columns, depth) of fp32 or bf16 without changing its numbers. */
static void pack_weight(const void *source, long columns, long depth, enum storage storage, void *packed) {
    for (long first = 0; first < columns; first += PANEL)
        for (long j = 0; j < PANEL; ++j) {
            const long n = first + j;
            if (storage == BF16) {
                const bf16 *row = (const bf16 *)source + n * depth;
                uint32_t *out = (uint32_t *)packed + first * (depth / 2) + j;
                for (long p = 0; p < depth / 2; ++p) out[p * PANEL] = n < columns ? (uint32_t)pair_at(row + 2 * p) : 0;
            } else {
                const float *row = (const float *)source + n * depth;
                float *out = (float *)packed + first * depth + j;
                for (long p = 0; p < depth; ++p) out[p * PANEL] = n < columns ? row[p] : 0.0f;
            }
        }
}

#ifdef BF16_PRODUCTS
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
static void pack_keys(const bf16 *key, ptrdiff_t stride, long length, long head_dim, void *packed) {
    const long pairs = head_dim / 2;
    for (long j = 0; j < length; j += 16) {
        uint32_t *column = (uint32_t *)packed + (j / PANEL) * PANEL * pairs + j % PANEL;
        for (long p = 0; p < pairs; p += 16) {
            __m512i rows[16];
            for (int i = 0; i < 16; ++i)
                rows[i] = j + i < length ? _mm512_maskz_loadu_epi32(lanes(pairs - p), key + (j + i) * stride + 2 * p)
                                         : _mm512_setzero_si512();
            transpose_words(rows);
            for (int i = 0; i < 16 && p + i < pairs; ++i) _mm512_storeu_si512(column + (p + i) * PANEL, rows[i]);
        }
    }
}

/* Values (length, head_dim) as the right-hand side of weight . value: pairs of neighbouring keys. */
static void pack_values(const bf16 *value, ptrdiff_t stride, long length, long head_dim, void *packed) {
    const long pairs = (length + 1) / 2;
    for (long d = 0; d < head_dim; d += 16) {
        const __mmask16 mask = lanes(head_dim - d);
        uint32_t *column = (uint32_t *)packed + (d / PANEL) * PANEL * pairs + d % PANEL;
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
#else
/* Keys (length, head_dim) as the right-hand side of query . key: columns are keys. */
static void pack_keys(const float *key, ptrdiff_t stride, long length, long head_dim, void *packed) {
    for (long first = 0; first < length; first += PANEL) {
        float *out = (float *)packed + first * head_dim;
        const long columns = least(length - first, PANEL);
        for (long d = 0; d < head_dim; ++d) {
            for (long j = 0; j < columns; ++j) out[d * PANEL + j] = key[(first + j) * stride + d];
            for (long j = columns; j < PANEL; ++j) out[d * PANEL + j] = 0.0f;
        }
    }
}

/* Values (length, head_dim) as the right-hand side of weight . value. */
static void pack_values(const float *value, ptrdiff_t stride, long length, long head_dim, void *packed) {
    for (long d = 0; d < head_dim; d += LANES) {
        float *out = (float *)packed + d / PANEL * PANEL * length + d % PANEL;
        for (long k = 0; k < length; ++k) store(out + k * PANEL, load_some(value + k * stride + d, head_dim - d));
    }
}
#endif

#endif
