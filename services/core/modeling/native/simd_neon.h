/* Vectors of arm64's NEON. */
#include <arm_neon.h>

enum { LANES = 4 };

typedef float32x4_t vec;

INLINE vec splat(float x) { return vdupq_n_f32(x); }
INLINE vec zero(void) { return vdupq_n_f32(0.0f); }
INLINE vec places(void) { return (vec){0, 1, 2, 3}; }
INLINE vec load(const float *p) { return vld1q_f32(p); }
INLINE void store(float *p, vec x) { vst1q_f32(p, x); }
INLINE vec mul_add(vec a, vec b, vec c) { return vfmaq_f32(c, a, b); }
INLINE vec neg_mul_add(vec a, vec b, vec c) { return vfmsq_f32(c, a, b); }
INLINE vec larger(vec a, vec b) { return vmaxq_f32(a, b); }
INLINE vec smaller(vec a, vec b) { return vminq_f32(a, b); }
INLINE vec magnitude(vec x) { return vabsq_f32(x); }
INLINE vec nearest(vec x) { return vrndnq_f32(x); }

/* x times 2^n for whole n, taken as if between -126 and 127. */
INLINE vec times_power(vec x, vec n) {
    n = vminq_f32(vmaxq_f32(n, splat(-126.0f)), splat(127.0f));
    const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
    return vmulq_f32(x, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
}

INLINE float sum_of(vec x) { return vaddvq_f32(x); }
INLINE float largest_of(vec x) { return vmaxvq_f32(x); }
INLINE float first_of(vec x) { return vgetq_lane_f32(x, 0); }

/* x in the lanes [from, to), `otherwise` in the others; either may lie outside. */
INLINE vec choose(long from, long to, vec x, vec otherwise) {
    const uint32x4_t behind = vcgeq_f32(places(), splat((float)from)), before = vcltq_f32(places(), splat((float)to));
    return vbslq_f32(vandq_u32(behind, before), x, otherwise);
}

/* The lower and the upper halves of words as bf16. */
INLINE void widen(const uint32_t *words, vec *low, vec *high) {
    const uint32x4_t w = vld1q_u32(words);
    *low = vreinterpretq_f32_u32(vshlq_n_u32(w, 16));
    *high = vreinterpretq_f32_u32(vandq_u32(w, vdupq_n_u32(0xffff0000u)));
}
