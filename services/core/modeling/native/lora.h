/* What a task adapter of low rank adds to a product: y += (x . down) . up, for a few rows at a time. */
#ifndef SF_LORA_H
#define SF_LORA_H

#include "vector.h"

enum { LORA_ROWS = 4, LORA_RANK = 64 };

/* low[r][k] = x[r] . down[k], for up to LORA_ROWS rows of `into`. */
INLINE void lora_down(const bf16 *x, long rows, long into, const bf16 *down, long rank,
                      float low[LORA_ROWS][LORA_RANK]) {
    for (long k = 0; k < rank; ++k) {
        __m512 sum[LORA_ROWS];
        for (long r = 0; r < rows; ++r) sum[r] = _mm512_setzero_ps();
        for (long i = 0; i < into; i += 32) {
            const __mmask32 mask = into - i < 32 ? (1u << (into - i)) - 1 : 0xffffffffu;
            const __m512bh a = (__m512bh)_mm512_maskz_loadu_epi16(mask, down + k * into + i);
            for (long r = 0; r < rows; ++r)
                sum[r] = _mm512_dpbf16_ps(sum[r], a, (__m512bh)_mm512_maskz_loadu_epi16(mask, x + r * into + i));
        }
        for (long r = 0; r < rows; ++r) low[r][k] = _mm512_reduce_add_ps(sum[r]);
    }
}

/* y[r] += low[r] . up, under GELU if asked for. */
INLINE void lora_up(const float low[LORA_ROWS][LORA_RANK], long rows, long rank, const bf16 *up, long out,
                    int under_gelu, bf16 *y) {
    for (long i = 0; i < out; i += 16) {
        const __mmask16 mask = lanes(out - i);
        __m512 sum[LORA_ROWS];
        for (long r = 0; r < rows; ++r) sum[r] = load_bf16(y + r * out + i, mask);
        for (long k = 0; k < rank; ++k) {
            const __m512 b = load_bf16(up + k * out + i, mask);
            for (long r = 0; r < rows; ++r) sum[r] = _mm512_fmadd_ps(_mm512_set1_ps(low[r][k]), b, sum[r]);
        }
        for (long r = 0; r < rows; ++r) store_bf16(y + r * out + i, mask, under_gelu ? gelu(sum[r]) : sum[r]);
    }
}

INLINE void lora_rows(const bf16 *x, long rows, long into, const bf16 *down, const bf16 *up, long rank, long out,
                      int under_gelu, bf16 *y) {
    float low[LORA_ROWS][LORA_RANK];
    lora_down(x, rows, into, down, rank, low);
    lora_up(low, rows, rank, up, out, under_gelu, y);
}

/* All of `rows`; the common number of them is a constant, so that their sums stay in registers. */
static void lora(const bf16 *x, long rows, long into, const bf16 *down, const bf16 *up, long rank, long out,
                 int under_gelu, bf16 *y) {
    for (; rows >= LORA_ROWS; rows -= LORA_ROWS, x += LORA_ROWS * into, y += LORA_ROWS * out)
        lora_rows(x, LORA_ROWS, into, down, up, rank, out, under_gelu, y);
    for (; rows > 0; --rows, x += into, y += out) lora_rows(x, 1, into, down, up, rank, out, under_gelu, y);
}

#endif
