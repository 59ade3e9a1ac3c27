/* Vectors of the compiler, for every processor: GCC makes of them what its target has. */

enum { LANES = 4 };

typedef float vec __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t whole __attribute__((vector_size(4 * LANES), may_alias));

INLINE vec splat(float x) { return (vec){x, x, x, x}; }
INLINE vec zero(void) { return splat(0.0f); }
INLINE vec places(void) { return (vec){0, 1, 2, 3}; }

INLINE vec load(const float *p) {
    vec x;
    memcpy(&x, p, sizeof x);
    return x;
}

INLINE void store(float *p, vec x) { memcpy(p, &x, sizeof x); }

INLINE vec chosen(whole mask, vec x, vec otherwise) {
    return (vec)(((whole)x & mask) | ((whole)otherwise & ~mask));
}

INLINE vec mul_add(vec a, vec b, vec c) { return a * b + c; }
INLINE vec neg_mul_add(vec a, vec b, vec c) { return c - a * b; }
INLINE vec larger(vec a, vec b) { return chosen(a > b, a, b); }
INLINE vec smaller(vec a, vec b) { return chosen(a < b, a, b); }
INLINE vec magnitude(vec x) { return (vec)((whole)x & 0x7fffffff); }

/* For |x| below 2^22: adding 1.5 * 2^23 leaves no room for a fraction. */
INLINE vec nearest(vec x) { return (x + splat(12582912.0f)) - splat(12582912.0f); }

/* x times 2^n for whole n, taken as if between -126 and 127. */
INLINE vec times_power(vec x, vec n) {
    n = smaller(larger(n, splat(-126.0f)), splat(127.0f));
    return x * (vec)((__builtin_convertvector(n, whole) + 127) << 23);
}

INLINE float sum_of(vec x) { return (x[0] + x[2]) + (x[1] + x[3]); }

INLINE float largest_of(vec x) {
    const float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
    return a > b ? a : b;
}

INLINE float first_of(vec x) { return x[0]; }

/* x in the lanes [from, to), `otherwise` in the others; either may lie outside. */
INLINE vec choose(long from, long to, vec x, vec otherwise) {
    return chosen((places() >= splat((float)from)) & (places() < splat((float)to)), x, otherwise);
}

/* The lower and the upper halves of words as bf16. */
INLINE void widen(const uint32_t *words, vec *low, vec *high) {
    whole w;
    memcpy(&w, words, sizeof w);
    *low = (vec)(w << 16);
    *high = (vec)(w & (int32_t)0xffff0000u);
}
