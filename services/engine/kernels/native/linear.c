/* y = x W + bias for x86 with AVX-512 BF16: x and y bf16, W of 4, 8 or 16 bits.
 *
 * The weight. Outputs lie in panels of 64, four blocks of 16 lanes; each lane takes pairs of inputs, as VDPBF16PS
 * does. With 4 bits, a block's next 8 inputs are one 64-byte vector: lane n is output n, inputs 0, 2, 4, 6 are the
 * nibbles of its lower half and 1, 3, 5, 7 of its upper half. Shifting by 4 j puts pair j where VPERMW looks its
 * index up, and a table of 16 bf16 numbers (twice, since the index has a fifth bit) turns 32 codes into an operand:
 * 3 shifts and 4 look-ups for 128 weights. With 8 bits a pair of a block is 32 signed bytes, with 16 bits 64 bytes.
 *
 * The arithmetic. Codes are taken as whole numbers (q - 8 with 4 bits), exact in bf16; products are exact in fp32.
 * For each group
 *     total += s * sum(x code) + s (8 - z) * sum(x),
 * so scale and zero point cost two multiply-adds for a whole group and are never rounded to bf16.
 *
 * One output of one row is always summed in the same order: pair by pair within a group, group by group. How many
 * rows there are decides only which of them share a loaded operand. A row's bits are those it has alone.
 */
#include "weft_cpu.h"

typedef struct {
    const uint8_t *codes;   /* [panels][groups][group / 8][4][64] (4 bits), [group / 2][4][32 or 64] (8, 16) bytes */
    const uint32_t *params; /* [panels][groups][64] bits of fp32 scales; with 4 bits the low 4 are the zero point */
    const float *bias;      /* [panels * 64] or NULL */
    int64_t in_features, out_features, group_size, bits;
} Weight;

INLINE __m512i nibble_table(void) {
    const int16_t v[16] = {(int16_t)0xC100, (int16_t)0xC0E0, (int16_t)0xC0C0, (int16_t)0xC0A0,
                           (int16_t)0xC080, (int16_t)0xC040, (int16_t)0xC000, (int16_t)0xBF80,
                           0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0}; /* -8 .. 7 */
    return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)v));
}

INLINE __m512i from_bytes(const uint8_t *at) {
    const __m512i low = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)at));
    const __m512i high = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(at + 16)));
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(high), _mm512_cvtepi32_ps(low));
}

/* total[rows][64] += one group. x: bf16 pairs [rows][group / 2]; sums[rows]: the sum of each row's group. */
INLINE void tile(const int rows, const int bits, const uint8_t *codes, const uint32_t *params, const uint32_t *x,
                 const float *sums, int64_t num_pairs, float *total) {
    const __m512i lut = nibble_table();
    __m512 acc[MAX_ROWS][BLOCKS];
    for (int r = 0; r < rows; r++)
        for (int b = 0; b < BLOCKS; b++) acc[r][b] = _mm512_setzero_ps();
    for (int64_t p = 0; p < num_pairs; p += 4) {
        const uint8_t *at = codes + p * PANEL * bits / 4;
        __m512i nibbles[BLOCKS];
        /* The processor's own prefetch stops at a page; a panel is a stream of many. */
        for (int line = 0; line < bits; line++) _mm_prefetch((const char *)at + 4096 + 64 * line, _MM_HINT_T0);
        if (bits == 4)
            for (int b = 0; b < BLOCKS; b++) nibbles[b] = _mm512_loadu_si512(at + 64 * b);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            for (int b = 0; b < BLOCKS; b++) {
                __m512i w;
                if (bits == 4)
                    w = _mm512_permutexvar_epi16(j ? _mm512_srli_epi16(nibbles[b], 4 * j) : nibbles[b], lut);
                else if (bits == 8)
                    w = from_bytes(at + 32 * (BLOCKS * j + b));
                else
                    w = _mm512_loadu_si512(at + 64 * (BLOCKS * j + b));
                for (int r = 0; r < rows; r++)
                    acc[r][b] = dot_pairs(acc[r][b], w, _mm512_set1_epi32((int)x[r * num_pairs + p + j]));
            }
    }
    for (int b = 0; b < BLOCKS; b++) {
        const __m512i param = _mm512_loadu_si512(params + 16 * b), low = _mm512_set1_epi32(bits == 4 ? 15 : 0);
        const __m512 scale = _mm512_castsi512_ps(_mm512_andnot_si512(low, param));
        const __m512i zero = _mm512_sub_epi32(_mm512_set1_epi32(8), _mm512_and_si512(low, param));
        const __m512 offset = _mm512_mul_ps(_mm512_cvtepi32_ps(zero), scale);
        for (int r = 0; r < rows; r++) {
            float *to = total + r * PANEL + 16 * b;
            __m512 t = _mm512_fmadd_ps(acc[r][b], scale, _mm512_loadu_ps(to));
            if (bits == 4) t = _mm512_fmadd_ps(_mm512_set1_ps(sums[r]), offset, t);
            _mm512_storeu_ps(to, t);
        }
    }
}

