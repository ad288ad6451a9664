// Products of int4 and int8 weights with inputs rounded to int8 (levels.h).
//
// Knows registers and the blocks of weights that the first cache holds; knows nothing of threads.
//
// Layout: panels as in matrix.h, of as many bytes; within a panel a step is four bytes of each of
// 32 columns: of int8 four inputs, of int4 eight, the even ones in the low halves. In_features is
// a multiple of 32, and an int4 group one too or the whole row.
//
// Same tokens: the sum of a group of 32 inputs is a whole number and exact; every output adds its
// groups, scaled, in rising order, whatever the number of rows.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "levels.h"

namespace arriero {

inline constexpr int64_t kStepBytes = 4 * kPanel;
inline constexpr int64_t kDotBlockBytes = 8 << 10;  // of a panel: a quarter of the first cache

inline constexpr int dot_inputs(int32_t type) { return type == kInt4Dot ? 8 : 4; }
inline constexpr int64_t dot_group_bytes(int32_t type) {
    return kLevelGroup / dot_inputs(type) * kStepBytes;
}

// What one call multiplies: rows of levels by a panel's columns from `column`, groups [first, last).
struct Dot {
    const char* row;  // first row's levels; the factors of its groups come after the last level
    int64_t row_stride, features;
    const char* panel;
    const char *scale, *zero;  // int4: of the panel's first group of weights; `zero` may be null
    int32_t scale_type;
    int64_t scale_bytes, scale_inputs;  // of a group of weights
    int64_t first, last, groups;
    int column;
    float* c;
    int64_t c_stride;
    const char* ahead;  // the panel that is multiplied next

    const int8_t* levels(int m, int64_t group) const {
        return reinterpret_cast<const int8_t*>(row + m * row_stride) + group * kLevelGroup;
    }
    const float* factors(int m, int64_t group) const {
        return reinterpret_cast<const float*>(row + m * row_stride + features) + 2 * group;
    }
    // Where the scales, or zero points, of a column in a group of inputs lie.
    const char* number(const char* numbers, int at, int64_t group) const {
        return numbers + group * kLevelGroup / scale_inputs * scale_bytes +
               at * element_size(scale_type);
    }
};

using DotKernel = void (*)(const Dot&);

#if defined(__AVX2__)

inline constexpr int kDotRows = 6;  // 12 sums, 2 weights, the inputs, a product

// Keep the order of the source: the compiler would load inputs early, and run out of registers.
inline __attribute__((always_inline)) void in_order(__m256i& value) {
    asm volatile("" : "+x"(value));
}

// Add the products of four bytes: to pairs of 16-bit sums of int4, which hold a whole group, or to
// 32-bit ones.
template <int32_t type>
inline __m256i add_bytes(__m256i sum, __m256i weights, __m256i x) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(sum, weights, x);
#else
    const __m256i pairs = _mm256_maddubs_epi16(weights, x);
    if constexpr (type == kInt4Dot) return _mm256_add_epi16(sum, pairs);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}

template <int32_t type>
inline __m256i whole_sums(__m256i sum) {
#if !(defined(__AVX512VNNI__) && defined(__AVX512VL__))
    if constexpr (type == kInt4Dot) return _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
#endif
    return sum;
}

inline __m256i four_levels(const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
}

inline __m256i bytes_at(const char* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

// One step of V vectors of eight columns by M rows.
template <int32_t type, int M, int V>
inline __attribute__((always_inline)) void add_step(__m256i (&sums)[M][V], const char* w,
                                                    const int8_t* x, int64_t stride) {
    if constexpr (type == kInt4Dot) {
        const __m256i low = _mm256_set1_epi8(15);
        for (int half = 0; half < 2; ++half) {
            __m256i weights[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                const __m256i bytes = bytes_at(w + v * 32);
                weights[v] = _mm256_and_si256(half ? _mm256_srli_epi16(bytes, 4) : bytes, low);
            }
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                __m256i four = four_levels(x + m * stride + half * 4);
                in_order(four);
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) {
                    sums[m][v] = add_bytes<type>(sums[m][v], weights[v], four);
                    in_order(sums[m][v]);
                }
            }
        }
    } else {
        __m256i weights[V], sizes[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            weights[v] = bytes_at(w + v * 32);
            sizes[v] = _mm256_abs_epi8(weights[v]);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            __m256i four = four_levels(x + m * stride);
            in_order(four);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                sums[m][v] = add_bytes<type>(sums[m][v], sizes[v],
                                             _mm256_sign_epi8(four, weights[v]));
                in_order(sums[m][v]);
            }
        }
    }
}

inline __m256 eight_numbers(const char* p, int32_t type) {
    if (type == kFloat16)
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
}

