/* What lies between a decoder layer's linears, in bf16 for x86 with AVX-512 BF16: norms, rotary with the write of
 * K and V, silu(gate) * up, attention over blocks.
 *
 * Each is one pass over a row in an order that depends on the row alone, so a row's bits are those it has alone.
 * Attention sees keys in tiles of 64 that begin at multiples of 64 positions, with a running maximum (Milakov and
 * Gimelshein, arXiv 1805.02867). Slots that no row of a sequence's batch sees may hold anything, NaN included; a value
 * that is not finite shows in all rows of its unit, as it does in the tiled form.
 */
#include "weft_cpu.h"

#define UNIT_ROWS 64 /* (row, head) pairs of one unit of attention: they share the transposed keys */
#define MAX_HEAD_DIM 256
#define SMALL 16384 /* elements below which a second thread costs more than it brings */

/* exp to about 1e-7, by 2^n times a polynomial of the rest (Cephes' coefficients). exp(-inf) is 0, and from 88.73
 * on it is infinite. */
INLINE __m512 exp512(__m512 x) {
    /* Of a NaN and a number both instructions give their second operand: a NaN stays one. */
    x = _mm512_max_ps(_mm512_set1_ps(-104.0f), _mm512_min_ps(_mm512_set1_ps(89.0f), x));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

/* total = x + residual, rounded to bf16 (x itself without a residual), then out = total / rms * weight [width].
 * Rounded before a bf16 weight is multiplied in, and once after a fp32 one. The width is a multiple of 16. */
void weft_rms_norm(const uint16_t *x, const uint16_t *residual, uint16_t *total, const void *weight, int64_t is_fp32,
                   float eps, uint16_t *out, int64_t rows, int64_t width, int64_t threads) {
#pragma omp parallel for num_threads((int)threads) if (rows * width > SMALL)
    for (int64_t row = 0; row < rows; row++) {
        const uint16_t *sum = (residual ? total : x) + row * width;
        uint16_t *to = out + row * width;
        __m512 square = _mm512_setzero_ps();
        for (int64_t k = 0; k < width; k += 16) {
            __m512 v = load_bf16(x + row * width + k);
            if (residual) {
                const __m256i rounded = to_bf16(_mm512_add_ps(v, load_bf16(residual + row * width + k)));
                _mm256_storeu_si256((__m256i *)(total + row * width + k), rounded);
                v = from_bf16(rounded);
            }
            square = _mm512_fmadd_ps(v, v, square);
        }
        const float mean = _mm512_reduce_add_ps(square) / (float)width + eps;
        const __m512 factor = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_sqrt_ps(_mm512_set1_ps(mean)));
        for (int64_t k = 0; k < width; k += 16) {
            const __m512 normed = _mm512_mul_ps(load_bf16(sum + k), factor);
            const __m512 value = is_fp32 ? _mm512_mul_ps(normed, _mm512_loadu_ps((const float *)weight + k))
                                         : _mm512_mul_ps(from_bf16(to_bf16(normed)),
                                                         load_bf16((const uint16_t *)weight + k));
            store_bf16(to + k, value);
        }
    }
}

/* silu(gate) * up: [rows][2 width] -> [rows][width], the width a multiple of 16. */
void weft_silu_mul(const uint16_t *gate_up, uint16_t *out, int64_t rows, int64_t width, int64_t threads) {
#pragma omp parallel for num_threads((int)threads) if (rows * width > SMALL)
    for (int64_t row = 0; row < rows; row++) {
        const uint16_t *gates = gate_up + row * 2 * width;
        for (int64_t k = 0; k < width; k += 16) {
            const __m512 gate = load_bf16(gates + k), one = _mm512_set1_ps(1.0f);
            const __m512 bottom = _mm512_add_ps(exp512(_mm512_sub_ps(_mm512_setzero_ps(), gate)), one);
            store_bf16(out + row * width + k, _mm512_mul_ps(_mm512_div_ps(gate, bottom), load_bf16(gates + width + k)));
        }
    }
}

/* qkv [rows][heads + 2 kv_heads][dim] -> query [rows][heads][dim] rotated, K rotated and V into their slots of
 * the caches [blocks][kv_heads][block_size][dim]. cos, sin fp32 [rows][dim / 2]; dim is a multiple of 32. */
