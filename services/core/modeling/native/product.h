/* Products of bf16 matrices with fp32 sums.
 *
 * The right-hand side is packed in panels of 64 columns: for each pair of rows (2p, 2p+1) of the product's
 * inner dimension, 64 words that hold the two bf16 of one column, as vdpbf16ps takes them. A tile of up to
 * 6 x 64 results lives in 24 registers while the inner dimension runs.
 */
#ifndef SF_PRODUCT_H
#define SF_PRODUCT_H

#include "vector.h"

enum { PANEL = 64, TILE_ROWS = 6, AHEAD = 32 };

/* Words of a packed right-hand side of `columns` over an inner dimension of 2 * pairs. */
INLINE size_t packed_words(long columns, long pairs) {
    return (size_t)((columns + PANEL - 1) / PANEL) * PANEL * (size_t)pairs;
}

INLINE int32_t pair_at(const bf16 *p) {
    int32_t word;
    memcpy(&word, p, sizeof word);
    return word;
}

/* c[r][0 .. 16 * wide) = sum over p of a[r][2p .. 2p+1] . b[p]; rows and wide are compile-time constants. */
INLINE void tile_body(const int rows, const int wide, const bf16 *a, ptrdiff_t stride, const uint32_t *b,
                      long pairs, float *c, ptrdiff_t c_stride) {
    __m512 sum[TILE_ROWS][4];
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int w = 0; w < wide; ++w) sum[r][w] = _mm512_setzero_ps();
    const bf16 *low = a, *high = a + 3 * stride;
    for (long p = 0; p < pairs; ++p) {
        __m512bh column[4];
        /* Far enough ahead for weights that come from memory: 10 % for a lone short text. */
#pragma GCC unroll 4
        for (int w = 0; w < wide; ++w) _mm_prefetch((const char *)(b + AHEAD * PANEL + 16 * w), _MM_HINT_T0);
#pragma GCC unroll 4
        for (int w = 0; w < wide; ++w) column[w] = (__m512bh)_mm512_loadu_si512(b + 16 * w);
#pragma GCC unroll 6
        for (int r = 0; r < rows; ++r) {
            const bf16 *row = r < 3 ? low + r * stride : high + (r - 3) * stride;
            const __m512bh x = (__m512bh)_mm512_set1_epi32(pair_at(row));
#pragma GCC unroll 4
            for (int w = 0; w < wide; ++w) sum[r][w] = _mm512_dpbf16_ps(sum[r][w], x, column[w]);
        }
        low += 2;
        high += 2;
        b += PANEL;
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int w = 0; w < wide; ++w) _mm512_storeu_ps(c + r * c_stride + 16 * w, sum[r][w]);
}

#define TILE(R, W)                                                                                           \
    static __attribute__((noinline)) void tile_##R##_##W(const bf16 *a, ptrdiff_t stride, const uint32_t *b, \
                                                         long pairs, float *c, ptrdiff_t c_stride) {         \
        tile_body(R, W, a, stride, b, pairs, c, c_stride);                                                   \
    }
#define TILES(R) TILE(R, 1) TILE(R, 2) TILE(R, 3) TILE(R, 4)
TILES(1) TILES(2) TILES(3) TILES(4) TILES(5) TILES(6)

typedef void tile_function(const bf16 *, ptrdiff_t, const uint32_t *, long, float *, ptrdiff_t);

#define ROW(R) {tile_##R##_1, tile_##R##_2, tile_##R##_3, tile_##R##_4}
static tile_function *const TILE_OF[TILE_ROWS][4] = {ROW(1), ROW(2), ROW(3), ROW(4), ROW(5), ROW(6)};

/* Rows of the next tile when `left` remain: even tiles, since one of a single row wastes the multiplier. */
INLINE long tile_rows(long left) {
    const long tiles = (left + TILE_ROWS - 1) / TILE_ROWS;
    return (left + tiles - 1) / tiles;
}

/* One tile of `rows` <= 6 by `columns` <= 64 into c, rounded up to whole vectors of columns. */
INLINE void tile(const bf16 *a, ptrdiff_t stride, long rows, const uint32_t *b, long columns, long pairs,
                 float *c, ptrdiff_t c_stride) {
    TILE_OF[rows - 1][(columns + 15) / 16 - 1](a, stride, b, pairs, c, c_stride);
}

/* Pack bf16 (columns, 2 * pairs), the form of a linear layer's weight, rows `stride` apart. */
static void pack_rows(const bf16 *source, ptrdiff_t stride, long columns, long pairs, uint32_t *out) {
    for (long first = 0; first < columns; first += PANEL) {
        for (long j = 0; j < PANEL; ++j) {
            const bf16 *row = source + (first + j) * stride;
            for (long p = 0; p < pairs; ++p)
                out[p * PANEL + j] = first + j < columns ? (uint32_t)pair_at(row + 2 * p) : 0;
        }
        out += pairs * PANEL;
    }
}

#endif
