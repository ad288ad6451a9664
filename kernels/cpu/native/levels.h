// Inputs rounded to int8, for products that add whole numbers.
//
// Knows how a group of inputs is rounded and where its levels lie in a row; knows nothing of
// weights. A group is 32 inputs of a row: its scale is the greatest magnitude / 127, and a level is
// the nearest whole number to input * (127 / greatest magnitude), the even one of two. So the
// levels of a row depend on that row alone.
#pragma once

#include <algorithm>

#include "matrix.h"

namespace arriero {

inline constexpr int kLevelGroup = 32;
inline constexpr float kLeastMagnitude = 1e-30f;  // a group below becomes zeros: 1 / it is finite

// Whether inputs of this matrix are rounded to int8.
inline bool takes_levels(const Matrix& m) { return m.type == kInt8Dot || m.type == kInt4Dot; }

// The levels of a row and, for each group, its scale and its scale times the sum of its levels.
struct Levels {
    int8_t* levels;
    float* factors;  // [group][2]
};

inline constexpr int64_t levels_bytes(int64_t features) {
    return features + features / kLevelGroup * 8;
}

// The order of a group's levels: for int4, of each eight inputs the even ones come first, as the
// low halves of the weights' bytes do.
inline constexpr int level_place(bool four_bits, int input) {
    return four_bits ? input / 8 * 8 + input % 8 / 2 + input % 2 * 4 : input;
}

// Scale of a group, and what its inputs are multiplied by; NaN where an input is NaN.
struct GroupScale {
    float scale, inverse;

    explicit GroupScale(float greatest) {
        const bool zeros = greatest < kLeastMagnitude;
        scale = zeros ? 0.0f : greatest / 127.0f;
        inverse = zeros ? 0.0f : 127.0f / greatest;
    }
};

#if defined(__AVX2__)

inline int sum_lanes(__m256i x) {
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}

// Magnitudes are compared as whole numbers: a NaN is then the greatest.
inline float greatest_of(const __m256 (&x)[4]) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i top = _mm256_setzero_si256();
    for (const __m256& part : x)
        top = _mm256_max_epi32(top, _mm256_and_si256(_mm256_castps_si256(part), magnitude));
    __m128i max = _mm_max_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
    max = _mm_max_epi32(max, _mm_shuffle_epi32(max, 0x4e));
    max = _mm_max_epi32(max, _mm_shuffle_epi32(max, 0xb1));
    return bits_to_float(uint32_t(_mm_cvtsi128_si32(max)));
}

inline void round_group(const float* from, bool four_bits, int8_t* levels, float* factors) {
    __m256 x[4];
    __m256i whole[4];
    for (int i = 0; i < 4; ++i) x[i] = _mm256_loadu_ps(from + 8 * i);
    const GroupScale group(greatest_of(x));
    const __m256 inverse = _mm256_set1_ps(group.inverse);
    for (int i = 0; i < 4; ++i) whole[i] = _mm256_cvtps_epi32(_mm256_mul_ps(x[i], inverse));
    const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(whole[0], whole[1]),
                                              _mm256_packs_epi32(whole[2], whole[3]));
    __m256i level = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), level);
    const int sum = sum_lanes(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    if (four_bits)
        level = _mm256_shuffle_epi8(level, _mm256_broadcastsi128_si256(_mm_setr_epi8(
                                               0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(levels), level);
    factors[0] = group.scale;
    factors[1] = group.scale * float(sum);
}

#else

inline void round_group(const float* from, bool four_bits, int8_t* levels, float* factors) {
    uint32_t top = 0;
    for (int i = 0; i < kLevelGroup; ++i)
        top = std::max(top, float_to_bits(from[i]) & 0x7fffffffu);
    const GroupScale group(bits_to_float(top));
    const float magic = 12582912.0f;  // 1.5 * 2**23: the sum has no fraction bits left
    int sum = 0;
    for (int i = 0; i < kLevelGroup; ++i) {
        const float rounded = (from[i] * group.inverse + magic) - magic;
        const int level = rounded >= -127.0f && rounded <= 127.0f ? int(rounded) : -128;
        levels[level_place(four_bits, i)] = int8_t(level);
        sum += level;
    }
    factors[0] = group.scale;
    factors[1] = group.scale * float(sum);
}

#endif

}  // namespace arriero