void weft_rotary_write_kv(const uint16_t *qkv, const float *cosines, const float *sines, const int64_t *slots,
                          uint16_t *query, uint16_t *keys, uint16_t *values, int64_t rows, int64_t heads,
                          int64_t kv_heads, int64_t block_size, int64_t dim, int64_t threads) {
    const int64_t half = dim / 2;
#pragma omp parallel for num_threads((int)threads) if (rows * heads * dim > SMALL)
    for (int64_t row = 0; row < rows; row++) {
        const uint16_t *from = qkv + row * (heads + 2 * kv_heads) * dim;
        const int64_t block = slots[row] / block_size, offset = slots[row] % block_size;
        for (int64_t head = 0; head < heads + kv_heads; head++, from += dim) {
            const int64_t place = ((block * kv_heads + head - heads) * block_size + offset) * dim;
            uint16_t *to = head < heads ? query + (row * heads + head) * dim : keys + place;
            for (int64_t i = 0; i < half; i += 16) {
                const __m512 a = load_bf16(from + i), b = load_bf16(from + half + i);
                const __m512 c = _mm512_loadu_ps(cosines + row * half + i), s = _mm512_loadu_ps(sines + row * half + i);
                store_bf16(to + i, _mm512_sub_ps(_mm512_mul_ps(a, c), _mm512_mul_ps(b, s)));
                store_bf16(to + half + i, _mm512_add_ps(_mm512_mul_ps(b, c), _mm512_mul_ps(a, s)));
            }
        }
        for (int64_t head = 0; head < kv_heads; head++, from += dim)
            memcpy(values + ((block * kv_heads + head) * block_size + offset) * dim, from, (size_t)dim * 2);
    }
}

typedef struct {
    const uint16_t *query, *keys, *values; /* [rows][heads][dim]; caches [blocks][kv_heads][block_size][dim] */
    uint16_t *out;                         /* [rows][heads][dim] */
    const int64_t *tables;                 /* [seqs][table_width] */
    const int64_t *starts, *lengths, *contexts; /* of each sequence: first row, rows, tokens with these rows */
    int64_t num_seqs, table_width, heads, kv_heads, block_size, dim, window; /* window 0: all keys */
    float scale;
} Attention;

/* acc[rows][64] of x pairs [rows][stride] and operands [num_pairs][64], added to what is there. */
INLINE void product(const int rows, const uint32_t *x, int64_t stride, const uint32_t *operands, int64_t num_pairs,
                    float *out, int64_t out_stride) {
    __m512 acc[MAX_ROWS][BLOCKS];
    for (int r = 0; r < rows; r++)
        for (int b = 0; b < BLOCKS; b++) acc[r][b] = _mm512_loadu_ps(out + r * out_stride + 16 * b);
    for (int64_t p = 0; p < num_pairs; p++)
        for (int b = 0; b < BLOCKS; b++) {
            const __m512i w = _mm512_loadu_si512(operands + p * PANEL + 16 * b);
            for (int r = 0; r < rows; r++)
                acc[r][b] = dot_pairs(acc[r][b], w, _mm512_set1_epi32((int)x[r * stride + p]));
        }
    for (int r = 0; r < rows; r++)
        for (int b = 0; b < BLOCKS; b++) _mm512_storeu_ps(out + r * out_stride + 16 * b, acc[r][b]);
}

static void products(int64_t rows, const uint32_t *x, int64_t stride, const uint32_t *operands, int64_t num_pairs,
                     float *out, int64_t out_stride) {
    for (int64_t r = 0; r < rows; r += MAX_ROWS, x += MAX_ROWS * stride, out += MAX_ROWS * out_stride)
        switch (rows - r) {
        case 1: product(1, x, stride, operands, num_pairs, out, out_stride); break;
        case 2: product(2, x, stride, operands, num_pairs, out, out_stride); break;
        case 3: product(3, x, stride, operands, num_pairs, out, out_stride); break;
        default: product(4, x, stride, operands, num_pairs, out, out_stride);
        }
}

typedef struct {
    uint32_t keys[MAX_HEAD_DIM / 2 * PANEL], values[PANEL / 2 * MAX_HEAD_DIM]; /* operands of a tile */
    uint16_t query[UNIT_ROWS * MAX_HEAD_DIM], weights[UNIT_ROWS * PANEL];
    float scores[UNIT_ROWS * PANEL], out[UNIT_ROWS * MAX_HEAD_DIM], highest[UNIT_ROWS], sum[UNIT_ROWS];
} Unit;

