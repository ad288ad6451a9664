// Tiles for sixteen registers of eight floats (AVX2): weights are unpacked eight at a time, just
// before they are used, so that the sums, the inputs and the weights all stay in registers.
//
// Knows registers and the blocks of inputs that the first cache holds; knows nothing of threads. A
// sum takes its inputs in rising order, whatever the number of rows.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "matrix.h"

#if defined(ARRIERO_AVX2)

namespace arriero {

// Keep the order of the source: the compiler would load inputs early, and run out of registers.
inline __attribute__((always_inline)) void in_order(__m256& value) {
    asm volatile("" : "+x"(value));
}

// Eight columns of the first or second input of a pair; `half`: which eight of a vector's columns.
template <int32_t type, int kInput>
inline __m256 expand_half(const char* vector, int half) {
    if constexpr (type == kFloat32) {
        return _mm256_loadu_ps(reinterpret_cast<const float*>(vector + kInput * 64 + half * 32));
    } else if constexpr (type == kBFloat16) {
        const __m256i pairs = load_8x32(vector + half * 32);
        return _mm256_castsi256_ps(
            kInput ? _mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000)))
                   : _mm256_slli_epi32(pairs, 16));
    } else if constexpr (type == kFloat16) {
        return f16_to_8_floats(vector + kInput * 32 + half * 16);
    } else if constexpr (type == kInt8) {
        return int8_to_8_floats(vector + kInput * 16 + half * 8);
    } else if constexpr (type == kFp8) {
        return fp8_to_float(vector + kInput * 16 + half * 8);
    } else {
        const __m256i bytes = _mm256_cvtepu8_epi32(load_8x8(vector + half * 8));
        return _mm256_cvtepi32_ps(kInput ? _mm256_srli_epi32(bytes, 4)
                                         : _mm256_and_si256(bytes, _mm256_set1_epi32(15)));
    }
}

// Ask for what is multiplied next. A single row runs at the memory's pace, and fetches along its
// own two panels.
template <int32_t type, int V>
inline void fetch_next(const Tile& t, int64_t pair, const char*& fetch) {
    if constexpr (V == 4) {
        fetch_ahead<V>(t, pair, 2 * vector_bytes(type));
    } else {
        constexpr int lines = int((V * vector_bytes(type) + 63) / 64);
        prefetch(fetch);
        if constexpr (lines > 1) prefetch(fetch + 64);
        if constexpr (lines > 2) prefetch(fetch + 128), prefetch(fetch + 192);
        fetch += t.fetch_step;
    }
}

// Add the products of one input of M rows with V vectors. x(m): the input of row m, in all lanes.
// The smaller side stays in registers, the other passes through one.
template <int32_t type, int kInput, int M, int V, class Vector, class Input>
inline __attribute__((always_inline)) void add_input(F16 (&acc)[M][V], Vector&& vector, Input&& x) {
    if constexpr (M < 2 * V) {
        __m256 inputs[M];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) inputs[m] = x(m);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            __m256 low = expand_half<type, kInput>(vector(v), 0);
            in_order(low);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                acc[m][v].a = _mm256_fmadd_ps(inputs[m], low, acc[m][v].a);
                in_order(acc[m][v].a);
            }
            __m256 high = expand_half<type, kInput>(vector(v), 1);
            in_order(high);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                acc[m][v].b = _mm256_fmadd_ps(inputs[m], high, acc[m][v].b);
                in_order(acc[m][v].b);
            }
        }
    } else {
        __m256 weights[V][2];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            weights[v][0] = expand_half<type, kInput>(vector(v), 0);
            weights[v][1] = expand_half<type, kInput>(vector(v), 1);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            __m256 input = x(m);
            in_order(input);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                acc[m][v].a = _mm256_fmadd_ps(input, weights[v][0], acc[m][v].a);
                acc[m][v].b = _mm256_fmadd_ps(input, weights[v][1], acc[m][v].b);
                in_order(acc[m][v].a);
                in_order(acc[m][v].b);
            }
        }
    }
}

// One pair of inputs: `a` points to the first row's.
template <int32_t type, int M, int V>
inline __attribute__((always_inline)) void add_pair(F16 (&acc)[M][V], const char* const (&w)[V],
                                                    int64_t at, const char* a, int64_t stride) {
    auto vector = [&](int v) { return w[v] + at; };
    add_input<type, 0>(acc, vector, [&](int m) {
        return _mm256_broadcast_ss(reinterpret_cast<const float*>(a + m * stride));
    });
    add_input<type, 1>(acc, vector, [&](int m) {
        return _mm256_broadcast_ss(reinterpret_cast<const float*>(a + m * stride) + 1);
    });
}

// Weights of any type without group scales. STEP: vectors from one pair to the next in memory.
// FETCH: whether what is multiplied next is fetched meanwhile.
template <int32_t type, int M, int V, int STEP, bool FETCH>
void narrow_kernel(const Tile& t) {
    constexpr int64_t step = STEP * vector_bytes(type);
    F16 acc[M][V];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
            acc[m][v] = t.resumes ? load(t.c + m * t.c_stride + v * kLanes) : zero();
    const char *a = t.a, *fetch = t.fetch, *w[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) w[v] = t.w[v];
    for (int64_t p = 0; p < t.pairs; ++p, a += 8) {
        if constexpr (FETCH) fetch_next<type, V>(t, p, fetch);
        add_pair<type, M, V>(acc, w, p * step, a, t.a_stride);
    }
    store_tile<M, V>(t, acc);
}

