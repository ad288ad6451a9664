// Sixteen floats at a time, on AVX-512, AVX2 + FMA, or whatever the compiler makes of plain C++.
//
// Knows instructions; knows nothing of matrices. Everything else in this folder is written once
// against this file. Compiled with -ffp-contract=off: a multiply-add is fused where `fma` says so
// and nowhere else, so that every instance of a template rounds alike.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define ARRIERO_AVX512 1
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__)
#define ARRIERO_AVX2 1
#include <immintrin.h>
#endif

#if defined(ARRIERO_AVX512) && defined(__AVX512BF16__)
#define ARRIERO_BF16 1
#endif

namespace arriero {

inline constexpr int kLanes = 16;
using bf16 = uint16_t;

inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float bf16_to_float(bf16 value) { return bits_to_float(uint32_t(value) << 16); }

// Round to nearest even; a NaN stays one.
inline bf16 float_to_bf16(float value) {
    uint32_t bits = float_to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16((bits >> 16) | 0x40u);
    return bf16((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#if defined(ARRIERO_AVX512)

using F16 = __m512;

inline F16 zero() { return _mm512_setzero_ps(); }
inline F16 set1(float x) { return _mm512_set1_ps(x); }
inline F16 load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F16 a) { _mm512_storeu_ps(p, a); }
// A masked store does not forward to the next load, so the whole vector goes without a mask.
inline F16 load_n(const float* p, int n) {
    return n == kLanes ? load(p) : _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1u), p);
}
inline void store_n(float* p, F16 a, int n) {
    if (n == kLanes)
        store(p, a);
    else
        _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1u), a);
}
inline F16 add(F16 a, F16 b) { return _mm512_add_ps(a, b); }
inline F16 sub(F16 a, F16 b) { return _mm512_sub_ps(a, b); }
inline F16 mul(F16 a, F16 b) { return _mm512_mul_ps(a, b); }
inline F16 div(F16 a, F16 b) { return _mm512_div_ps(a, b); }
inline F16 max(F16 a, F16 b) { return _mm512_max_ps(a, b); }
inline F16 min(F16 a, F16 b) { return _mm512_min_ps(a, b); }
inline F16 fma(F16 a, F16 b, F16 c) { return _mm512_fmadd_ps(a, b, c); }
// A bit for each lane where a >= b, the lowest for the first.
inline uint32_t at_least(F16 a, F16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline F16 round_even(F16 a) { return _mm512_roundscale_ps(a, 8); }
// p * 2**n for whole n, p near 1; from kLowestPower down it is 0.
inline constexpr float kLowestPower = -152.0f;
inline F16 scale_by_power(F16 p, F16 n) { return _mm512_scalef_ps(p, n); }
// Lanes n and up become `fill`.
inline F16 keep(F16 a, int n, F16 fill) {
    return _mm512_mask_mov_ps(fill, __mmask16((1u << n) - 1u), a);
}
// Sixteen pairs of bf16: the first of each pair, the second of each pair.
inline void expand_bf16(const void* p, F16& first, F16& second) {
    __m512i w = _mm512_loadu_si512(p);
    first = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
    second = _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(int(0xffff0000))));
}
// Sixteen bf16 in a row.
inline F16 load_bf16(const bf16* p) {
    __m512i w = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
}
inline void expand_int8(const void* p, F16& first, F16& second) {
    const __m128i* q = static_cast<const __m128i*>(p);
    first = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(q)));
    second = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(q + 1)));
}
inline F16 load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// E4M3 without its NaNs (packing refuses them): the sign stays, and exponent and mantissa take their
// places in a half, whose bias is 8 larger. (In a float they could be denormal, and slow.)
inline F16 fp8_to_float(const char* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m256i words = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7);
    const __m256i halves = _mm256_and_si256(words, _mm256_set1_epi16(int16_t(0xbfff)));
    return _mm512_mul_ps(_mm512_cvtph_ps(halves), _mm512_set1_ps(0x1p8f));
}
inline void expand_fp8(const void* p, F16& first, F16& second) {
    const char* q = static_cast<const char*>(p);
    first = fp8_to_float(q);
    second = fp8_to_float(q + 16);
}
// Sixteen bytes: low nibbles are the first of each pair, high nibbles the second; 0 .. 15.
inline void expand_int4(const void* p, F16& first, F16& second) {
    const F16 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i w = _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    first = _mm512_permutexvar_ps(w, values);  // reads the low four bits of a lane alone
    second = _mm512_permutexvar_ps(_mm512_srli_epi32(w, 4), values);
}
inline void store_bf16(bf16* p, F16 a) {
#if defined(ARRIERO_BF16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a));
#else
    __m512i bits = _mm512_castps_si512(a);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    up = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
#endif
}

#elif defined(ARRIERO_AVX2)

struct F16 {
    __m256 a, b;
};

