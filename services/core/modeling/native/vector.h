/* AVX-512 helpers: bf16 conversion, exponential, activations, norms. */
#ifndef SF_VECTOR_H
#define SF_VECTOR_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

#define INLINE static inline __attribute__((always_inline))

/* Lanes [0, n) of 16; n may be 16 or more. */
INLINE __mmask16 lanes(long n) { return n >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << n) - 1); }

/* Lanes [from, to) of 16; either may lie outside. */
INLINE __mmask16 between(long from, long to) {
    return lanes(to < 0 ? 0 : to) & (__mmask16)~lanes(from < 0 ? 0 : from);
}

INLINE __m512 load_bf16(const bf16 *p, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}

INLINE void store_bf16(bf16 *p, __mmask16 mask, __m512 x) {
    _mm256_mask_storeu_epi16(p, mask, (__m256i)_mm512_cvtneps_pbh(x));
}

/* 2^t for t <= 127, relative error 4e-6; below -126 the result fades to zero. */
INLINE __m512 power_of_two(__m512 t) {
    const __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_sub_ps(t, n);
    __m512 p = _mm512_set1_ps(1.339887440e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.618437357e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.550332548e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.402264791e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931472057e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

/* e^x for x <= 88. */
INLINE __m512 exponential(__m512 x) { return power_of_two(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f))); }

/* x * Phi(x), the erf form of GELU, with Phi - 1/2 as an odd polynomial on [-4.5, 4.5]: absolute error 7e-6
 * there, and x * 4e-6 beyond, far below the steps of bf16. */
INLINE __m512 gelu(__m512 x) {
    static const float c[] = {
        -1.400068646e-12f, 1.697305074e-10f, -9.193754202e-09f, 2.958900041e-07f, -6.365257832e-06f,
        9.787137969e-05f, -1.122678630e-03f, 9.833185002e-03f, -6.633705646e-02f, 3.988837898e-01f,
    };
    const __m512 edge = _mm512_set1_ps(4.5f);
    const __m512 y = _mm512_max_ps(_mm512_min_ps(x, edge), _mm512_sub_ps(_mm512_setzero_ps(), edge));
    const __m512 u = _mm512_mul_ps(y, y);
    __m512 p = _mm512_set1_ps(c[0]);
    for (int i = 1; i < 10; ++i) p = _mm512_fmadd_ps(p, u, _mm512_set1_ps(c[i]));
    return _mm512_mul_ps(x, _mm512_fmadd_ps(p, y, _mm512_set1_ps(0.5f)));
}

/* x / (1 + e^-x). */
INLINE __m512 silu(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f), fade = exponential(_mm512_sub_ps(_mm512_setzero_ps(), x));
    return _mm512_div_ps(x, _mm512_add_ps(one, fade));
}

/* 1 / sqrt(mean of squares + epsilon) of one row. */
INLINE float rms_scale(const bf16 *x, long width, float epsilon) {
    __m512 sum = _mm512_setzero_ps();
    for (long i = 0; i < width; i += 16) {
        const __m512 part = load_bf16(x + i, lanes(width - i));
        sum = _mm512_fmadd_ps(part, part, sum);
    }
    return 1.0f / __builtin_sqrtf(_mm512_reduce_add_ps(sum) / (float)width + epsilon);
}

/* Layer norm of one fp32 row of `width` into bf16; `width` is a multiple of 16. */
INLINE void layer_norm(const float *x, long width, const float *weight, const float *bias, float epsilon,
                       bf16 *out) {
    __m512 sum = _mm512_setzero_ps();
    for (long i = 0; i < width; i += 16) sum = _mm512_add_ps(sum, _mm512_loadu_ps(x + i));
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / (float)width);
    __m512 square = _mm512_setzero_ps();
    for (long i = 0; i < width; i += 16) {
        const __m512 d = _mm512_sub_ps(_mm512_loadu_ps(x + i), mean);
        square = _mm512_fmadd_ps(d, d, square);
    }
    const float variance = _mm512_reduce_add_ps(square) / (float)width;
    const __m512 scale = _mm512_set1_ps(1.0f / __builtin_sqrtf(variance + epsilon));
    for (long i = 0; i < width; i += 16) {
        const __m512 d = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(x + i), mean), scale);
        store_bf16(out + i, 0xffff, _mm512_fmadd_ps(d, _mm512_loadu_ps(weight + i), _mm512_loadu_ps(bias + i)));
    }
}

#endif