// Int4: a group's sums of inputs times levels, less the zero point times the inputs' sum, times the
// group's scale.
template <int32_t type, int M, int V>
void narrow_group_kernel(const Tile& t) {
    constexpr int64_t step = 2 * vector_bytes(type);
    const char *fetch = t.fetch, *w[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) w[v] = t.w[v];
    for (int64_t start = 0, g = 0; start < t.pairs; start += t.group_pairs, ++g) {
        const int64_t end = std::min(start + t.group_pairs, t.pairs);
        F16 acc[M][V];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) acc[m][v] = zero();
        const char* a = t.a + start * 8;
        for (int64_t p = start; p < end; ++p, a += 8) {
            fetch_next<type, V>(t, p, fetch);
            add_pair<type, M, V>(acc, w, p * step, a, t.a_stride);
        }
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            const F16 scale = group_scales(t, v, g), zeros = group_zeros(t, v, g);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                float* c = t.c + m * t.c_stride + v * kLanes;
                const F16 shift = mul(zeros, set1(t.sums[m * t.sums_stride + g]));
                const F16 levels = sub(acc[m][v], shift);
                store(c, g == 0 && !t.resumes ? mul(levels, scale) : fma(levels, scale, load(c)));
            }
        }
    }
}

inline constexpr int kPanelRows = 3;             // up to here a tile spans a panel, above half of one
inline constexpr int64_t kBlockBytes = 8 << 10;  // of a panel: a quarter of the first cache

template <int32_t type, int M, int V>
constexpr Kernel narrow_kernel_for() {
    if constexpr (type == kInt4)
        return narrow_group_kernel<type, M, V>;
    else
        return narrow_kernel<type, M, V, 2, true>;
}
template <int32_t type, size_t... M>
constexpr auto narrow_kernels(std::index_sequence<M...>) {
    return std::array<Kernel, sizeof...(M)>{
        narrow_kernel_for<type, int(M) + 1, int(M) < kPanelRows ? 2 : 1>()...};
}

// The kernel for `rows` rows by a panel, or half a panel above kPanelRows; of 0: one by two panels.
inline Kernel narrow_kernel_of(int32_t type, int rows) {
    using All = std::make_index_sequence<kMaxRows>;
#define ARRIERO_KERNELS(TYPE)                                            \
    case TYPE: {                                                         \
        static constexpr auto kernels = narrow_kernels<TYPE>(All{});     \
        return rows == 0 ? narrow_kernel_for<TYPE, 1, 4>() : kernels[rows - 1]; \
    }
    switch (type) {
        ARRIERO_KERNELS(kFloat32)
        ARRIERO_KERNELS(kBFloat16)
        ARRIERO_KERNELS(kFloat16)
        ARRIERO_KERNELS(kInt8)
        ARRIERO_KERNELS(kFp8)
        ARRIERO_KERNELS(kInt4)
    }
#undef ARRIERO_KERNELS
    return nullptr;
}

// A panel by `rows` rows. The inputs go by in blocks, and a block's weights stay in the first cache
// until all rows have met them; `ahead`: the panel that is multiplied next; `panels_left`: how many
// panels share the stream. `t` has the first row and the whole panel.
inline void narrow_panel(const Matrix& m, int rows, const char* ahead, int panels_left, Tile t) {
    const Tile whole = t;
    const int64_t pairs = m.pairs(), bytes = vector_bytes(m.type), step = 2 * bytes;
    const int tiles = int(ceil_div(rows, kMaxRows));
    int64_t block = kBlockBytes / step;
    if (m.group) block = std::max(block / whole.group_pairs, int64_t(1)) * whole.group_pairs;
    int passes = 0;
    auto rows_of = [&](int tile, int row) { return (rows - row) / (tiles - tile); };
    for (int tile = 0, row = 0; tile < tiles; ++tile) {
        const int n = rows_of(tile, row);
        passes += n <= kPanelRows ? 1 : 2;
        row += n;
    }
    t.fetch_step = step / passes;
    t.stream->pace(panels_left * passes * ceil_div(pairs, block));
    for (int64_t start = 0; start < pairs; start += block) {
        t.pairs = std::min(block, pairs - start);
        t.resumes = start > 0;
        const char* next =
            start + block < pairs ? whole.w[0] + (start + block) * step : ahead;
        for (int tile = 0, row = 0, pass = 0; tile < tiles; ++tile) {
            const int n = rows_of(tile, row);
            const Kernel kernel = narrow_kernel_of(m.type, n);
            t.a = whole.a + row * t.a_stride + start * 8;
            const int64_t group = m.group ? start / t.group_pairs : 0;
            t.sums = m.group ? whole.sums + row * t.sums_stride + group : nullptr;
            for (int v = 0; v < 2; v += n <= kPanelRows ? 2 : 1, ++pass) {
                t.c = whole.c + row * t.c_stride + v * kLanes;
                t.fetch = next + pass * t.fetch_step * t.pairs;
                for (int i = 0; v + i < 2; ++i) {
                    t.w[i] = whole.w[v + i] + start * step;
                    if (m.group) {
                        t.scale[i] = whole.scale[v + i] + group * t.group_stride;
                        t.zero[i] = m.zero ? whole.zero[v + i] + group * t.group_stride : nullptr;
                    }
                }
                t.stream->step();
                kernel(t);
            }
            row += n;
        }
    }
}

}  // namespace arriero

#endif