inline F16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F16 x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
inline F16 add(F16 x, F16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F16 sub(F16 x, F16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F16 mul(F16 x, F16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F16 div(F16 x, F16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F16 max(F16 x, F16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F16 min(F16 x, F16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F16 fma(F16 x, F16 y, F16 z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline uint32_t at_least(F16 x, F16 y) {
    const __m256 a = _mm256_cmp_ps(x.a, y.a, _CMP_GE_OQ), b = _mm256_cmp_ps(x.b, y.b, _CMP_GE_OQ);
    return uint32_t(_mm256_movemask_ps(a)) | uint32_t(_mm256_movemask_ps(b)) << 8;
}
inline F16 round_even(F16 x) { return {_mm256_round_ps(x.a, 8), _mm256_round_ps(x.b, 8)}; }
inline constexpr float kLowestPower = -127.0f;
inline __m256 pow2(__m256 n) {
    __m256i bits = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23));
}
inline F16 scale_by_power(F16 p, F16 n) {
    return {_mm256_mul_ps(p.a, pow2(n.a)), _mm256_mul_ps(p.b, pow2(n.b))};
}
inline F16 keep(F16 x, int n, F16 fill) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256i low = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane);
    __m256i high = _mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), lane);
    return {_mm256_blendv_ps(fill.a, x.a, _mm256_castsi256_ps(low)),
            _mm256_blendv_ps(fill.b, x.b, _mm256_castsi256_ps(high))};
}
inline __m256i load_8x32(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
inline void expand_bf16(const void* p, F16& first, F16& second) {
    const char* q = static_cast<const char*>(p);
    __m256i a = load_8x32(q), b = load_8x32(q + 32);
    const __m256i top = _mm256_set1_epi32(int(0xffff0000));
    first = {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)),
             _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
    second = {_mm256_castsi256_ps(_mm256_and_si256(a, top)),
              _mm256_castsi256_ps(_mm256_and_si256(b, top))};
}
inline __m256 bf16_to_8_floats(const bf16* p) {
    __m256i w = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(w, 16));
}
inline F16 load_bf16(const bf16* p) { return {bf16_to_8_floats(p), bf16_to_8_floats(p + 8)}; }
inline __m128i load_8x8(const char* p) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
}
inline __m256 int8_to_8_floats(const char* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load_8x8(p)));
}
inline void expand_int8(const void* p, F16& first, F16& second) {
    const char* q = static_cast<const char*>(p);
    first = {int8_to_8_floats(q), int8_to_8_floats(q + 8)};
    second = {int8_to_8_floats(q + 16), int8_to_8_floats(q + 24)};
}
inline __m256 f16_to_8_floats(const char* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline F16 load_f16(const uint16_t* p) {
    const char* q = reinterpret_cast<const char*>(p);
    return {f16_to_8_floats(q), f16_to_8_floats(q + 16)};
}
// E4M3 as above.
inline __m256 fp8_to_float(const char* p) {
    const __m128i words = _mm_slli_epi16(_mm_cvtepi8_epi16(load_8x8(p)), 7);
    const __m128i halves = _mm_and_si128(words, _mm_set1_epi16(int16_t(0xbfff)));
    return _mm256_mul_ps(_mm256_cvtph_ps(halves), _mm256_set1_ps(0x1p8f));
}
inline void expand_fp8(const void* p, F16& first, F16& second) {
    const char* q = static_cast<const char*>(p);
    first = {fp8_to_float(q), fp8_to_float(q + 8)};
    second = {fp8_to_float(q + 16), fp8_to_float(q + 24)};
}
inline void expand_int4(const void* p, F16& first, F16& second) {
    const char* q = static_cast<const char*>(p);
    const __m256i nibble = _mm256_set1_epi32(15);
    __m256i a = _mm256_cvtepu8_epi32(load_8x8(q)), b = _mm256_cvtepu8_epi32(load_8x8(q + 8));
    first = {_mm256_cvtepi32_ps(_mm256_and_si256(a, nibble)),
             _mm256_cvtepi32_ps(_mm256_and_si256(b, nibble))};
    second = {_mm256_cvtepi32_ps(_mm256_srli_epi32(a, 4)),
              _mm256_cvtepi32_ps(_mm256_srli_epi32(b, 4))};
}

#else

// The compiler's vector extension: four SSE or NEON registers, or scalars.
typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));

