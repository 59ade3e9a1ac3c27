/* Stands in for the compiler's header on processors without AVX-512: SIMDe, and what Debian's release of it lacks. */
#ifndef EMULATED_IMMINTRIN_H
#define EMULATED_IMMINTRIN_H

#define SIMDE_ENABLE_NATIVE_ALIASES
#define SIMDE_NO_NATIVE
#include <simde/x86/avx512.h>

#include <stdint.h>
#include <string.h>

typedef uint16_t __mmask16;
typedef uint32_t __mmask32;

#ifndef _MM_FROUND_NO_EXC
#define _MM_FROUND_NO_EXC SIMDE_MM_FROUND_NO_EXC
#define _MM_FROUND_TO_NEAREST_INT SIMDE_MM_FROUND_TO_NEAREST_INT
#endif

/* Numbers of `size` bytes between memory and a register's bytes, of the lanes in `mask` alone. */
static inline void emulated_take(void *to, const void *from, uint32_t mask, int lanes, size_t size) {
    for (int i = 0; i < lanes; ++i)
        if (mask >> i & 1) memcpy((char *)to + (size_t)i * size, (const char *)from + (size_t)i * size, size);
}

#define EMULATED_LOAD(name, type, mask_type, lanes, size)            \
    static inline type name(mask_type mask, const void *from) {      \
        type x;                                                      \
        memset(&x, 0, sizeof x);                                     \
        emulated_take(&x, from, mask, lanes, size);                  \
        return x;                                                    \
    }
#define EMULATED_STORE(name, type, mask_type, lanes, size)           \
    static inline void name(void *to, mask_type mask, type x) { emulated_take(to, &x, mask, lanes, size); }

EMULATED_LOAD(emulated_load_ps, __m512, __mmask16, 16, 4)
EMULATED_LOAD(emulated_load_epi32, __m512i, __mmask16, 16, 4)
EMULATED_LOAD(emulated_load_epi16, __m512i, __mmask32, 32, 2)
EMULATED_LOAD(emulated_load_half_epi16, __m256i, __mmask16, 16, 2)
EMULATED_STORE(emulated_store_ps, __m512, __mmask16, 16, 4)
EMULATED_STORE(emulated_store_half_epi16, __m256i, __mmask16, 16, 2)

static inline __m512i emulated_widen(__m256i x) {
    uint16_t narrow[16];
    uint32_t wide[16];
    __m512i result;
    memcpy(narrow, &x, sizeof narrow);
    for (int i = 0; i < 16; ++i) wide[i] = narrow[i];
    memcpy(&result, wide, sizeof wide);
    return result;
}

/* Round to nearest, ties to even. */
static inline __m256i emulated_to_bf16(__m512 x) {
    uint32_t wide[16];
    uint16_t narrow[16];
    __m256i result;
    memcpy(wide, &x, sizeof wide);
    for (int i = 0; i < 16; ++i) narrow[i] = (uint16_t)((wide[i] + 0x7fff + (wide[i] >> 16 & 1)) >> 16);
    memcpy(&result, narrow, sizeof narrow);
    return result;
}

static inline float emulated_lane(__m512 x, int lane) {
    float lanes[16];
    memcpy(lanes, &x, sizeof lanes);
    return lanes[lane];
}

static inline float emulated_first(__m512 x) { return emulated_lane(x, 0); }

static inline float emulated_sum(__m512 x) {
    float sum = 0.0f;
    for (int i = 0; i < 16; ++i) sum += emulated_lane(x, i);
    return sum;
}

static inline float emulated_max(__m512 x) {
    float most = emulated_lane(x, 0);
    for (int i = 1; i < 16; ++i)
        if (emulated_lane(x, i) > most) most = emulated_lane(x, i);
    return most;
}

#define _mm512_maskz_loadu_ps emulated_load_ps
#define _mm512_maskz_loadu_epi32 emulated_load_epi32
#define _mm512_maskz_loadu_epi16 emulated_load_epi16
#define _mm256_maskz_loadu_epi16 emulated_load_half_epi16
#define _mm512_mask_storeu_ps emulated_store_ps
#define _mm256_mask_storeu_epi16 emulated_store_half_epi16
#define _mm512_cvtepu16_epi32 emulated_widen
#define _mm512_cvtneps_pbh emulated_to_bf16
#define _mm512_cvtss_f32 emulated_first
#define _mm512_reduce_add_ps emulated_sum
#define _mm512_reduce_max_ps emulated_max

#endif
