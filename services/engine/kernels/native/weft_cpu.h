/* What the two files of kernels share. All need AVX-512 F, BW, VL and BF16. */
#ifndef WEFT_CPU_H
#define WEFT_CPU_H
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define PANEL 64 /* outputs, keys or dimensions side by side: four blocks of 16 lanes */
#define BLOCKS 4
#define MAX_ROWS 4 /* rows of x that share a loaded operand: 16 sums of the 32 registers */
#define INLINE static inline __attribute__((always_inline))

INLINE __m512 from_bf16(__m256i v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

INLINE __m512 load_bf16(const uint16_t *at) { return from_bf16(_mm256_loadu_si256((const __m256i *)at)); }

/* Rounds to nearest, ties to even. */
INLINE __m256i to_bf16(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }

INLINE void store_bf16(uint16_t *at, __m512 v) { _mm256_storeu_si256((__m256i *)at, to_bf16(v)); }

/* sum += the products of 16 pairs with one pair of x. */
INLINE __m512 dot_pairs(__m512 sum, __m512i operand, __m512i pair) {
    return _mm512_dpbf16_ps(sum, (__m512bh)operand, (__m512bh)pair);
}
#endif
