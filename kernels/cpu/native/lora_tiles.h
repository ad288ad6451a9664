// Tiles of low-rank products: a few rows of one adapter by a few rows of A, or by columns of B.
//
// Knows registers; knows nothing of slots. What is loaded of A and B is converted once for the rows
// of a tile. Each sum is a chain of its own, in the order of inputs or of ranks, whatever the tile.
#pragma once

#include <algorithm>
#include <type_traits>

#include "matrix.h"

namespace arriero {

inline F16 load_weights(const float* p) { return load(p); }
inline F16 load_weights(const bf16* p) { return load_bf16(p); }
inline F16 load_some(const float* p, int n) { return load_n(p, n); }
inline F16 load_some(const bf16* p, int n) {
    bf16 values[kLanes] = {};
    std::memcpy(values, p, size_t(n) * sizeof(bf16));
    return load_bf16(values);
}

inline constexpr int64_t kLine = 64;  // bytes
inline constexpr int kLoraRows = 4;   // rows that share what is loaded of A and B

#if defined(ARRIERO_AVX512)
inline constexpr int kLoraSums = 8;  // sums of a tile: enough chains to keep both units busy
#else
inline constexpr int kLoraSums = 4;
#endif

// Sums of products of M rows of x with N rows of A, each in a chain of its own; `ahead`: what is
// read next of A.
template <int M, int N, class Input, class Element>
inline void shrink(const Element* a, int64_t a_stride, const Element* ahead,
                   const Input* const* x, int64_t size, float* const* to) {
    F16 sums[M][N];
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) sums[m][n] = zero();
    auto add = [&](int64_t i, int count) {
        F16 v[M];
        for (int m = 0; m < M; ++m)
            v[m] = count == kLanes ? load_weights(x[m] + i) : load_some(x[m] + i, count);
        for (int n = 0; n < N; ++n) {
            const F16 w = load_weights(a + n * a_stride + i);
            for (int m = 0; m < M; ++m) sums[m][n] = fma(v[m], w, sums[m][n]);
        }
    };
    const int64_t whole = size / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
        for (int n = 0; n < N; ++n)
            prefetch(reinterpret_cast<const char*>(ahead + n * a_stride + i));
        add(i, kLanes);
    }
    if (whole < size) add(whole, int(size - whole));
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) to[m][n] = reduce_add(sums[m][n]);
}

// Add V vectors of the products of M rows' sums with B to y; `n` columns of the last vector.
template <int M, int V, class Element>
inline void expand(const Element* b, int64_t b_stride, int64_t rank, const float* const* sums,
                   float* const* y, int64_t at, int n) {
    F16 to[M][V];
    for (int m = 0; m < M; ++m)
        for (int v = 0; v < V; ++v)
            to[m][v] = load_n(y[m] + at + v * kLanes, v + 1 < V ? kLanes : n);
    for (int64_t j = 0; j < rank; ++j) {
        const Element* from = b + j * b_stride + at;
        F16 w[V];
        for (int v = 0; v < V; ++v)
            w[v] = v + 1 < V || n == kLanes ? load_weights(from + v * kLanes)
                                            : load_some(from + v * kLanes, n);
        for (int m = 0; m < M; ++m) {
            const F16 factor = set1(sums[m][j]);
            for (int v = 0; v < V; ++v) to[m][v] = fma(factor, w[v], to[m][v]);
        }
    }
    for (int m = 0; m < M; ++m)
        for (int v = 0; v < V; ++v)
            store_n(y[m] + at + v * kLanes, to[m][v], v + 1 < V ? kLanes : n);
}

// `columns` columns from y[m] on, of M rows.
template <int M, class Element>
inline void expand_rows(const Element* b, int64_t b_stride, int64_t rank, const float* const* sums,
                        float* const* y, int64_t columns) {
    constexpr int V = kLoraSums / M < 2 ? 1 : 2;
    int64_t at = 0;
    for (; at + V * kLanes <= columns; at += V * kLanes)
        expand<M, V>(b, b_stride, rank, sums, y, at, kLanes);
    for (; at < columns; at += kLanes)
        expand<M, 1>(b, b_stride, rank, sums, y, at, int(std::min<int64_t>(kLanes, columns - at)));
}

// f(integral constant) for a number of rows of a tile.
template <class F>
inline void with_rows(int64_t rows, F&& f) {
    switch (rows) {
        case 1: return f(std::integral_constant<int, 1>{});
        case 2: return f(std::integral_constant<int, 2>{});
        case 3: return f(std::integral_constant<int, 3>{});
        default: return f(std::integral_constant<int, kLoraRows>{});
    }
}

}  // namespace arriero
