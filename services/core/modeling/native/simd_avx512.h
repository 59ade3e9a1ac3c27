/* Vectors of AVX-512. */
#include <immintrin.h>

enum { LANES = 16 };

typedef __m512 vec;

/* Lanes [0, n); n may be 16 or more. */
INLINE __mmask16 lanes(long n) { return n >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << n) - 1); }

INLINE vec splat(float x) { return _mm512_set1_ps(x); }
INLINE vec zero(void) { return _mm512_setzero_ps(); }
INLINE vec places(void) { return _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0); }
INLINE vec load(const float *p) { return _mm512_loadu_ps(p); }
INLINE vec load_some(const float *p, long n) { return _mm512_maskz_loadu_ps(lanes(n), p); }
INLINE void store(float *p, vec x) { _mm512_storeu_ps(p, x); }
INLINE void store_some(float *p, long n, vec x) { _mm512_mask_storeu_ps(p, lanes(n), x); }
INLINE vec mul_add(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vec neg_mul_add(vec a, vec b, vec c) { return _mm512_fnmadd_ps(a, b, c); }
INLINE vec larger(vec a, vec b) { return _mm512_max_ps(a, b); }
INLINE vec smaller(vec a, vec b) { return _mm512_min_ps(a, b); }
INLINE vec magnitude(vec x) { return _mm512_abs_ps(x); }
INLINE vec nearest(vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vec times_power(vec x, vec n) { return _mm512_scalef_ps(x, n); }
INLINE float sum_of(vec x) { return _mm512_reduce_add_ps(x); }
INLINE float largest_of(vec x) { return _mm512_reduce_max_ps(x); }
INLINE float first_of(vec x) { return _mm512_cvtss_f32(x); }

/* x in the lanes [from, to), `otherwise` in the others; either may lie outside. */
INLINE vec choose(long from, long to, vec x, vec otherwise) {
    const __mmask16 mask = lanes(to < 0 ? 0 : to) & (__mmask16)~lanes(from < 0 ? 0 : from);
    return _mm512_mask_mov_ps(otherwise, mask, x);
}

/* The lower and the upper halves of words as bf16. */
INLINE void widen(const uint32_t *words, vec *low, vec *high) {
    const __m512i w = _mm512_loadu_si512(words);
    *low = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
    *high = _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32((int)0xffff0000u)));
}

#ifdef BF16_PRODUCTS
INLINE vec load_element(const bf16 *p, long n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes(n), p)), 16));
}

INLINE void store_element(bf16 *p, long n, vec x) {
    _mm256_mask_storeu_epi16(p, lanes(n), (__m256i)_mm512_cvtneps_pbh(x));
}
#endif