/* Rows of 16 numbers become columns: first pairs within 128 bits, then those 128 bits. */
INLINE void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 4) {
        const __m512i a = _mm512_unpacklo_epi32(r[i], r[i + 1]), b = _mm512_unpackhi_epi32(r[i], r[i + 1]);
        const __m512i c = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]), d = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
        t[i] = _mm512_unpacklo_epi64(a, c), t[i + 1] = _mm512_unpackhi_epi64(a, c);
        t[i + 2] = _mm512_unpacklo_epi64(b, d), t[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    for (int i = 0; i < 4; i++) {
        const __m512i a = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88), b = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xDD);
        const __m512i c = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xDD);
        r[i] = _mm512_shuffle_i32x4(a, c, 0x88), r[i + 8] = _mm512_shuffle_i32x4(a, c, 0xDD);
        r[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88), r[i + 12] = _mm512_shuffle_i32x4(b, d, 0xDD);
    }
}

/* The operands of keys first .. first + 63 of a kv head; those outside of [low, high) become zeros. */
static void load_tile(const Attention *a, int64_t seq, int64_t kv_head, int64_t first, int64_t low, int64_t high,
                      Unit *u) {
    static const uint16_t nothing[MAX_HEAD_DIM] __attribute__((aligned(64)));
    const int64_t panels = (a->dim + PANEL - 1) / PANEL;
    const uint16_t *keys[PANEL], *values[PANEL];
    for (int64_t i = 0; i < PANEL; i++) {
        const int64_t at = first + i;
        keys[i] = values[i] = nothing;
        if (at < low || at >= high) continue;
        const int64_t block = a->tables[seq * a->table_width + at / a->block_size];
        const int64_t place = ((block * a->kv_heads + kv_head) * a->block_size + at % a->block_size) * a->dim;
        keys[i] = a->keys + place, values[i] = a->values + place;
    }
    for (int b = 0; b < BLOCKS; b++)
        for (int64_t p = 0; p < a->dim / 2; p += 16) {
            __m512i rows[16];
            for (int i = 0; i < 16; i++) rows[i] = _mm512_loadu_si512(keys[16 * b + i] + 2 * p);
            transpose(rows);
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(u->keys + (p + i) * PANEL + 16 * b, rows[i]);
        }
    for (int64_t i = 0; i < PANEL; i += 2) /* values are paired along the keys */
        for (int64_t d = 0; d < panels * PANEL; d += 16) {
            __m512i pair = _mm512_setzero_si512();
            if (d < a->dim)
                pair = _mm512_or_si512(
                    _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(values[i] + d))),
                    _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(values[i + 1] + d))), 16));
            _mm512_storeu_si512(u->values + ((d / PANEL) * (PANEL / 2) + i / 2) * PANEL + d % PANEL, pair);
        }
}

/* Scores of one (row, head) over keys first .. first + 63, of which it sees [low, high): the running maximum and
 * sum, what lies in `out` so far brought to the new maximum, and the tile's weights in bf16. */
static void soften(const Attention *a, int64_t first, int64_t low, int64_t high, int64_t row, Unit *u) {
    float *scores = u->scores + row * PANEL;
    __m512 s[BLOCKS], top = _mm512_set1_ps(-INFINITY);
    for (int b = 0; b < BLOCKS; b++) {
        const __m512i at = _mm512_add_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                            _mm512_set1_epi32((int)first + 16 * b));
        const __mmask16 seen = _mm512_cmplt_epi32_mask(at, _mm512_set1_epi32((int)high)) &
                               _mm512_cmpge_epi32_mask(at, _mm512_set1_epi32((int)low));
        s[b] = _mm512_mask_mul_ps(_mm512_set1_ps(-INFINITY), seen, _mm512_loadu_ps(scores + 16 * b),
                                  _mm512_set1_ps(a->scale));
        top = _mm512_max_ps(s[b], top);
    }
    const float old = u->highest[row], tile_top = _mm512_reduce_max_ps(top), high_now = old > tile_top ? old : tile_top;
    const int64_t width = (a->dim + PANEL - 1) / PANEL * PANEL;
    if (high_now == -INFINITY) { /* sees nothing yet: a window begins in a later tile */
        memset(u->weights + row * PANEL, 0, PANEL * 2);
        return;
    }
    __m512 sum = _mm512_setzero_ps();
    for (int b = 0; b < BLOCKS; b++) {
        const __m512 w = exp512(_mm512_sub_ps(s[b], _mm512_set1_ps(high_now)));
        sum = _mm512_add_ps(sum, w);
        store_bf16(u->weights + row * PANEL + 16 * b, w);
    }
    if (high_now > old) {
        const __m512 factor = exp512(_mm512_set1_ps(old - high_now));
        for (int64_t d = 0; d < width; d += 16)
            _mm512_storeu_ps(u->out + row * width + d, _mm512_mul_ps(factor, _mm512_loadu_ps(u->out + row * width + d)));
        u->sum[row] *= _mm512_cvtss_f32(factor);
        u->highest[row] = high_now;
    }
    u->sum[row] += _mm512_reduce_add_ps(sum);
}

