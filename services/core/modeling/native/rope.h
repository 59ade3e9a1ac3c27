/* Rotary positions (Su et al., arXiv 2104.09864), the form that turns the two halves of a head. */
#ifndef SF_ROPE_H
#define SF_ROPE_H

#include "simd.h"

/* Norm each of `heads` neighbouring heads of one token, if there is a weight, then turn its halves against each
 * other by angles whose `cosines` and `sines` are (head_dim / 2,). */
static void norm_rope_heads(element *x, long heads, long head_dim, const float *weight, float epsilon,
                            const float *cosines, const float *sines) {
    const long half = head_dim / 2;
    for (; heads > 0; --heads, x += head_dim) {
        const vec scale = splat(weight ? rms_scale(x, head_dim, epsilon) : 1.0f);
        for (long i = 0; i < half; i += LANES) {
            const long n = half - i;
            const vec cosine = load_some(cosines + i, n), sine = load_some(sines + i, n);
            vec a = load_element(x + i, n), b = load_element(x + half + i, n);
            if (weight) {
                a = a * (scale * load_some(weight + i, n));
                b = b * (scale * load_some(weight + half + i, n));
            }
            store_element(x + i, n, neg_mul_add(b, sine, a * cosine));
            store_element(x + half + i, n, mul_add(a, sine, b * cosine));
        }
    }
}

#endif