inline F16 zero() { return F16{}; }
inline F16 set1(float x) { return F16{} + x; }
inline F16 load(const float* p) {
    F16 a;
    std::memcpy(&a, p, 64);
    return a;
}
inline void store(float* p, F16 a) { std::memcpy(p, &a, 64); }
inline F16 add(F16 a, F16 b) { return a + b; }
inline F16 sub(F16 a, F16 b) { return a - b; }
inline F16 mul(F16 a, F16 b) { return a * b; }
inline F16 div(F16 a, F16 b) { return a / b; }
inline F16 max(F16 a, F16 b) { return a > b ? a : b; }
inline F16 min(F16 a, F16 b) { return a < b ? a : b; }
inline F16 fma(F16 a, F16 b, F16 c) { return a * b + c; }
inline uint32_t at_least(F16 a, F16 b) {
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= uint32_t(a[i] >= b[i]) << i;
    return bits;
}
inline F16 round_even(F16 a) {
    const F16 magic = set1(12582912.0f);  // 1.5 * 2**23: the sum has no fraction bits left
    return (a + magic) - magic;
}
inline constexpr float kLowestPower = -127.0f;
inline F16 scale_by_power(F16 p, F16 n) {
    I16 bits = (__builtin_convertvector(n, I16) + 127) << 23;
    F16 power;
    std::memcpy(&power, &bits, 64);
    return p * power;
}
inline F16 keep(F16 a, int n, F16 fill) {
    for (int i = n < 0 ? 0 : n; i < kLanes; ++i) a[i] = fill[i];
    return a;
}
inline void expand_bf16(const void* p, F16& first, F16& second) {
    I16 w;
    std::memcpy(&w, p, 64);
    I16 low = w << 16, high = w & int32_t(0xffff0000);
    std::memcpy(&first, &low, 64);
    std::memcpy(&second, &high, 64);
}
inline F16 load_bf16(const bf16* p) {
    F16 a;
    for (int i = 0; i < kLanes; ++i) a[i] = bf16_to_float(p[i]);
    return a;
}
inline void expand_int8(const void* p, F16& first, F16& second) {
    const int8_t* q = static_cast<const int8_t*>(p);
    for (int i = 0; i < kLanes; ++i) first[i] = q[i], second[i] = q[16 + i];
}
inline float f16_to_float(uint16_t half);
inline F16 load_f16(const uint16_t* p) {
    F16 a;
    for (int i = 0; i < kLanes; ++i) a[i] = f16_to_float(p[i]);
    return a;
}
inline float fp8_to_float(uint8_t byte) {
    return bits_to_float(uint32_t(byte & 0x80) << 24 | uint32_t(byte & 0x7f) << 20) * 0x1p120f;
}
inline void expand_fp8(const void* p, F16& first, F16& second) {
    const uint8_t* q = static_cast<const uint8_t*>(p);
    for (int i = 0; i < kLanes; ++i) first[i] = fp8_to_float(q[i]), second[i] = fp8_to_float(q[16 + i]);
}
inline void expand_int4(const void* p, F16& first, F16& second) {
    const uint8_t* q = static_cast<const uint8_t*>(p);
    for (int i = 0; i < kLanes; ++i) first[i] = q[i] & 15, second[i] = q[i] >> 4;
}

#endif

inline void expand_f16(const void* p, F16& first, F16& second) {
    const uint16_t* q = static_cast<const uint16_t*>(p);
    first = load_f16(q);
    second = load_f16(q + kLanes);
}

inline float f16_to_float(uint16_t half) {
    uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000u | (rest & 0x3ff) << 13);
    return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
}

inline uint16_t float_to_f16(float value) {
    uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return uint16_t(sign | 0x7e00u);
    if (bits >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
    if (bits < 0x38800000u) {  // below the normals: add so that the unit of the sum is 2**-24
        return uint16_t(sign | (float_to_bits(bits_to_float(bits) + 0.5f) - 0x3f000000u));
    }
    return uint16_t(sign | ((bits + 0xfffu + (bits >> 13 & 1u)) - 0x38000000u) >> 13);
}

// E4M3, to nearest even; beyond 448 to 448. A NaN becomes 448 too: the kernels read no NaN.
inline uint8_t float_to_fp8(float value) {
    const uint32_t bits = float_to_bits(value), sign = bits >> 24 & 0x80u, rest = bits & 0x7fffffffu;
    if (rest >= 0x43e00000u) return uint8_t(sign | 0x7eu);
    if (rest < 0x3c800000u)  // below the normals: add so that the unit of the sum is 2**-9
        return uint8_t(sign | (float_to_bits(bits_to_float(rest) + 0x1p14f) - 0x46800000u));
    return uint8_t(sign | (rest + 0x7ffffu + (rest >> 20 & 1u) - 0x3c000000u) >> 20);
}

#if !defined(ARRIERO_AVX512)
inline F16 load_n(const float* p, int n) {
    if (n == kLanes) return load(p);
    float values[kLanes] = {};
    std::memcpy(values, p, size_t(n) * 4);
    return load(values);
}
inline void store_n(float* p, F16 a, int n) {
    if (n == kLanes) return store(p, a);
    float values[kLanes];
    store(values, a);
    std::memcpy(p, values, size_t(n) * 4);
}
inline void store_bf16(bf16* p, F16 a) {
    float values[kLanes];
    store(values, a);
    for (int i = 0; i < kLanes; ++i) p[i] = float_to_bf16(values[i]);
}
#endif

// Always the same tree.
inline float reduce_add(F16 a) {
#if defined(ARRIERO_AVX2)
    const __m256 eight = _mm256_add_ps(a.a, a.b);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
#else
    float v[kLanes];
    store(v, a);
    for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) v[i] += v[i + width];
    return v[0];
#endif
}

inline float reduce_max(F16 a) {
    float v[kLanes];
    store(v, a);
    for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) v[i] = v[i] > v[i + width] ? v[i] : v[i + width];
    return v[0];
}

}  // namespace arriero
