/* Vectors of AVX2 with FMA. */
#include <immintrin.h>

enum { LANES = 8 };

typedef __m256 vec;

INLINE vec splat(float x) { return _mm256_set1_ps(x); }
INLINE vec zero(void) { return _mm256_setzero_ps(); }
INLINE vec places(void) { return _mm256_set_ps(7, 6, 5, 4, 3, 2, 1, 0); }
INLINE vec load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void store(float *p, vec x) { _mm256_storeu_ps(p, x); }
INLINE vec mul_add(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vec neg_mul_add(vec a, vec b, vec c) { return _mm256_fnmadd_ps(a, b, c); }
INLINE vec larger(vec a, vec b) { return _mm256_max_ps(a, b); }
INLINE vec smaller(vec a, vec b) { return _mm256_min_ps(a, b); }
INLINE vec magnitude(vec x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
INLINE vec nearest(vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

/* x times 2^n for whole n, taken as if between -126 and 127. */
INLINE vec times_power(vec x, vec n) {
    n = _mm256_min_ps(_mm256_max_ps(n, _mm256_set1_ps(-126.0f)), _mm256_set1_ps(127.0f));
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}

INLINE float sum_of(vec x) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

INLINE float largest_of(vec x) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

INLINE float first_of(vec x) { return _mm256_cvtss_f32(x); }

/* x in the lanes [from, to), `otherwise` in the others; either may lie outside. */
INLINE vec choose(long from, long to, vec x, vec otherwise) {
    const vec behind = _mm256_cmp_ps(places(), _mm256_set1_ps((float)from), _CMP_GE_OQ);
    const vec before = _mm256_cmp_ps(places(), _mm256_set1_ps((float)to), _CMP_LT_OQ);
    return _mm256_blendv_ps(otherwise, x, _mm256_and_ps(behind, before));
}

/* The lower and the upper halves of words as bf16. */
INLINE void widen(const uint32_t *words, vec *low, vec *high) {
    const __m256i w = _mm256_loadu_si256((const __m256i *)words);
    *low = _mm256_castsi256_ps(_mm256_slli_epi32(w, 16));
    *high = _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32((int)0xffff0000u)));
}
