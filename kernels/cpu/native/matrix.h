// A packed matrix, and the kernels that multiply a few rows by a few of its columns.
//
// Knows panels and registers; knows nothing of threads or layers.
//
// Layout. Output columns stand in panels of 32; within a panel the input runs in pairs (2p, 2p+1),
// and each pair holds two vectors of 16 columns. A vector holds, for its 16 columns, the weights
// of both inputs of the pair, as the type's `expand` reads them. The tails of columns and inputs
// are zeros. So a matrix-vector product streams a panel from end to end, and a tile of rows by a
// panel needs one vector load for 32 weights.
//
// Same tokens: every output is one accumulator that takes the inputs in rising order, in each
// kernel here, whatever its number of rows.
#pragma once

#include <algorithm>
#include <vector>

#include "simd.h"

namespace arriero {

// Of the last two the inputs are rounded to int8, and they have a layout of their own (dot.h).
enum Type : int32_t {
    kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3, kFp8 = 4, kInt4 = 5,
    kInt8Dot = 6, kInt4Dot = 7
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline constexpr int kPanel = 32;
inline constexpr float kInt4Zero = 8.0f;  // where a matrix has no zeros of its own

#if defined(ARRIERO_AVX512)
inline constexpr int kMaxRows = 12;  // 24 accumulators, 2 weights, the broadcast, the mask
inline constexpr int kThinRows = 4;  // up to here two panels go together, for longer chains
#elif defined(ARRIERO_AVX2)
inline constexpr int kMaxRows = 6;  // 12 accumulators, 2 weights, the broadcast, a mask (narrow.h)
inline constexpr int kThinRows = 1;
#else
inline constexpr int kMaxRows = 2;
inline constexpr int kThinRows = 1;
#endif

// Bytes of one vector: 16 columns of a pair of inputs.
inline constexpr int64_t vector_bytes(int32_t type) {
    return type == kFloat32                        ? 128
           : type == kBFloat16 || type == kFloat16 ? 64
           : type == kInt4 || type == kInt4Dot     ? 16
                                                   : 32;
}

template <int32_t type>
inline void expand(const void* p, F16& first, F16& second) {
    if constexpr (type == kFloat32) {
        first = load(static_cast<const float*>(p));
        second = load(static_cast<const float*>(p) + kLanes);
    } else if constexpr (type == kBFloat16) {
        expand_bf16(p, first, second);
    } else if constexpr (type == kFloat16) {
        expand_f16(p, first, second);
    } else if constexpr (type == kInt8) {
        expand_int8(p, first, second);
    } else if constexpr (type == kFp8) {
        expand_fp8(p, first, second);
    } else {
        expand_int4(p, first, second);
    }
}

// Where an element stands in a vector: of 16 columns, the first or second input of the pair.
// (Two int4 elements share the byte of their column: the second is the high nibble.)
inline constexpr int64_t element_offset(int32_t type, int column, int second) {
    if (type == kInt4) return column;
    if (type == kInt8Dot || type == kInt4Dot) return column * 4;
    if (type == kBFloat16) return column * 4 + second * 2;
    return (second * kLanes + column) * (vector_bytes(type) / 32);
}

inline void store_element(int32_t type, char* p, float value) {
    if (type == kFloat32) {
        std::memcpy(p, &value, 4);
        return;
    }
    if (type == kFp8) {
        *p = char(float_to_fp8(value));
        return;
    }
    uint16_t half = type == kBFloat16 ? float_to_bf16(value) : float_to_f16(value);
    std::memcpy(p, &half, 2);
}

inline float load_element(int32_t type, const char* p) {
    if (type == kFloat32) {
        float value;
        std::memcpy(&value, p, 4);
        return value;
    }
    uint16_t half;
    std::memcpy(&half, p, 2);
    return type == kBFloat16 ? bf16_to_float(half) : f16_to_float(half);
}

// Bytes of an element of a plain type.
inline constexpr int64_t element_size(int32_t type) { return type == kFloat32 ? 4 : 2; }

// Sixteen elements of a plain type.
inline F16 load_plain(const char* p, int32_t type) {
    if (type == kFloat16) return load_f16(reinterpret_cast<const uint16_t*>(p));
    if (type == kBFloat16) return load_bf16(reinterpret_cast<const bf16*>(p));
    return load(reinterpret_cast<const float*>(p));
}

// The C struct that Python fills. int8 and fp8 have one scale a column, applied to the sums; int4
// one a column and group of inputs, [panels][groups][kPanel] of `scale_type`, `zero` likewise or
// null for 8: w = (q - zero) * scale. A panel's scales lie together: they stream as its weights do.
struct Matrix {
    int64_t out_features;
    int64_t in_features;
    const char* data;
    const char* scale;
    const char* zero;
    const float* bias;
    int32_t type;
    int32_t scale_type;  // of `scale` and `zero`; float32 where a scale is a column's
    int32_t group;  // int4: inputs that share a scale, an even number; else 0
    int32_t whole;  // every `zero` is a small whole number, so that q - zero is one too

