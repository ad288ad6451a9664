// Products of pairs of bf16: one instruction multiplies 16 pairs and adds them in float32.
//
// Knows how weights of few bits become bf16 without a rounding: the levels of int8, the numbers of
// fp8 and int4 levels less a small whole zero point have eight significant bits or fewer. Scales
// are applied to the float32 sums. Inputs are rounded to bf16 by whoever prepares them.
#pragma once

#include "matrix.h"

#if defined(ARRIERO_BF16)

namespace arriero {

// Sixteen columns of a pair of inputs as bf16.
template <int32_t type>
inline __m512i pairs_of(const void* p, [[maybe_unused]] F16 zeros) {
    if constexpr (type == kBFloat16) {
        return _mm512_loadu_si512(p);
    } else {
        F16 first, second;
        expand<type>(p, first, second);
        if constexpr (type == kInt4) {
            first = sub(first, zeros);
            second = sub(second, zeros);
        }
        // Exact, so the low halves are zeros.
        return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(first), 16),
                               _mm512_castps_si512(second));
    }
}

// Add the products of pairs [start, end) to the sums. KEEP: leave the weights' pairs behind, for
// the tiles of other rows.
template <int32_t type, int M, int V, int STEP, bool FETCH, bool KEEP>
inline void add_pairs(const Tile& t, int64_t start, int64_t end, const F16 (&zeros)[V],
                      F16 (&acc)[M][V]) {
    constexpr int64_t step = STEP * vector_bytes(type);
    for (int64_t p = start; p < end; ++p) {
        if constexpr (FETCH) fetch_ahead<V>(t, p, step);
        __m512i w[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            w[v] = pairs_of<type>(t.w[v] + p * step, zeros[v]);
            if constexpr (KEEP) _mm512_store_si512(t.kept + (p * STEP + v) * 64, w[v]);
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            __m512i x = _mm512_set1_epi32(reinterpret_cast<const int*>(t.a + m * t.a_stride)[p]);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v)
                acc[m][v] = _mm512_dpbf16_ps(acc[m][v], (__m512bh)x, (__m512bh)w[v]);
        }
    }
}

template <int M, int V>
inline void clear(F16 (&acc)[M][V]) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[m][v] = zero();
}

template <int32_t type, int M, int V, int STEP, bool FETCH, bool KEEP>
void pair_kernel(const Tile& t) {
    F16 acc[M][V], none[V] = {};
    clear<M, V>(acc);
    add_pairs<type, M, V, STEP, FETCH, KEEP>(t, 0, t.pairs, none, acc);
    store_tile<M, V>(t, acc);
}

// With a scale for each group of inputs: a group's sum is scaled and added to what is in `c`.
template <int32_t type, int M, int V, bool KEEP>
void pair_group_kernel(const Tile& t) {
    for (int64_t start = 0, g = 0; start < t.pairs; start += t.group_pairs, ++g) {
        F16 acc[M][V], zeros[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
            zeros[v] = group_zeros(t, v, g);
        clear<M, V>(acc);
        const int64_t end = start + t.group_pairs < t.pairs ? start + t.group_pairs : t.pairs;
        add_pairs<type, M, V, 2, true, KEEP>(t, start, end, zeros, acc);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            const F16 scale = group_scales(t, v, g);
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m) {
                float* c = t.c + m * t.c_stride + v * kLanes;
                store(c, g == 0 ? mul(acc[m][v], scale) : fma(acc[m][v], scale, load(c)));
            }
        }
    }
}

}  // namespace arriero

#endif
