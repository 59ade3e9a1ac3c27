/* Fused bf16 kernels for CPUs with AVX-512 BF16, called through ctypes, which drops the interpreter's lock
 * for the whole call. Any number of threads may call at once over the same weights; each call may be given
 * further threads for itself. */
#include "decoder.h"
#include "encoder.h"
#include "lora.h"

#define EXPORT __attribute__((visibility("default")))

/* Words that sf_pack writes for a weight of (out, into). */
EXPORT size_t sf_packed_words(int64_t out, int64_t into) { return packed_words(out, into / 2); }

/* Lay a bf16 weight (out, into) out in panels. */
EXPORT void sf_pack(const bf16 *weight, int64_t out, int64_t into, uint32_t *packed) {
    pack_rows(weight, into, out, into / 2, packed);
}

/* Bytes of scratch for sf_attention with `shared` query heads to a head of keys. */
EXPORT size_t sf_attention_scratch(int32_t head_dim, int32_t shared, int32_t members) {
    return attention_scratch(head_dim, shared) * (size_t)members;
}

/* Attention over `items` texts, text i being the tokens [ends[i], ends[i + 1]), by up to `members` threads. A
 * window needs causal attention. */
EXPORT void sf_attention(const struct attention *form, const bf16 *query, const bf16 *key, const bf16 *value,
                         bf16 *out, const int32_t *ends, int64_t items, char *scratch, int64_t longest,
                         int32_t members) {
    const struct attention_call call = {
        form, query, key, value, out, ends, items, longest,
        scratch, attention_scratch(form->head_dim, shared_heads(form)),
    };
    struct job job = {.phases = 1, .tasks = attention_tasks, .run = attention_task, .context = &call};
    work(&job, members_for(ends[items], members));
}

/* Bytes of scratch for sf_encode over a pass of `tokens`. */
EXPORT size_t sf_encoder_scratch(const struct encoder *e, int64_t tokens, int32_t members) {
    return encoder_scratch(e, tokens, members);
}

/* Last hidden states (tokens, width) of a packed batch, whose ids lie in the vocabulary and whose texts
 * are no longer than the position table: neither is checked here. */
EXPORT void sf_encode(const struct encoder *e, const int32_t *ids, const int32_t *ends, int64_t items,
                      int64_t longest, bf16 *hidden, char *scratch, int32_t members) {
    encode(e, ids, ends, items, longest, hidden, scratch, members);
}

/* Bytes of scratch for sf_decode. */
EXPORT size_t sf_decoder_scratch(const struct decoder *d, int32_t members) {
    return decoder_scratch(d) * (size_t)members;
}

/* A pass of a decoder. Ids lie in the vocabulary, positions below `longest` and wanted rows in the pass: none of
 * it is checked here. */
EXPORT void sf_decode(const struct text_pass *in, char *scratch, int32_t members) {
    read_pass(in, scratch, members);
}

/* Turn the halves of `heads` heads of each token against each other, in place. `stride` is from token to token,
 * `cosines` and `sines` are (tokens, head_dim / 2). */
EXPORT void sf_turn(bf16 *x, int64_t tokens, int64_t stride, int32_t heads, int32_t head_dim,
                    const float *cosines, const float *sines) {
    const long half = head_dim / 2;
    for (long token = 0; token < tokens; ++token)
        for (long i = 0; i < half; i += 16) {
            const __mmask16 mask = lanes(half - i);
            const __m512 cosine = _mm512_maskz_loadu_ps(mask, cosines + token * half + i);
            const __m512 sine = _mm512_maskz_loadu_ps(mask, sines + token * half + i);
            for (long head = 0; head < heads; ++head) {
                bf16 *first = x + token * stride + head * head_dim + i, *second = first + half;
                const __m512 a = load_bf16(first, mask), b = load_bf16(second, mask);
                store_bf16(first, mask, _mm512_fnmadd_ps(b, sine, _mm512_mul_ps(a, cosine)));
                store_bf16(second, mask, _mm512_fmadd_ps(a, sine, _mm512_mul_ps(b, cosine)));
            }
        }
}

/* y (rows, out) += (x (rows, into) . down (rank, into)) . up (rank, out), in place, under GELU if asked for. The
 * rank is at most 64. */
EXPORT void sf_lora(const bf16 *x, int64_t rows, int64_t into, const bf16 *down, const bf16 *up, int64_t rank,
                    int64_t out, int32_t under_gelu, bf16 *y) {
    lora(x, rows, into, down, up, rank, out, under_gelu, y);
}

/* Mean over the tokens of each text, (items, width) fp32. */
EXPORT void sf_mean(const bf16 *hidden, const int32_t *ends, int64_t items, int64_t width, float *out) {
    for (long item = 0; item < items; ++item) {
        const __m512 share = _mm512_set1_ps(1.0f / (float)(ends[item + 1] - ends[item]));
        for (long i = 0; i < width; i += 16) {
            const __mmask16 mask = lanes(width - i);
            __m512 sum = _mm512_setzero_ps();
            for (long t = ends[item]; t < ends[item + 1]; ++t)
                sum = _mm512_add_ps(sum, load_bf16(hidden + t * width + i, mask));
            _mm512_mask_storeu_ps(out + item * width + i, mask, _mm512_mul_ps(sum, share));
        }
    }
}
