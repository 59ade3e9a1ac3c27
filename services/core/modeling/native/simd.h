/* Vectors of fp32: what an instruction set gives, and the functions made of it.
 *
 * The including file names the set, SET_AVX512, SET_AVX2 or SET_NEON; without a name it is the compiler's own.
 * With BF16_PRODUCTS the numbers between two layers, the elements, are bf16, else fp32.
 */
#ifndef SF_SIMD_H
#define SF_SIMD_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

#ifdef BF16_PRODUCTS
typedef bf16 element;
#else
typedef float element;
#endif

#define INLINE static inline __attribute__((always_inline))

#if defined(SET_AVX512)
#include "simd_avx512.h"
#elif defined(SET_AVX2)
#include "simd_avx2.h"
#elif defined(SET_NEON)
#include "simd_neon.h"
#else
#include "simd_portable.h"
#endif

#ifndef SET_AVX512
INLINE vec load_some(const float *p, long n) {
    if (n >= LANES) return load(p);
    float some[LANES] = {0};
    for (long i = 0; i < n; ++i) some[i] = p[i];
    return load(some);
}

INLINE void store_some(float *p, long n, vec x) {
    if (n >= LANES) {
        store(p, x);
        return;
    }
    float some[LANES];
    store(some, x);
    for (long i = 0; i < n; ++i) p[i] = some[i];
}
#endif

#ifndef BF16_PRODUCTS
INLINE vec load_element(const float *p, long n) { return load_some(p, n); }
INLINE void store_element(float *p, long n, vec x) { store_some(p, n, x); }
#endif

INLINE float widened(bf16 x) {
    const uint32_t word = (uint32_t)x << 16;
    float wide;
    memcpy(&wide, &word, sizeof wide);
    return wide;
}

/* 2^t for t <= 127; below -126 the result fades to zero or stays at 2^-126. Relative error 1e-7, and 4e-6 where
 * the results are bf16. */
INLINE vec power_of_two(vec t) {
    const vec n = nearest(t), r = t - n;
#ifdef BF16_PRODUCTS
    static const float c[] = {1.339887440e-3f, 9.618437357e-3f, 5.550332548e-2f, 2.402264791e-1f, 6.931472057e-1f, 1.0f};
#else
    static const float c[] = {
        1.535335905e-4f, 1.339887502e-3f, 9.618436918e-3f, 5.550332367e-2f, 2.402264774e-1f, 6.931471825e-1f, 1.0f,
    };
#endif
    vec p = splat(c[0]);
    for (unsigned i = 1; i < sizeof c / sizeof *c; ++i) p = mul_add(p, r, splat(c[i]));
    return times_power(p, n);
}

/* e^x for x <= 88. */
INLINE vec exponential(vec x) { return power_of_two(x * splat(1.44269504f)); }

#ifdef BF16_PRODUCTS
/* x * Phi(x), the erf form of GELU, with Phi - 1/2 as an odd polynomial on [-4.5, 4.5]: absolute error 7e-6
 * there, and x * 4e-6 beyond, far below the steps of bf16. */
INLINE vec gelu(vec x) {
    static const float c[] = {
        -1.400068646e-12f, 1.697305074e-10f, -9.193754202e-09f, 2.958900041e-07f, -6.365257832e-06f,
        9.787137969e-05f, -1.122678630e-03f, 9.833185002e-03f, -6.633705646e-02f, 3.988837898e-01f,
    };
    const vec edge = splat(4.5f), y = larger(smaller(x, edge), zero() - edge), u = y * y;
    vec p = splat(c[0]);
    for (int i = 1; i < 10; ++i) p = mul_add(p, u, splat(c[i]));
    return x * mul_add(p, y, splat(0.5f));
}
#else
/* x * Phi(x), the erf form of GELU, with Phi - 1/2 as an odd rational function on [-5.6, 5.6]: relative error of
 * the sum 3e-7 where it is not tiny. */
INLINE vec gelu(vec x) {
    static const float c[] = {
        1.082711143e-10f, -2.306709668e-08f, 3.769542673e-06f, 2.133243397e-04f,
        4.775030538e-03f, 3.992340341e-02f,  3.989418447e-01f,
    };
    static const float d[] = {7.721658039e-05f, 2.073901938e-03f, 3.143499047e-02f, 2.667336166e-01f, 1.0f};
    const vec edge = splat(5.6f), y = larger(smaller(x, edge), zero() - edge), u = y * y;
    vec p = splat(c[0]), q = splat(d[0]);
    for (int i = 1; i < 7; ++i) p = mul_add(p, u, splat(c[i]));
    for (int i = 1; i < 5; ++i) q = mul_add(q, u, splat(d[i]));
    return x * mul_add(p / q, y, splat(0.5f));
}
#endif

/* x / (1 + e^-x). */
INLINE vec silu(vec x) { return x / (splat(1.0f) + exponential(zero() - x)); }

/* 1 / sqrt(mean of squares + epsilon) of one row. */
INLINE float rms_scale(const element *x, long width, float epsilon) {
    vec sum = zero();
    for (long i = 0; i < width; i += LANES) {
        const vec part = load_element(x + i, width - i);
        sum = mul_add(part, part, sum);
    }
    return 1.0f / __builtin_sqrtf(sum_of(sum) / (float)width + epsilon);
}

/* Layer norm of one fp32 row of `width`. */
INLINE void layer_norm(const float *x, long width, const float *weight, const float *bias, float epsilon,
                       element *out) {
    vec sum = zero(), square = zero();
    for (long i = 0; i < width; i += LANES) sum = sum + load_some(x + i, width - i);
    const vec mean = splat(sum_of(sum) / (float)width);
    for (long i = 0; i < width; i += LANES) {
        const vec apart = load_some(x + i, width - i) - mean;
        const vec d = width - i < LANES ? choose(0, width - i, apart, zero()) : apart;
        square = mul_add(d, d, square);
    }
    const vec scale = splat(1.0f / __builtin_sqrtf(sum_of(square) / (float)width + epsilon));
    for (long i = 0; i < width; i += LANES) {
        const long n = width - i;
        const vec d = (load_some(x + i, n) - mean) * scale;
        store_element(out + i, n, mul_add(d, load_some(weight + i, n), load_some(bias + i, n)));
    }
}

#endif
