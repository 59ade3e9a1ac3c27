/* What the compiled kernels of one instruction set export, called through ctypes, which drops the interpreter's lock
 * for the whole call. Any number of threads may call at once over the same weights; each call may be given
 * further threads for itself.
 *
 * Numbers between layers, the elements, are bf16 where the set has products of bf16, else fp32. Weights are fp32 or
 * bf16; each pass is told how they are stored.
 */
#include "decoder.h"
#include "encoder.h"
#include "generate.h"
#include "lora.h"

#define EXPORT __attribute__((visibility("default")))

/* 1 if elements are bf16, else 0. */
EXPORT int32_t sf_bf16_elements(void) { return ELEMENTS == BF16; }

/* Bytes of the structs that callers fill: attention, encoder, encoder_layer, encoder_pass, decoder, decoder_layer,
 * decoder_pass, linear, generate_layer, generator, query_run, generate_pass; 0 behind them. */
EXPORT size_t sf_sizeof(int32_t which) {
    static const size_t sizes[] = {
        sizeof(struct attention), sizeof(struct encoder),       sizeof(struct encoder_layer), sizeof(struct encoder_pass),
        sizeof(struct decoder),   sizeof(struct decoder_layer), sizeof(struct decoder_pass),  sizeof(struct linear),
        sizeof(struct generate_layer), sizeof(struct generator), sizeof(struct query_run), sizeof(struct generate_pass),
    };
    return which < (int32_t)(sizeof sizes / sizeof *sizes) ? sizes[which] : 0;
}

/* Bytes that sf_pack writes for a weight of (out, into); `into` is even for bf16. */
EXPORT size_t sf_packed_bytes(int64_t out, int64_t into, int32_t storage) { return packed_bytes(out, into, storage); }

/* Lay a weight (out, into) of `storage`, 0 for fp32 or 1 for bf16, out in panels. */
EXPORT void sf_pack(const void *weight, int64_t out, int64_t into, int32_t storage, void *packed) {
    pack_weight(weight, out, into, storage, packed);
}

/* Bytes of scratch for sf_attention with `shared` query heads to a head of keys. */
EXPORT size_t sf_attention_scratch(int32_t head_dim, int32_t shared, int32_t members) {
    return attention_scratch(head_dim, shared) * (size_t)members;
}

/* Attention over `items` texts, text i being the tokens [ends[i], ends[i + 1]), by up to `members` threads. A
 * window needs causal attention. */
EXPORT void sf_attention(const struct attention *form, const element *query, const element *key, const element *value,
                         element *out, const int32_t *ends, int64_t items, char *scratch, int64_t longest,
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

/* A pass of an encoder. Ids lie in the vocabulary, adapters are known and texts no longer than the tables of positions
 * or angles: none of it is checked here. */
EXPORT void sf_encode(const struct encoder_pass *in, char *scratch, int32_t members) { encode(in, scratch, members); }

/* Bytes of scratch for sf_decode. */
EXPORT size_t sf_decoder_scratch(const struct decoder *d, int32_t members) {
    return decoder_scratch(d) * (size_t)members;
}

/* A pass of a decoder. Ids lie in the vocabulary, positions below `longest` and requested rows in the pass: none of
 * it is checked here. */
EXPORT void sf_decode(const struct decoder_pass *in, char *scratch, int32_t members) { decode(in, scratch, members); }

/* Numbers of the keys of a block of a head in a layer, then those of its values. */
EXPORT int64_t sf_cache_keys(const struct generator *g) { return head_elements(g); }
EXPORT int64_t sf_cache_values(const struct generator *g) { return value_elements(g); }

/* Bytes of scratch for sf_generate. */
EXPORT size_t sf_generate_scratch(const struct generator *g, int32_t members) {
    return generate_scratch(g) * (size_t)members;
}

/* One step. Blocks lie in the cache, positions in the tables of angles and rows in the step: none of it is checked
 * here. One step at a time over the same cache. */
EXPORT void sf_generate(const struct generate_pass *in, char *scratch, int32_t members) {
    generate(in, scratch, members);
}

/* Turn the halves of `heads` heads of each token against each other, in place. `stride` is from token to token,
 * `cosines` and `sines` are (tokens, head_dim / 2). */
EXPORT void sf_rope(element *x, int64_t tokens, int64_t stride, int32_t heads, int32_t head_dim, const float *cosines,
                    const float *sines) {
    const long half = head_dim / 2;
    for (long t = 0; t < tokens; ++t)
        norm_rope_heads(x + t * stride, heads, head_dim, NULL, 0.0f, cosines + t * half, sines + t * half);
}

/* y (rows, out) += (x (rows, into) . a (rank, into)) . b (rank, out), in place, under GELU if asked for. The
 * rank is at most 64. */
EXPORT void sf_lora(const element *x, int64_t rows, int64_t into, const element *a, const element *b, int64_t rank,
                    int64_t out, int32_t under_gelu, element *y) {
    lora(x, rows, into, a, b, rank, out, under_gelu, y);
}

/* Mean over the tokens of each text, (items, width) fp32. */
EXPORT void sf_mean(const element *hidden, const int32_t *ends, int64_t items, int64_t width, float *out) {
    for (long item = 0; item < items; ++item) {
        const vec share = splat(1.0f / (float)(ends[item + 1] - ends[item]));
        for (long i = 0; i < width; i += LANES) {
            vec sum = zero();
            for (long t = ends[item]; t < ends[item + 1]; ++t) sum = sum + load_element(hidden + t * width + i, width - i);
            store_some(out + item * width + i, width - i, sum * share);
        }
    }
}
