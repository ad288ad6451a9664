// AVX-512, VNNI, bf16 and AMX in plain C++: forced in before the kernels by emulate.sh.
//
// SIMDe has most of AVX-512; here is what Debian's SIMDe 0.7.4 lacks, or rounds otherwise than
// Intel's manual says. At the end the macros of the compiler's flags say that the instructions are
// there. Knows instructions; knows nothing of the kernels.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "tiles.h"

namespace emulated {

struct Halves {
    __m256 low, high;

    Halves(__m256 low, __m256 high) : low(low), high(high) {}
    explicit Halves(__m512 x) { std::memcpy(this, &x, 64); }
    __m512 whole() const {
        __m512 x;
        std::memcpy(&x, this, 64);
        return x;
    }
};

// Denormals become zeros of their sign. (Of results a last rounding up to the least normal number
// is kept, which a processor flushes too.)
inline __m256 flush(__m256 x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    const __m256 tiny =
        _mm256_cmp_ps(_mm256_andnot_ps(sign, x), _mm256_set1_ps(0x1p-126f), _CMP_LT_OQ);
    return _mm256_blendv_ps(x, _mm256_and_ps(x, sign), tiny);
}

// sum + the product of the first (kSecond: second) bf16 of each pair, rounded once.
template <bool kSecond>
inline __m256 add_product(__m256 sum, __m256i a, __m256i b) {
    auto number = [](__m256i pairs) {
        return flush(_mm256_castsi256_ps(
            kSecond ? _mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000)))
                    : _mm256_slli_epi32(pairs, 16)));
    };
    return flush(_mm256_fmadd_ps(number(a), number(b), flush(sum)));
}

// VDPBF16PS: the second of each pair is added before the first.
inline __m512 dpbf16(__m512 sum, __m512i a, __m512i b) {
    const Halves s(sum), x(_mm512_castsi512_ps(a)), y(_mm512_castsi512_ps(b));
    auto half = [](__m256 s, __m256 x, __m256 y) {
        const __m256i a = _mm256_castps_si256(x), b = _mm256_castps_si256(y);
        return add_product<false>(add_product<true>(s, a, b), a, b);
    };
    return Halves(half(s.low, x.low, y.low), half(s.high, x.high, y.high)).whole();
}

// VCVTNEPS2BF16: to nearest, ties to even; denormals become zeros, NaNs quiet.
inline __m256i cvtneps(__m512 x) {
    uint32_t bits[16];
    uint16_t to[16];
    std::memcpy(bits, &x, 64);
    for (int i = 0; i < 16; ++i) {
        const uint32_t size = bits[i] & 0x7fffffffu;
        if (size > 0x7f800000u)
            to[i] = uint16_t(bits[i] >> 16 | 0x40u);
        else if (size < 0x00800000u)
            to[i] = uint16_t(bits[i] >> 16 & 0x8000u);
        else
            to[i] = uint16_t((bits[i] + 0x7fffu + (bits[i] >> 16 & 1u)) >> 16);
    }
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(to));
}

// VSCALEFPS: a * 2**floor(b), rounded once.
inline __m512 scalef(__m512 a, __m512 b) {
    float x[16], n[16];
    std::memcpy(x, &a, 64);
    std::memcpy(n, &b, 64);
    for (int i = 0; i < 16; ++i) {
        if (std::isnan(x[i]) || std::isnan(n[i]))
            x[i] = x[i] + n[i];
        else if (std::isinf(n[i]))
            x[i] *= n[i] > 0 ? n[i] : 0.0f;
        else
            x[i] = std::ldexp(x[i], int(std::fmax(-500.0f, std::fmin(std::floor(n[i]), 500.0f))));
    }
    std::memcpy(&a, x, 64);
    return a;
}