    int64_t pairs() const { return ceil_div(in_features, 2); }
    int64_t groups() const { return group ? ceil_div(in_features, group) : 0; }
    int64_t panels() const { return ceil_div(out_features, kPanel); }
    int64_t panel_bytes() const { return pairs() * 2 * vector_bytes(type); }
    int64_t columns() const { return panels() * kPanel; }
    const float* column_scales() const { return reinterpret_cast<const float*>(scale); }
    // Bytes of a group's scales.
    int64_t scale_bytes() const { return kPanel * element_size(scale_type); }
    const char* panel(int64_t i) const { return data + i * panel_bytes(); }
    int64_t element(int64_t out, int64_t in) const {
        if (type == kInt8Dot || type == kInt4Dot) {
            const int64_t byte = type == kInt4Dot ? in / 2 : in;
            return out / kPanel * panel_bytes() + byte / 4 * 4 * kPanel + out % kPanel * 4 + byte % 4;
        }
        return out / kPanel * panel_bytes() +
               (in / 2 * 2 + out % kPanel / kLanes) * vector_bytes(type) +
               element_offset(type, int(out % kLanes), int(in % 2));
    }
};

inline void prefetch(const char* p) { __builtin_prefetch(p, 0, 2); }

// Lines of memory that are fetched a few at a time between calls of kernels, so that memory works
// while the kernels multiply.
class Stream {
  public:
    void clear() {
        pieces_.clear();
        at_ = 0;
        left_ = 0;
    }
    // `rows` rows of `bytes` bytes, `stride` bytes from one to the next.
    void add(const char* first, int64_t stride, int64_t rows, int64_t bytes) {
        if (rows <= 0 || bytes <= 0) return;
        if (bytes == stride) {
            pieces_.push_back({first, kLine, ceil_div(rows * bytes, kLine)});
            left_ += pieces_.back().lines;
            return;
        }
        for (int64_t at = 0; at < bytes; at += kLine, left_ += rows)
            pieces_.push_back({first + at, stride, rows});
    }
    // Spread what is left over so many calls of `step`.
    void pace(int64_t steps) { each_ = ceil_div(left_, steps); }
    void step() {
        for (int64_t n = std::min(each_, left_); n > 0;) {
            Piece& piece = pieces_[at_];
            const int64_t lines = std::min(n, piece.lines);
            const char* line = piece.next;
            for (int64_t i = 0; i < lines; ++i, line += piece.stride) prefetch(line);
            piece.next = line;
            piece.lines -= lines;
            left_ -= lines;
            n -= lines;
            if (piece.lines == 0) ++at_;
        }
    }

