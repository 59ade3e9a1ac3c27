/* A task adapter alone: y += (x A^T) B, for products that were made elsewhere. */
#ifndef SF_LORA_H
#define SF_LORA_H

#include "simd.h"

enum { LORA_ROWS = 4, LORA_RANK = 64 };

/* sum[r] = x[r] . a, `into` long. */
INLINE void dot_rows(const element *x, long rows, long into, const element *a, vec sum[LORA_ROWS]) {
    for (long r = 0; r < rows; ++r) sum[r] = zero();
#ifdef BF16_PRODUCTS
    for (long i = 0; i < into; i += 32) {
        const __mmask32 mask = into - i < 32 ? (1u << (into - i)) - 1 : 0xffffffffu;
        const __m512bh b = (__m512bh)_mm512_maskz_loadu_epi16(mask, a + i);
        for (long r = 0; r < rows; ++r)
            sum[r] = _mm512_dpbf16_ps(sum[r], b, (__m512bh)_mm512_maskz_loadu_epi16(mask, x + r * into + i));
    }
#else
    for (long i = 0; i < into; i += LANES)
        for (long r = 0; r < rows; ++r)
            sum[r] = mul_add(load_some(a + i, into - i), load_some(x + r * into + i, into - i), sum[r]);
#endif
}

INLINE void lora_rows(const element *x, long rows, long into, const element *a, const element *b, long rank, long out,
                      int under_gelu, element *y) {
    float low[LORA_ROWS][LORA_RANK];
    vec sum[LORA_ROWS];
    for (long k = 0; k < rank; ++k) {
        dot_rows(x, rows, into, a + k * into, sum);
        for (long r = 0; r < rows; ++r) low[r][k] = sum_of(sum[r]);
    }
    for (long i = 0; i < out; i += LANES) {
        const long n = out - i;
        for (long r = 0; r < rows; ++r) sum[r] = load_element(y + r * out + i, n);
        for (long k = 0; k < rank; ++k) {
            const vec column = load_element(b + k * out + i, n);
            for (long r = 0; r < rows; ++r) sum[r] = mul_add(splat(low[r][k]), column, sum[r]);
        }
        for (long r = 0; r < rows; ++r) store_element(y + r * out + i, n, under_gelu ? gelu(sum[r]) : sum[r]);
    }
}

/* All of `rows`; the common number of them is a constant, so that their sums stay in registers. */
static void lora(const element *x, long rows, long into, const element *a, const element *b, long rank, long out,
                 int under_gelu, element *y) {
    for (; rows >= LORA_ROWS; rows -= LORA_ROWS, x += LORA_ROWS * into, y += LORA_ROWS * out)
        lora_rows(x, LORA_ROWS, into, a, b, rank, out, under_gelu, y);
    for (; rows > 0; --rows, x += into, y += out) lora_rows(x, 1, into, a, b, rank, out, under_gelu, y);
}

#endif