// Widening of 16 numbers by an AVX2 instruction for eight, whose operand is a quarter or a half.
inline __m512 cvtph(__m256i x) {
    return Halves(_mm256_cvtph_ps(_mm256_castsi256_si128(x)),
                  _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1)))
        .whole();
}
inline __m512 cvtepi32(__m512i x) {
    const Halves h(_mm512_castsi512_ps(x));
    return Halves(_mm256_cvtepi32_ps(_mm256_castps_si256(h.low)),
                  _mm256_cvtepi32_ps(_mm256_castps_si256(h.high)))
        .whole();
}
inline __m512i join(__m256i low, __m256i high) {
    return _mm512_castps_si512(
        Halves(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)).whole());
}
inline __m512i cvtepi8(__m128i x) {
    return join(_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8)));
}
inline __m512i cvtepu8(__m128i x) {
    return join(_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8)));
}
inline __m512i cvtepu16(__m256i x) {
    return join(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)),
                _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1)));
}

// VPMOVDW: the low halves of 16 numbers.
inline __m256i narrow(__m512i x) {
    uint32_t from[16];
    uint16_t to[16];
    std::memcpy(from, &x, 64);
    for (int i = 0; i < 16; ++i) to[i] = uint16_t(from[i]);
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(to));
}

// Lanes without a mask bit touch no memory.
inline __m512 load_some(uint32_t mask, const float* from) {
    float to[16];
    for (int i = 0; i < 16; ++i) to[i] = mask >> i & 1 ? from[i] : 0.0f;
    return _mm512_loadu_ps(to);
}
inline void store_some(float* to, uint32_t mask, __m512 x) {
    float from[16];
    std::memcpy(from, &x, 64);
    for (int i = 0; i < 16; ++i)
        if (mask >> i & 1) to[i] = from[i];
}

// VPDPBUSD: four products of an unsigned and a signed byte, added to 32 bits.
inline __m256i dpbusd(__m256i sum, __m256i a, __m256i b) {
    int32_t sums[8];
    uint8_t x[32];
    int8_t y[32];
    std::memcpy(sums, &sum, 32);
    std::memcpy(x, &a, 32);
    std::memcpy(y, &b, 32);
    for (int i = 0; i < 32; ++i) sums[i / 4] += int32_t(x[i]) * int32_t(y[i]);
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums));
}

}  // namespace emulated

#undef _mm512_dpbf16_ps
#undef _mm512_cvtneps_pbh
#undef _mm512_scalef_ps
#undef _mm512_cvtph_ps
#undef _mm512_cvtepi32_ps
#undef _mm512_cvtepi8_epi32
#undef _mm512_cvtepu8_epi32
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtepi32_epi16
#undef _mm512_maskz_loadu_ps
#undef _mm512_mask_storeu_ps
#undef _mm256_dpbusd_epi32
#define _mm512_dpbf16_ps(sum, a, b) emulated::dpbf16(sum, (__m512i)(a), (__m512i)(b))
#define _mm512_cvtneps_pbh(x) emulated::cvtneps(x)
#define _mm512_scalef_ps(a, b) emulated::scalef(a, b)
#define _mm512_cvtph_ps(x) emulated::cvtph(x)
#define _mm512_cvtepi32_ps(x) emulated::cvtepi32(x)
#define _mm512_cvtepi8_epi32(x) emulated::cvtepi8(x)
#define _mm512_cvtepu8_epi32(x) emulated::cvtepu8(x)
#define _mm512_cvtepu16_epi32(x) emulated::cvtepu16(x)
#define _mm512_cvtepi32_epi16(x) emulated::narrow(x)
#define _mm512_maskz_loadu_ps(mask, from) emulated::load_some(mask, from)
#define _mm512_mask_storeu_ps(to, mask, x) emulated::store_some(to, mask, x)
#define _mm256_dpbusd_epi32(sum, a, b) emulated::dpbusd(sum, a, b)

// What the flags of a variant say; emulate.sh names the variant.
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#if defined(ARRIERO_EMULATED_BF16)
#define __AVX512BF16__ 1
#define __AVX512VNNI__ 1
#endif
#if defined(ARRIERO_EMULATED_AMX)
#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#define __AMX_INT8__ 1
#endif