  private:
    static constexpr int64_t kLine = 64;
    struct Piece {
        const char* next;
        int64_t stride, lines;
    };
    std::vector<Piece> pieces_;
    size_t at_ = 0;
    int64_t left_ = 0, each_ = 0;
};

// What one call of a kernel multiplies: M rows of `a` by V vectors at w[v], into c [M][V * 16].
struct Tile {
    const char* a;
    int64_t a_stride;  // bytes
    const char* w[4];
    int64_t pairs;
    float* c;
    int64_t c_stride;  // floats
    // What is multiplied next: walked through in `fetch_step` bytes a pair. Of thin tiles, the next
    // two panels: `fetch_step` is how far ahead of a pair its streams are fetched, on into these.
    const char *fetch, *fetch_second;
    int64_t fetch_step;
    const char* scale[4];  // group-wise types: first group's
    const char* zero[4];
    int32_t scale_type;
    int64_t group_stride;  // bytes from one group's scales to the next
    int64_t group_pairs;
    bool resumes;  // the sums go on from what is in `c`
    const float* sums;  // of each row's groups of inputs, where a kernel wants them
    int64_t sums_stride;  // floats
    char* kept;  // where a kernel leaves the pairs of bf16 that it made of the weights
    Stream* stream;  // fetched between calls
};

using Kernel = void (*)(const Tile&);

// Scales and zero points of 16 columns in a group.
inline F16 group_scales(const Tile& t, int v, int64_t group) {
    return load_plain(t.scale[v] + group * t.group_stride, t.scale_type);
}
inline F16 group_zeros(const Tile& t, int v, int64_t group) {
    return t.zero[v] ? load_plain(t.zero[v] + group * t.group_stride, t.scale_type)
                     : set1(kInt4Zero);
}

template <int M, int V>
inline void store_tile(const Tile& t, const F16 (&acc)[M][V]) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) store(t.c + m * t.c_stride + v * kLanes, acc[m][v]);
}

template <int V>
inline void fetch_ahead(const Tile& t, int64_t pair, int64_t step_bytes) {
    if constexpr (V == 4) {  // thin tiles run at the memory's pace: fetch along their own streams
        const int64_t at = pair * step_bytes + t.fetch_step, past = at - t.pairs * step_bytes;
        const char* first = past < 0 ? t.w[0] + at : t.fetch + past;
        const char* second = past < 0 ? t.w[2] + at : t.fetch_second + past;
        prefetch(first);
        prefetch(second);
        if (step_bytes > 64) {
            prefetch(first + 64);
            prefetch(second + 64);
        }
    } else {
        prefetch(t.fetch + pair * t.fetch_step);
        prefetch(t.fetch + pair * t.fetch_step + 64);
    }
}

// Float32 inputs; weights of any type that needs no group scale. STEP: vectors from one pair to
// the next in memory (2 in a matrix, 1 in a cache block).
template <int32_t type, int M, int V, int STEP, bool FETCH>
void float_kernel(const Tile& t) {
    constexpr int64_t step = STEP * vector_bytes(type);
    F16 acc[M][V];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[m][v] = zero();
    for (int64_t p = 0; p < t.pairs; ++p) {
        if constexpr (FETCH) fetch_ahead<V>(t, p, step);
        F16 first[V], second[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) expand<type>(t.w[v] + p * step, first[v], second[v]);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            F16 x = set1(reinterpret_cast<const float*>(t.a + m * t.a_stride)[2 * p]);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) acc[m][v] = fma(x, first[v], acc[m][v]);
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            F16 x = set1(reinterpret_cast<const float*>(t.a + m * t.a_stride)[2 * p + 1]);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) acc[m][v] = fma(x, second[v], acc[m][v]);
        }
    }
    store_tile<M, V>(t, acc);
}

// As above, with weights (q - zero) * scale that change from group to group of inputs.
template <int32_t type, int M, int V>
void group_kernel(const Tile& t) {
    constexpr int64_t step = 2 * vector_bytes(type);
    F16 acc[M][V];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[m][v] = zero();
    for (int64_t start = 0, g = 0; start < t.pairs; start += t.group_pairs, ++g) {
        F16 scale[V], zeros[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            scale[v] = group_scales(t, v, g);
            zeros[v] = group_zeros(t, v, g);
        }
        int64_t end = start + t.group_pairs < t.pairs ? start + t.group_pairs : t.pairs;
        for (int64_t p = start; p < end; ++p) {
            fetch_ahead<V>(t, p, step);
            F16 first[V], second[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                expand<type>(t.w[v] + p * step, first[v], second[v]);
                first[v] = mul(sub(first[v], zeros[v]), scale[v]);
                second[v] = mul(sub(second[v], zeros[v]), scale[v]);
            }
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m) {
                const float* a = reinterpret_cast<const float*>(t.a + m * t.a_stride) + 2 * p;
                F16 x = set1(a[0]), y = set1(a[1]);
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v)
                    acc[m][v] = fma(y, second[v], fma(x, first[v], acc[m][v]));
            }
        }
    }
    store_tile<M, V>(t, acc);
}

}  // namespace arriero