/* Rows [row, row + rows) of a sequence, one kv head. */
static void attend(const Attention *a, int64_t seq, int64_t kv_head, int64_t row, int64_t rows, Unit *u) {
    const int64_t each = a->heads / a->kv_heads, pairs = rows * each, panels = (a->dim + PANEL - 1) / PANEL;
    const int64_t first_position = a->contexts[seq] - a->lengths[seq] + row, last = first_position + rows;
    const int64_t lowest = a->window && first_position >= a->window ? first_position - a->window + 1 : 0;
    const int64_t base = ((a->starts[seq] + row) * a->heads + kv_head * each) * a->dim;
    for (int64_t r = 0; r < rows; r++)
        memcpy(u->query + r * each * a->dim, a->query + base + r * a->heads * a->dim, (size_t)(each * a->dim) * 2);
    memset(u->out, 0, (size_t)(pairs * panels * PANEL) * 4);
    for (int64_t i = 0; i < pairs; i++) u->highest[i] = -INFINITY, u->sum[i] = 0;
    for (int64_t first = lowest / PANEL * PANEL; first < last; first += PANEL) {
        load_tile(a, seq, kv_head, first, lowest, last, u);
        memset(u->scores, 0, (size_t)(pairs * PANEL) * 4);
        products(pairs, (const uint32_t *)u->query, a->dim / 2, u->keys, a->dim / 2, u->scores, PANEL);
        for (int64_t i = 0; i < pairs; i++) {
            const int64_t position = first_position + i / each;
            const int64_t low = a->window && position >= a->window ? position - a->window + 1 : 0;
            soften(a, first, low, position + 1, i, u);
        }
        for (int64_t n = 0; n < panels; n++)
            products(pairs, (const uint32_t *)u->weights, PANEL / 2, u->values + n * PANEL / 2 * PANEL, PANEL / 2,
                     u->out + n * PANEL, panels * PANEL);
    }
    for (int64_t i = 0; i < pairs; i++)
        for (int64_t d = 0; d < a->dim; d += 16) {
            const __m512 value = _mm512_div_ps(_mm512_loadu_ps(u->out + i * panels * PANEL + d), _mm512_set1_ps(u->sum[i]));
            store_bf16(a->out + base + (i / each * a->heads + i % each) * a->dim + d, value);
        }
}

/* `units` int64 [num_units][2]: sequence and its first row of each piece of work for all kv heads; `rows_each`
 * rows at most. Heads per kv head: at most 64; dim a multiple of 32 up to 256. */
void weft_attention(const Attention *a, const int64_t *units, int64_t num_units, int64_t rows_each, int64_t threads) {
#pragma omp parallel num_threads((int)threads) if (num_units * a->kv_heads > 1)
    {
        static _Thread_local Unit *u; /* kept: fresh memory costs more in page faults than a short context */
        if (!u) u = aligned_alloc(64, (sizeof(Unit) + 63) / 64 * 64);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < num_units * a->kv_heads; i++) {
            const int64_t *unit = units + i / a->kv_heads * 2, left = a->lengths[unit[0]] - unit[1];
            attend(a, unit[0], i % a->kv_heads, unit[1], left < rows_each ? left : rows_each, u);
        }
    }
}