#define TILES(bits)                                                                    \
    switch (rows) {                                                                    \
    case 1: tile(1, bits, codes, params, x, sums, num_pairs, total); break;            \
    case 2: tile(2, bits, codes, params, x, sums, num_pairs, total); break;            \
    case 3: tile(3, bits, codes, params, x, sums, num_pairs, total); break;            \
    default: tile(4, bits, codes, params, x, sums, num_pairs, total);                  \
    }                                                                                  \
    break;

static void any_tile(int64_t bits, int64_t rows, const uint8_t *codes, const uint32_t *params, const uint32_t *x,
                     const float *sums, int64_t num_pairs, float *total) {
    switch (bits) {
    case 4: TILES(4)
    case 8: TILES(8)
    default: TILES(16)
    }
}

/* x [rows][in] -> [groups][rows][group], so that a tile's rows follow one another (rows 4 KiB apart would share
 * the same few lines of the cache), and the sum of each row's group. */
static void pack_row(const Weight *w, const uint16_t *x, int64_t row, int64_t rows, uint16_t *packed, float *sums) {
    const int64_t group = w->group_size;
    for (int64_t g = 0; g < w->in_features / group; g++) {
        const uint16_t *from = x + row * w->in_features + g * group;
        uint16_t *to = packed + (g * rows + row) * group;
        __m512 sum = _mm512_setzero_ps();
        for (int64_t k = 0; k < group; k += 16) {
            const __mmask16 mask = group - k >= 16 ? 0xFFFF : (__mmask16)((1 << (group - k)) - 1);
            const __m256i v = _mm256_maskz_loadu_epi16(mask, from + k);
            _mm256_mask_storeu_epi16(to + k, mask, v);
            sum = _mm512_add_ps(sum, from_bf16(v));
        }
        sums[g * rows + row] = _mm512_reduce_add_ps(sum);
    }
}

static void store_panel(const Weight *w, int64_t panel, int64_t rows, const float *total, uint16_t *y) {
    for (int64_t r = 0; r < rows; r++)
        for (int b = 0; b < BLOCKS; b++) {
            const int64_t first = panel * PANEL + 16 * b, left = w->out_features - first;
            if (left <= 0) break;
            __m512 t = _mm512_loadu_ps(total + r * PANEL + 16 * b);
            if (w->bias) t = _mm512_add_ps(t, _mm512_loadu_ps(w->bias + first));
            const __mmask16 mask = left >= 16 ? 0xFFFF : (__mmask16)((1 << left) - 1);
            _mm256_mask_storeu_epi16(y + r * w->out_features + first, mask, to_bf16(t));
        }
}

/* Bytes of scratch that `rows` rows and `threads` threads take: sums, packed x, and totals of each thread. */
static int64_t align(int64_t bytes) { return (bytes + 63) / 64 * 64; }

int64_t weft_linear_scratch(const Weight *w, int64_t rows, int64_t threads) {
    const int64_t groups = w->in_features / w->group_size;
    return align(groups * rows * 4) + align(rows * w->in_features * 2) + threads * rows * PANEL * 4;
}

#define SMALL_PRODUCT 1048576 /* multiplications below which a second thread costs more than it brings */

/* x bf16 [rows][in] -> y bf16 [rows][out]. The group is a multiple of 8, the number of inputs one of it. */
void weft_linear(const Weight *w, const uint16_t *x, uint16_t *y, int64_t rows, uint8_t *scratch, int64_t threads) {
    const int64_t group = w->group_size, groups = w->in_features / group;
    const int64_t panels = (w->out_features + PANEL - 1) / PANEL, group_bytes = group * PANEL * w->bits / 8;
    float *sums = (float *)scratch;
    uint16_t *packed = (uint16_t *)(scratch + align(groups * rows * 4));
    float *totals = (float *)((uint8_t *)packed + align(rows * w->in_features * 2));
#pragma omp parallel num_threads((int)threads) if (rows * w->in_features * w->out_features > SMALL_PRODUCT)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) pack_row(w, x, row, rows, packed, sums);
        float *total = totals + (int64_t)omp_get_thread_num() * rows * PANEL;
        /* Handed out one by one: a thread that the system holds up does not hold up the others' half. */
#pragma omp for schedule(dynamic, 1)
        for (int64_t n = 0; n < panels; n++) {
            memset(total, 0, (size_t)(rows * PANEL * 4));
            for (int64_t g = 0; g < groups; g++)
                for (int64_t r = 0; r < rows; r += MAX_ROWS)
                    any_tile(w->bits, rows - r, w->codes + (n * groups + g) * group_bytes,
                             w->params + (n * groups + g) * PANEL, (const uint32_t *)(packed + (g * rows + r) * group),
                             sums + g * rows + r, group / 2, total + r * PANEL);
            store_panel(w, n, rows, total, y);
        }
    }
}