// Add a group's sums to c: levels times scales, less the zero point times the sum of levels.
template <int32_t type, int M, int V>
inline __attribute__((always_inline)) void add_group(const Dot& d, int64_t g,
                                                     const __m256i (&sums)[M][V]) {
    __m256 scale[V], zero[V];
    if constexpr (type == kInt4Dot) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            const int at = d.column + v * 8;
            scale[v] = eight_numbers(d.number(d.scale, at, g), d.scale_type);
            zero[v] = d.zero ? eight_numbers(d.number(d.zero, at, g), d.scale_type)
                             : _mm256_set1_ps(kInt4Zero);
        }
    }
    float* c = d.c + d.column;
    const float* factors = d.factors(0, g);
    const int64_t c_stride = d.c_stride, stride = d.row_stride / 4;
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m, c += c_stride, factors += stride) {
        const __m256 factor = _mm256_broadcast_ss(factors);
        [[maybe_unused]] const __m256 shift = _mm256_broadcast_ss(factors + 1);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            const __m256 sum = _mm256_cvtepi32_ps(whole_sums<type>(sums[m][v]));
            const __m256 before = _mm256_loadu_ps(c + v * 8);
            __m256 after;
            if constexpr (type == kInt4Dot) {
                const __m256 part = _mm256_fnmadd_ps(zero[v], shift, _mm256_mul_ps(sum, factor));
                after = _mm256_fmadd_ps(scale[v], part, before);
            } else {
                after = _mm256_fmadd_ps(sum, factor, before);
            }
            _mm256_storeu_ps(c + v * 8, after);
        }
    }
}

inline void fetch_panel(const Dot& d, int64_t at, int64_t end) {
    constexpr int64_t kFetch = 2048;  // bytes ahead
    const int64_t past = at + kFetch - end;
    const char* p = past < 0 ? d.panel + at + kFetch : d.ahead + past;
    prefetch(p);
    prefetch(p + 64);
}

template <int32_t type, int M, int V>
void dot_kernel(const Dot& d) {
    constexpr int64_t bytes = dot_group_bytes(type);
    const int64_t end = d.groups * bytes;
    for (int64_t g = d.first; g < d.last; ++g) {
        __m256i sums[M][V];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sums[m][v] = _mm256_setzero_si256();
        const char* w = d.panel + g * bytes + d.column * 4;
        const int8_t* x = d.levels(0, g);
        for (int64_t at = g * bytes; at < (g + 1) * bytes; at += kStepBytes) {
            fetch_panel(d, at, end);
            add_step<type, M, V>(sums, w, x, d.row_stride);
            w += kStepBytes;
            x += dot_inputs(type);
        }
        add_group<type, M, V>(d, g, sums);
    }
}

inline constexpr int kDotWide = 2;  // up to here a tile spans a panel, above half of one

template <int32_t type, size_t... M>
constexpr auto dot_kernels(std::index_sequence<M...>) {
    return std::array<DotKernel, sizeof...(M)>{
        dot_kernel<type, int(M) + 1, int(M) < kDotWide ? 4 : 2>...};
}

inline void dot_rows(int32_t type, int rows, Dot d) {
    using All = std::make_index_sequence<kDotRows>;
    static constexpr auto int4 = dot_kernels<kInt4Dot>(All{});
    static constexpr auto int8 = dot_kernels<kInt8Dot>(All{});
    const DotKernel kernel = (type == kInt4Dot ? int4 : int8)[rows - 1];
    for (d.column = 0; d.column < kPanel; d.column += rows <= kDotWide ? kPanel : kPanel / 2)
        kernel(d);
}

#else

inline constexpr int kDotRows = 1;

inline void dot_rows(int32_t type, int, const Dot& d) {
    const int64_t bytes = dot_group_bytes(type);
    for (int64_t g = d.first; g < d.last; ++g) {
        int32_t sums[kPanel] = {};
        const char* w = d.panel + g * bytes;
        const int8_t* x = d.levels(0, g);
        for (const char* end = w + bytes; w < end; w += kStepBytes, x += dot_inputs(type))
            for (int column = 0; column < kPanel; ++column)
                for (int i = 0; i < 4; ++i) {
                    const char byte = w[column * 4 + i];
                    if (type == kInt8Dot)
                        sums[column] += int(int8_t(byte)) * x[i];
                    else
                        sums[column] += (byte & 15) * x[i] + (uint8_t(byte) >> 4) * x[4 + i];
                }
        const float* factors = d.factors(0, g);
        for (int column = 0; column < kPanel; ++column) {
            float part = float(sums[column]) * factors[0];
            if (type == kInt4Dot) {
                const float zero =
                    d.zero ? load_element(d.scale_type, d.number(d.zero, column, g)) : kInt4Zero;
                part -= zero * factors[1];
                part *= load_element(d.scale_type, d.number(d.scale, column, g));
            }
            d.c[column] += part;
        }
    }
}

#endif

// A panel by `rows` rows, whose sums go to d.c. The inputs go by in blocks, and a block's weights
// stay in the first cache until all rows have met them.
inline void dot_panel(int32_t type, int rows, const Dot& whole) {
    const int64_t block = kDotBlockBytes / dot_group_bytes(type);
    const int tiles = int(ceil_div(rows, kDotRows));
    for (int row = 0; row < rows; ++row)
        std::memset(whole.c + row * whole.c_stride, 0, kPanel * sizeof(float));
    for (int64_t start = 0; start < whole.groups; start += block) {
        for (int tile = 0, row = 0; tile < tiles; ++tile) {
            const int count = (rows - row) / (tiles - tile);
            Dot d = whole;
            d.first = start;
            d.last = std::min(start + block, whole.groups);
            d.row = whole.row + row * whole.row_stride;
            d.c = whole.c + row * whole.c_stride;
            dot_rows(type, count, d);
            row += count;
        }
    }
}

}  // namespace arriero
