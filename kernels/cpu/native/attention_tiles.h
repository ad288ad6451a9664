// The register tiles of attention: scores, and the sum of values by weights.
//
// Knows vectors of the cache; knows nothing of sequences.
#pragma once

#include <array>
#include <utility>

#include "narrow.h"
#include "pairs.h"

namespace arriero {

// Few rows take four vectors at a time, so that enough sums run side by side.
#if defined(ARRIERO_AVX2)
inline constexpr int kFewRows = 1, kSomeRows = kPanelRows;  // up to these: four vectors, two
#else
inline constexpr int kFewRows = kMaxRows / 2, kSomeRows = kMaxRows;
#endif

template <int32_t type, bool kRounded, int M, int V>
constexpr Kernel score_tile() {
#if defined(ARRIERO_BF16)
    if constexpr (kRounded) return pair_kernel<kBFloat16, M, V, 1, false, false>;
#endif
#if defined(ARRIERO_AVX2)
    return narrow_kernel<type, M, V, 1, false>;
#else
    return float_kernel<type, M, V, 1, false>;
#endif
}

template <int32_t type, bool kRounded, int V, size_t... M>
constexpr auto score_kernels(std::index_sequence<M...>) {
    return std::array<Kernel, sizeof...(M)>{score_tile<type, kRounded, int(M) + 1, V>()...};
}

template <int32_t type, bool kRounded>
inline Kernel score_kernel(int rows, int vectors) {
    using Many = std::make_index_sequence<kMaxRows>;
    using Some = std::make_index_sequence<kSomeRows>;
    using Few = std::make_index_sequence<kFewRows>;
    static constexpr auto one = score_kernels<type, kRounded, 1>(Many{});
    static constexpr auto two = score_kernels<type, kRounded, 2>(Some{});
    static constexpr auto four = score_kernels<type, kRounded, 4>(Few{});
    return (vectors == 4 ? four.data() : vectors == 2 ? two.data() : one.data())[rows - 1];
}

// How many vectors the next tile takes, of `left` that remain, when tiles have `rows` rows or less.
inline int tile_vectors(int rows, int left) {
    return left >= 4 && rows <= kFewRows ? 4 : left >= 2 && rows <= kSomeRows ? 2 : 1;
}

// M rows of weights by V vectors of values, along the groups of a split: out [M][V * 16].
struct ValueTile {
    const char* p;     // float32, or bf16 for the rounded kernel
    int64_t p_stride;  // bytes
    const char* const* groups;  // each group's values, at the tile's first vector
    const int* counts;          // slots of each group
    int num_groups;
    int64_t vector_stride;
    float* out;
    int64_t out_stride;
};

template <int32_t type, int M, int V>
void value_kernel(const ValueTile& t) {
    constexpr int64_t step = vector_bytes(type);
    F16 acc[M][V];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[m][v] = zero();
    for (int g = 0; g < t.num_groups; ++g) {
        const char* w = t.groups[g];
        auto p = [&](int m, int slot) {
            return set1(reinterpret_cast<const float*>(t.p + m * t.p_stride)[g * kLanes + slot]);
        };
        const int pairs = t.counts[g] / 2;
#if defined(ARRIERO_AVX2)
        for (int i = 0; i < pairs; ++i) {
            auto vector = [&](int v) { return w + v * t.vector_stride + i * step; };
            add_input<type, 0>(acc, vector, [&](int m) { return p(m, 2 * i).a; });
            add_input<type, 1>(acc, vector, [&](int m) { return p(m, 2 * i + 1).a; });
        }
#else
        for (int i = 0; i < pairs; ++i) {
            F16 first[V], second[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v)
                expand<type>(w + v * t.vector_stride + i * step, first[v], second[v]);
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m) {
                F16 x = p(m, 2 * i);
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) acc[m][v] = fma(x, first[v], acc[m][v]);
            }
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m) {
                F16 x = p(m, 2 * i + 1);
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) acc[m][v] = fma(x, second[v], acc[m][v]);
            }
        }
#endif
        if (t.counts[g] % 2) {  // the other slot of the pair was never written: leave it out
            for (int v = 0; v < V; ++v) {
                F16 first, second;
                expand<type>(w + v * t.vector_stride + pairs * step, first, second);
#pragma GCC unroll 16
                for (int m = 0; m < M; ++m)
                    acc[m][v] = fma(p(m, 2 * pairs), first, acc[m][v]);
            }
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) store(t.out + m * t.out_stride + v * kLanes, acc[m][v]);
}

#if defined(ARRIERO_BF16)
// The same with weights rounded to bf16, two slots at once.
template <int M, int V>
void value_pair_kernel(const ValueTile& t) {
    F16 acc[M][V];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[m][v] = zero();
    for (int g = 0; g < t.num_groups; ++g) {
        const char* w = t.groups[g];
        const int pairs = (t.counts[g] + 1) / 2;
        // Of an odd last slot's pair, the other was never written: clear it.
        const __m512i last = _mm512_set1_epi32(t.counts[g] % 2 ? 0xffff : -1);
        for (int i = 0; i < pairs; ++i) {
            __m512i values[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v)
                values[v] = _mm512_loadu_si512(w + v * t.vector_stride + i * 64);
            if (i == pairs - 1) {
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) values[v] = _mm512_and_si512(values[v], last);
            }
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m) {
                __m512i x = _mm512_set1_epi32(
                    reinterpret_cast<const int*>(t.p + m * t.p_stride)[g * (kLanes / 2) + i]);
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v)
                    acc[m][v] = _mm512_dpbf16_ps(acc[m][v], (__m512bh)x, (__m512bh)values[v]);
            }
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) store(t.out + m * t.out_stride + v * kLanes, acc[m][v]);
}
#endif

using ValueKernel = void (*)(const ValueTile&);

template <int32_t type, bool kRounded, int M, int V>
constexpr ValueKernel value_tile() {
#if defined(ARRIERO_BF16)
    if constexpr (kRounded) return value_pair_kernel<M, V>;
#endif
    return value_kernel<type, M, V>;
}

template <int32_t type, bool kRounded, int V, size_t... M>
constexpr auto value_kernels(std::index_sequence<M...>) {
    return std::array<ValueKernel, sizeof...(M)>{value_tile<type, kRounded, int(M) + 1, V>()...};
}

template <int32_t type, bool kRounded>
inline ValueKernel value_kernel_for(int rows, int vectors) {
    using Many = std::make_index_sequence<kMaxRows>;
    using Some = std::make_index_sequence<kSomeRows>;
    using Few = std::make_index_sequence<kFewRows>;
    static constexpr auto one = value_kernels<type, kRounded, 1>(Many{});
    static constexpr auto two = value_kernels<type, kRounded, 2>(Some{});
    static constexpr auto four = value_kernels<type, kRounded, 4>(Few{});
    return (vectors == 4 ? four.data() : vectors == 2 ? two.data() : one.data())[rows - 1];
}

}  // namespace arriero
