/* The kernels of one instruction set against sums in double precision. Compiled once per set, for this processor, for
 * another one or for one that is emulated: KERNELS names the set's file. Run by test_kernels.py. */
#include KERNELS

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

static const double TOLERANCE = sizeof(element) == sizeof(float) ? 1e-5 : 2e-2;

static uint64_t chance = 88172645463325252u;

/* Evenly between -1 and 1. */
static float random_number(void) {
    chance ^= chance << 13;
    chance ^= chance >> 7;
    chance ^= chance << 17;
    return (float)((double)(chance >> 11) * 0x1p-52 - 1.0);
}

static bf16 narrowed(float x) {
    uint32_t word;
    memcpy(&word, &x, sizeof word);
    return (bf16)((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

static element to_element(float x) {
#ifdef BF16_PRODUCTS
    return narrowed(x);
#else
    return x;
#endif
}

static double from_element(element x) {
#ifdef BF16_PRODUCTS
    return (double)widened(x);
#else
    return (double)x;
#endif
}

static void *memory(size_t size) {
    void *given = calloc(1, size + 64);
    if (!given) abort();
    return given;
}

static element *random_elements(long count) {
    element *x = memory((size_t)count * sizeof *x);
    for (long i = 0; i < count; ++i) x[i] = to_element(random_number());
    return x;
}

static float *random_floats(long count) {
    float *x = memory((size_t)count * sizeof *x);
    for (long i = 0; i < count; ++i) x[i] = random_number();
    return x;
}

static void expect(const char *what, double got, double wanted) {
    if (fabs(got - wanted) <= TOLERANCE * (1.0 + fabs(wanted))) return;
    printf("%s: %.9g, wanted %.9g\n", what, got, wanted);
    exit(1);
}

/* A weight of `columns` x `depth` as stored, and the same packed. */
struct weight {
    void *stored, *packed;
    enum storage storage;
    long depth;
};

static double weight_at(const struct weight *w, long column, long k) {
    return stored_at(w->stored, w->storage, column * w->depth + k);
}

static struct weight random_weight(long columns, long depth, enum storage storage) {
    struct weight w = {memory((size_t)(columns * depth) * sizeof(float)), NULL, storage, depth};
    for (long i = 0; i < columns * depth; ++i)
        if (storage == BF16)
            ((bf16 *)w.stored)[i] = narrowed(random_number() / sqrtf((float)depth));
        else
            ((float *)w.stored)[i] = random_number() / sqrtf((float)depth);
    w.packed = memory(sf_packed_bytes(columns, depth, storage));
    sf_pack(w.stored, columns, depth, storage, w.packed);
    return w;
}

/* Rows without an adapter, with the first and with one that leaves the layer alone. */
static void check_linear(long rows, long into, long out, long rank, enum storage storage) {
    const struct weight w = random_weight(out, into, storage), a = random_weight(rank, into, storage),
                        b = random_weight(out, rank, storage);
    const struct lora tasks[2] = {{a.packed, b.packed}, {NULL, NULL}};
    const float *bias = random_floats(out);
    const struct linear layer = {w.packed, bias, tasks, into, out, (int32_t)rank, storage};
    const struct run runs[] = {{0, (int32_t)(rows / 3), -1}, {(int32_t)(rows / 3), (int32_t)rows, 0}, {INT32_MAX, INT32_MAX, -1}};
    const element *x = random_elements(rows * into);
    element *low = memory((size_t)(rows * rank) * sizeof *low), *y = memory((size_t)(rows * out) * sizeof *y);
    const struct rows all = rows_of(0, rows, runs);
    for (int under_gelu = 0; under_gelu < 2; ++under_gelu) {
        if (under_gelu)
            project_gelu(&layer, &all, x, low, y, out);
        else
            project(&layer, &all, x, low, y, out);
        for (long r = 0; r < rows; ++r)
            for (long n = 0; n < out; ++n) {
                double sum = bias[n];
                for (long k = 0; k < into; ++k) sum += from_element(x[r * into + k]) * weight_at(&w, n, k);
                for (long i = 0; i < rank && r >= rows / 3; ++i) {
                    double part = 0.0;
                    for (long k = 0; k < into; ++k) part += from_element(x[r * into + k]) * weight_at(&a, i, k);
                    sum += part * weight_at(&b, n, i);
                }
                if (under_gelu) sum *= 0.5 * erfc(-sum * M_SQRT1_2);
                expect("linear", from_element(y[r * out + n]), sum);
            }
    }
}

static double score(const struct attention *form, const element *query, const element *key, long apart, int head) {
    double sum = 0.0;
    for (int d = 0; d < form->head_dim; ++d) sum += from_element(query[d]) * from_element(key[d]);
    return sum * (double)form->scale - (form->slopes ? (double)form->slopes[head] * fabs((double)apart) : 0.0);
}

static void check_attention(struct attention form, const int32_t *ends, long items, long longest) {
    const long tokens = ends[items], shared = form.heads / form.key_heads;
    form.query_stride = form.heads * form.head_dim + 3;
    form.key_stride = form.key_heads * form.head_dim + 5;
    form.out_stride = (int64_t)form.heads * form.head_dim;
    const element *query = random_elements(tokens * form.query_stride), *key = random_elements(tokens * form.key_stride),
                  *value = random_elements(tokens * form.key_stride);
    element *out = memory((size_t)(tokens * form.out_stride) * sizeof *out);
    sf_attention(&form, query, key, value, out, ends, items, memory(sf_attention_scratch(form.head_dim, (int32_t)shared, 2)),
                 longest, 2);
    for (long item = 0; item < items; ++item)
        for (long q = 0; q < ends[item + 1] - ends[item]; ++q)
            for (int head = 0; head < form.heads; ++head) {
                const long length = form.visible ? form.visible[item] : ends[item + 1] - ends[item];
                const long to = form.causal && q + 1 < length ? q + 1 : length, own = head / shared * form.head_dim;
                const long from = form.window && q >= form.window ? q - form.window + 1 : 0;
                const element *at = query + (ends[item] + q) * form.query_stride + (long)head * form.head_dim;
                double mass = 0.0, sums[64] = {0};
                for (long k = from; k < to; ++k) {
                    const long place = (ends[item] + k) * form.key_stride + own;
                    const double weight = exp(score(&form, at, key + place, q - k, head));
                    mass += weight;
                    for (int d = 0; d < form.head_dim; ++d) sums[d] += weight * from_element(value[place + d]);
                }
                for (int d = 0; d < form.head_dim; ++d)
                    expect("attention", from_element(out[(ends[item] + q) * form.out_stride + (long)head * form.head_dim + d]),
                           sums[d] / mass);
            }
}

static void check_attentions(void) {
    const int32_t ends[] = {0, 1, 18, 80, 615}, visible[] = {1, 3, 50};
    const float slopes[] = {0.5f, 0.25f, 0.125f, 0.0625f};
    struct attention form = {.heads = 2, .key_heads = 1, .head_dim = 10, .scale = 0.3f};
    check_attention(form, ends, 4, 535);
    form.visible = visible;
    check_attention(form, ends, 3, 62);
    form.visible = NULL;
    form.causal = 1;
    check_attention(form, ends, 3, 62);
    form.window = 37;
    check_attention(form, ends, 4, 535);
    form = (struct attention){.heads = 4, .key_heads = 4, .head_dim = 34, .scale = 0.2f, .slopes = slopes};
    check_attention(form, ends, 3, 62);
}

static void check_functions(void) {
    float x[LANES], y[LANES];
    for (double at = -12.0; at < 12.0; at += LANES * 0.01) {
        for (int i = 0; i < LANES; ++i) x[i] = (float)(at + 0.01 * i);
        store(y, gelu(load(x)));
        for (int i = 0; i < LANES; ++i) expect("gelu", y[i], x[i] * 0.5 * erfc(-(double)x[i] * M_SQRT1_2));
        store(y, silu(load(x)));
        for (int i = 0; i < LANES; ++i) expect("silu", y[i], x[i] / (1.0 + exp(-(double)x[i])));
        store(y, exponential(load(x)));
        for (int i = 0; i < LANES; ++i) expect("exp", y[i], exp((double)x[i]));
    }
}

static void check_norm(long width) {
    const float *x = random_floats(width), *weight = random_floats(width), *bias = random_floats(width);
    element *out = memory((size_t)width * sizeof *out);
    double mean = 0.0, square = 0.0;
    layer_norm(x, width, weight, bias, 1e-5f, out);
    for (long i = 0; i < width; ++i) mean += x[i] / (double)width;
    for (long i = 0; i < width; ++i) square += (x[i] - mean) * (x[i] - mean) / (double)width;
    for (long i = 0; i < width; ++i)
        expect("layer norm", from_element(out[i]), (x[i] - mean) / sqrt(square + 1e-5) * weight[i] + bias[i]);
}

static void check_rope(long half) {
    const float *angles = random_floats(half), *weight = random_floats(2 * half);
    float *cosines = random_floats(half), *sines = random_floats(half);
    for (long i = 0; i < half; ++i) cosines[i] = cosf(angles[i]), sines[i] = sinf(angles[i]);
    element *x = random_elements(2 * half), *turned = memory((size_t)(2 * half) * sizeof *turned);
    double square = 0.0;
    memcpy(turned, x, (size_t)(2 * half) * sizeof *turned);
    norm_rope_heads(turned, 1, 2 * half, weight, 1e-6f, cosines, sines);
    for (long i = 0; i < 2 * half; ++i) square += from_element(x[i]) * from_element(x[i]) / (double)(2 * half);
    for (long i = 0; i < half; ++i) {
        const double scale = 1.0 / sqrt(square + 1e-6), a = from_element(x[i]) * scale * weight[i],
                     b = from_element(x[i + half]) * scale * weight[i + half];
        expect("rope", from_element(turned[i]), a * cosines[i] - b * sines[i]);
        expect("rope", from_element(turned[i + half]), b * cosines[i] + a * sines[i]);
    }
}

int main(void) {
    check_functions();
    for (long width = 1; width < 40; width += 3) check_norm(width);
    for (long half = 1; half < 40; half += 3) check_rope(half);
    for (int storage = ELEMENTS; storage <= BF16; ++storage) {
        check_linear(1, 2, 1, 2, storage);
        check_linear(7, 24, 130, 4, storage);
        check_linear(50, 402, 33, 70, storage);
    }
    check_attentions();
    printf("%d lanes, %d bytes an element\n", LANES, (int)sizeof(element));
    return 0;
}
