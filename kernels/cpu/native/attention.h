// The paged cache's layout, RoPE into it, and causal attention over it.
//
// Knows blocks and slots; knows nothing of weights.
//
// Layout. A block holds, for each key/value head, its keys and then its values, cut into groups
// of 16 slots (the last one padded when the block size is no multiple of 16). Both are what
// matrix.h calls vectors: of a group's keys, 16 slots are the columns and head dimensions run in
// pairs; of its values, 16 dimensions are the columns and slots run in pairs. So scores and the
// weighted sum use the product kernels' pattern, with nothing copied or transposed.
//
// Same tokens: keys are cut into splits at fixed positions. Within a split the greatest score is
// exact whatever the order, exponentials are summed lane by lane in rising order, and the weighted
// sum takes the keys one by one; splits are merged in rising order. None of it depends on who
// computes a split, or on which other queries share a tile: a key that a query may not see has
// weight 0, and adding 0 changes nothing.
#pragma once

#include <algorithm>
#include <limits>

#include "product.h"

namespace arriero {

inline constexpr int kMaxHeadDim = 1024;

// The C struct that Python fills.
struct Cache {
    char* data;
    int64_t layer_bytes, block_bytes, head_bytes;
    int32_t type;
    int32_t block_size;
    int32_t num_blocks;
    int32_t num_heads;
    int32_t head_dim;
    int32_t num_layers;

    int groups() const { return (block_size + kLanes - 1) / kLanes; }
    int dim_pairs() const { return (head_dim + 1) / 2; }
    int dim_vectors() const { return (head_dim + kLanes - 1) / kLanes; }
    int64_t key_bytes() const { return dim_pairs() * vector_bytes(type); }  // of a group
    int64_t value_vector() const { return kLanes / 2 * vector_bytes(type); }
    int64_t value_bytes() const { return dim_vectors() * value_vector(); }  // of a group
    int64_t scales_at() const { return groups() * (key_bytes() + value_bytes()); }
    char* head(int64_t layer, int64_t block, int64_t h) const {
        return data + layer * layer_bytes + block * block_bytes + h * head_bytes;
    }
    char* keys(char* head, int group) const { return head + group * key_bytes(); }
    char* values(char* head, int group) const {
        return head + groups() * key_bytes() + group * value_bytes();
    }
    // int8: one float32 a slot, for the key (0) and for the value (1).
    float* scales(char* head, int group, int part) const {
        return reinterpret_cast<float*>(head + scales_at()) + (part * groups() + group) * kLanes;
    }
};

// Keys and values of one slot and head: element i of the key, of the value.
inline char* key_element(const Cache& kv, char* head, int offset, int i) {
    return kv.keys(head, offset / kLanes) + i / 2 * vector_bytes(kv.type) +
           element_offset(kv.type, offset % kLanes, i % 2);
}
inline char* value_element(const Cache& kv, char* head, int offset, int i) {
    return kv.values(head, offset / kLanes) + i / kLanes * kv.value_vector() +
           offset % kLanes / 2 * vector_bytes(kv.type) +
           element_offset(kv.type, i % kLanes, offset % 2);
}

// The C struct that Python fills.
struct Batch {
    int64_t tokens, sequences;
    const int32_t* positions;
    const int32_t* query_start;
    const int32_t* context;
    const int32_t* block_table;
    int64_t table_stride;
    int64_t table_blocks;
    const int32_t* slots;
    const float* cos;
    const float* sin;
    int64_t cos_stride, sin_stride;
};

struct Heads {
    int q, kv, dim;
    int per_kv() const { return q / kv; }
    int64_t width() const { return int64_t(q + 2 * kv) * dim; }
};

enum Rope : int32_t { kHalves = 0, kPairs = 1, kNoRope = 2 };

// What a layer's attention does beyond Llama 3's. The C struct that Python fills.
struct Style {
    int32_t rope;
    int32_t qk_norm;
    float eps;
    float query_gain, query_floor;  // gain 0 for off
    int32_t chunk_size;             // 0 for off
};

// Turn one head in place.
inline void rotate(float* x, int dim, const float* cos, const float* sin, int32_t rope) {
    const int half = dim / 2;
    if (rope == kHalves) {
        for (int i = 0; i < half; i += kLanes) {
            const int n = std::min(kLanes, half - i);
            F16 a = load_n(x + i, n), b = load_n(x + half + i, n);
            F16 c = load_n(cos + i, n), s = load_n(sin + i, n);
            store_n(x + i, sub(mul(a, c), mul(b, s)), n);
            store_n(x + half + i, add(mul(b, c), mul(a, s)), n);
        }
    } else if (rope == kPairs) {
        for (int i = 0; i < half; ++i) {
            const float a = x[2 * i], b = x[2 * i + 1];
            x[2 * i] = a * cos[i] - b * sin[i];
            x[2 * i + 1] = b * cos[i] + a * sin[i];
        }
    }
}

// Divide one head by its root mean square.
inline void norm_head(float* x, int dim, float eps) {
    F16 sum = zero();
    for (int i = 0; i < dim; i += kLanes) {
        F16 v = load_n(x + i, std::min(kLanes, dim - i));
        sum = fma(v, v, sum);
    }
    const F16 factor = set1(1.0f / std::sqrt(reduce_add(sum) / float(dim) + eps));
    for (int i = 0; i < dim; i += kLanes) {
        const int n = std::min(kLanes, dim - i);
        store_n(x + i, mul(load_n(x + i, n), factor), n);
    }
}

// A head's vector as int8 levels of its greatest magnitude; returns the scale.
inline float int8_levels(const float* x, int dim, int8_t* levels) {
    F16 top = zero();
    for (int i = 0; i < dim; i += kLanes) {
        F16 v = load_n(x + i, std::min(kLanes, dim - i));
        top = max(max(v, sub(zero(), v)), top);
    }
    const float scale = reduce_max(top) / 127.0f, divisor = scale > 0.0f ? scale : 1.0f;
    for (int i = 0; i < dim; ++i)
        levels[i] = int8_t(std::clamp(std::nearbyint(x[i] / divisor), -127.0f, 127.0f));
    return scale;
}

// One token's key and value of one head into its slot.
inline void write_slot(const Cache& kv, char* head, int offset, const float* k, const float* v) {
    const int dim = kv.head_dim;
    if (kv.type == kBFloat16) {  // the common case, sixteen elements at a time
        alignas(64) bf16 rounded[kLanes];
        for (int i = 0; i < dim; i += kLanes) {
            const int n = std::min(kLanes, dim - i);
            char* key = key_element(kv, head, offset, i);
            store_bf16(rounded, load_n(k + i, n));
            for (int j = 0; j < n; j += 2) std::memcpy(key + j * 32, rounded + j, 4);
            char* value = value_element(kv, head, offset, i);
            store_bf16(rounded, load_n(v + i, n));
            for (int j = 0; j < n; ++j) std::memcpy(value + j * 4, rounded + j, 2);
        }
    } else if (kv.type == kInt8) {
        int8_t levels[kMaxHeadDim];
        kv.scales(head, offset / kLanes, 0)[offset % kLanes] = int8_levels(k, dim, levels);
        for (int i = 0; i < dim; ++i) *key_element(kv, head, offset, i) = char(levels[i]);
        kv.scales(head, offset / kLanes, 1)[offset % kLanes] = int8_levels(v, dim, levels);
        for (int i = 0; i < dim; ++i) *value_element(kv, head, offset, i) = char(levels[i]);
    } else {
        for (int i = 0; i < dim; ++i) {
            store_element(kv.type, key_element(kv, head, offset, i), k[i]);
            store_element(kv.type, value_element(kv, head, offset, i), v[i]);
        }
    }
}

// One token: encode its queries and keys in place, write keys and values to its slot.
inline void rope_write(const Batch& batch, int64_t token, const Heads& heads, const Style& style,
                       float* qkv, const Cache& kv, int64_t layer) {
    const float* cos = batch.cos + token * batch.cos_stride;
    const float* sin = batch.sin + token * batch.sin_stride;
    for (int h = 0; h < heads.q + heads.kv; ++h) {
        float* x = qkv + int64_t(h) * heads.dim;
        rotate(x, heads.dim, cos, sin, style.rope);
        if (style.qk_norm) norm_head(x, heads.dim, style.eps);
    }
    if (style.query_gain != 0.0f) {
        const float steps = std::floor(float(batch.positions[token] + 1) / style.query_floor);
        const float factor = 1.0f + style.query_gain * std::log(1.0f + steps);
        for (int64_t i = 0; i < int64_t(heads.q) * heads.dim; ++i) qkv[i] *= factor;
    }
    const int block = batch.slots[token] / kv.block_size, offset = batch.slots[token] % kv.block_size;
    for (int h = 0; h < heads.kv; ++h) {
        const float* k = qkv + int64_t(heads.q + h) * heads.dim;
        write_slot(kv, kv.head(layer, block, h), offset, k, k + int64_t(heads.kv) * heads.dim);
    }
}

inline constexpr int kSplitKeys = 512;

// Some queries of one sequence against some of its splits, for each key/value head.
struct Piece {
    int32_t sequence;
    int32_t token;      // first, in the flat batch
    int32_t tokens;
    int32_t split, splits;  // first split, how many
    int32_t partial;    // where partial results go, or -1: this piece holds all of its splits
};

// Geometry that all layers of a step share.
struct AttentionPlan {
    std::vector<Piece> pieces;
    std::vector<Piece> merges;  // decodes whose splits were computed apart
    int64_t partials = 0;       // (token, split) pairs, times query heads
};

inline int split_blocks(const Cache& kv) { return std::max(1, kSplitKeys / kv.block_size); }

inline constexpr int kTileRows = 4 * kMaxRows;

// Queries of a tile: as many as fill a few register tiles with their group of heads.
inline int tile_tokens(int per_kv) { return std::max(1, kTileRows / per_kv); }

// The first key that a query at `position` sees.
inline int first_key(int position, int chunk_size) {
    return chunk_size > 0 ? position / chunk_size * chunk_size : 0;
}

inline AttentionPlan plan_attention(const Batch& batch, const Cache& kv, int per_kv,
                                    int chunk_size, int num_threads) {
    AttentionPlan plan;
    const int split_keys = split_blocks(kv) * kv.block_size;
    // Few sequences and long contexts: give the splits of one query to several threads.
    const bool apart = num_threads > 1 && batch.sequences * kv.num_heads < 4 * num_threads;
    const int tile = tile_tokens(per_kv);
    for (int64_t s = 0; s < batch.sequences; ++s) {
        const int first = batch.query_start[s], last = batch.query_start[s + 1];
        for (int t = first; t < last; t += tile) {
            const int n = std::min(tile, last - t);
            const int start = first_key(batch.positions[t], chunk_size) / split_keys;
            const int splits = batch.positions[t + n - 1] / split_keys + 1 - start;
            if (apart && n == 1 && splits > 1) {
                plan.merges.push_back({int32_t(s), t, 1, start, splits, int32_t(plan.partials)});
                for (int i = 0; i < splits; ++i)
                    plan.pieces.push_back(
                        {int32_t(s), t, 1, start + i, 1, int32_t(plan.partials++)});
            } else {
                plan.pieces.push_back({int32_t(s), t, n, start, splits, -1});
            }
        }
    }
    // The longest first, so that the last to finish is short.
    std::stable_sort(plan.pieces.begin(), plan.pieces.end(), [](const Piece& a, const Piece& b) {
        return int64_t(a.tokens) * a.splits > int64_t(b.tokens) * b.splits;
    });
    return plan;
}

// Few rows take four vectors at a time, so that enough sums run side by side.
inline constexpr int kFewRows = kMaxRows / 2;

template <int32_t type, bool kRounded, int M, int V>
constexpr Kernel score_tile() {
#if defined(ARRIERO_BF16)
    if constexpr (kRounded) return pair_kernel<M, V, 1, false>;
#endif
    return float_kernel<type, M, V, 1, false>;
}

template <int32_t type, bool kRounded, int V, size_t... M>
constexpr auto score_kernels(std::index_sequence<M...>) {
    return std::array<Kernel, sizeof...(M)>{score_tile<type, kRounded, int(M) + 1, V>()...};
}

template <int32_t type, bool kRounded>
inline Kernel score_kernel(int rows, int vectors) {
    using Many = std::make_index_sequence<kMaxRows>;
    using Few = std::make_index_sequence<kFewRows>;
    static constexpr auto one = score_kernels<type, kRounded, 1>(Many{});
    static constexpr auto two = score_kernels<type, kRounded, 2>(Many{});
    static constexpr auto four = score_kernels<type, kRounded, 4>(Few{});
    return (vectors == 4 ? four.data() : vectors == 2 ? two.data() : one.data())[rows - 1];
}

// How many vectors the next tile takes, of `left` that remain, when tiles have `rows` rows or less.
inline int tile_vectors(int rows, int left) {
    return left >= 4 && rows <= kFewRows ? 4 : left >= 2 ? 2 : 1;
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
    using Few = std::make_index_sequence<kFewRows>;
    static constexpr auto one = value_kernels<type, kRounded, 1>(Many{});
    static constexpr auto two = value_kernels<type, kRounded, 2>(Many{});
    static constexpr auto four = value_kernels<type, kRounded, 4>(Few{});
    return (vectors == 4 ? four.data() : vectors == 2 ? two.data() : one.data())[rows - 1];
}

// A thread's room for one piece.
struct AttentionScratch {
    std::vector<float> q, scores;
    std::vector<bf16> weights;  // where they are rounded; else they take the scores' place
    std::vector<float> part, greatest, total;              // of one split
    std::vector<float> sum, sum_greatest, sum_total;       // of all splits so far
    std::vector<const char*> keys, values;
    std::vector<const float*> key_scales, value_scales;
    std::vector<int> counts, bases;

    void make_room(int64_t rows, int64_t q_width, int64_t width, int64_t padded) {
        auto grow = [](auto& v, int64_t n) {
            if (int64_t(v.size()) < n) v.resize(size_t(n));
        };
        grow(q, rows * q_width);
        grow(scores, rows * width);
        grow(weights, rows * width);
        for (auto* v : {&part, &sum}) grow(*v, rows * padded);
        for (auto* v : {&greatest, &total, &sum_greatest, &sum_total}) grow(*v, rows);
        for (auto* v : {&keys, &values}) grow(*v, width / kLanes);
        for (auto* v : {&key_scales, &value_scales}) grow(*v, width / kLanes);
        for (auto* v : {&counts, &bases}) grow(*v, width / kLanes);
    }

    // A decode reads its cache from memory, once: ask for the keys of the next tile, and for the
    // values that the weighted sum will want after this one's scores.
    void fetch(int group, int taken, int count, const Cache& kv) const {
        for (int g = group; g < group + taken; ++g)
            for (int64_t i = 0; i < kv.value_bytes(); i += 64) prefetch(values[g] + i);
        for (int g = group + taken; g < std::min(group + 2 * taken, count); ++g)
            for (int64_t i = 0; i < kv.key_bytes(); i += 64) prefetch(keys[g] + i);
    }
};

// Merge a split's row into the row of all splits before it.
inline void merge_row(float* sum, float& sum_greatest, float& sum_total, const float* part,
                      float greatest, float total, int padded) {
    if (greatest == -std::numeric_limits<float>::infinity()) return;  // the row sees none of it
    const float top = greatest > sum_greatest ? greatest : sum_greatest;
    const F16 old_share = exp2(set1(sum_greatest - top)), new_share = exp2(set1(greatest - top));
    for (int i = 0; i < padded; i += kLanes)
        store(sum + i, fma(load(sum + i), old_share, mul(load(part + i), new_share)));
    float shares[2][kLanes];
    store(shares[0], old_share);
    store(shares[1], new_share);
    sum_total = sum_total * shares[0][0] + total * shares[1][0];
    sum_greatest = top;
}

// Sixteen outputs, or n < 16, at any column.
inline void store_output(const Rows& out, bool rounded, int64_t row, int64_t at, F16 x, int n) {
    if (!rounded) {
        store_n(out.floats(row) + at, x, n);
    } else if (n == kLanes) {
        store_bf16(out.halves(row) + at, x);
    } else {
        bf16 values[kLanes];
        store_bf16(values, x);
        std::memcpy(out.halves(row) + at, values, size_t(n) * 2);
    }
}

inline void store_row(const Rows& out, bool rounded, int64_t row, int64_t at, const float* sum,
                      float total, int dim) {
    const F16 divisor = set1(total);
    for (int i = 0; i < dim; i += kLanes)
        store_output(out, rounded, row, at + i, div(load(sum + i), divisor),
                     std::min(kLanes, dim - i));
}

// What attention reads and writes in one layer.
struct AttentionCall {
    const Batch& batch;
    const Heads& heads;
    float scale;
    int chunk_size;
    const Cache& kv;
    int64_t layer;
    const float* q;  // rotated queries, [T] rows of `q_stride` floats
    int64_t q_stride;
    Rows out;
    bool rounded;     // `out` is bf16
    bool exact;       // queries and weights stay float32
    float* partials;  // [partial][query heads][2 + padded dim]: greatest, total, sum

    float* partial(int64_t index, int head) const {
        return partials + (index * heads.q + head) * (2 + kv.dim_vectors() * kLanes);
    }
};

// One piece with one key/value head. kRounded: queries and weights go into their products as bf16.
template <int32_t type, bool kRounded>
void attend(const AttentionCall& call, const Piece& piece, int head, AttentionScratch& scratch) {
    constexpr float kNone = -std::numeric_limits<float>::infinity();
    const Cache& kv = call.kv;
    const int per_kv = call.heads.per_kv(), rows = piece.tokens * per_kv, dim = call.heads.dim;
    const int vectors = kv.dim_vectors(), padded = vectors * kLanes, q_width = kv.dim_pairs() * 2;
    const int per_split = split_blocks(kv), groups = kv.groups();
    const int64_t width = int64_t(per_split * groups + 1) / 2 * 2 * kLanes;
    const int tiles = int(ceil_div(rows, kMaxRows));
    scratch.make_room(rows, q_width, width, padded);

    const F16 scale = set1(call.scale * 1.44269504088896341f);  // scores in powers of 2, not e
    for (int r = 0; r < rows; ++r) {
        const float* from = call.q + (piece.token + r / per_kv) * call.q_stride +
                            (head * per_kv + r % per_kv) * int64_t(dim);
        float* to = scratch.q.data() + int64_t(r) * q_width;
        for (int i = 0; i < dim; i += kLanes) {
            const int n = std::min(kLanes, dim - i);
            F16 x = mul(load_n(from + i, n), scale);
            if constexpr (kRounded) {
                store_output(Rows{reinterpret_cast<char*>(to), 0}, true, 0, i, x, n);
            } else {
                store_n(to + i, x, n);
            }
        }
    }
    const int32_t* table = call.batch.block_table + piece.sequence * call.batch.table_stride;
    const int32_t* position = call.batch.positions + piece.token;
    const int last = position[piece.tokens - 1];
    const int earliest = first_key(position[0], call.chunk_size);
    for (int split = piece.split; split < piece.split + piece.splits; ++split) {
        // The groups of 16 slots that this split holds, as far as the last query sees.
        int count = 0;
        for (int b = split * per_split; b < (split + 1) * per_split; ++b) {
            if (b * kv.block_size > last) break;
            if ((b + 1) * kv.block_size <= earliest) continue;  // may be freed: do not even look
            char* block = kv.head(call.layer, table[b], head);
            for (int g = 0; g < groups; ++g) {
                const int base = b * kv.block_size + g * kLanes;
                if (base > last) break;
                if (base + kLanes <= earliest) continue;
                if constexpr (type == kInt8) {
                    scratch.key_scales[count] = kv.scales(block, g, 0);
                    scratch.value_scales[count] = kv.scales(block, g, 1);
                }
                scratch.keys[count] = kv.keys(block, g);
                scratch.values[count] = kv.values(block, g);
                scratch.bases[count] = base;
                scratch.counts[count++] =
                    std::min({kLanes, kv.block_size - g * kLanes, last + 1 - base});
            }
        }
        // Scores.
        Tile t{};
        t.a_stride = int64_t(q_width) * 4;
        t.pairs = kv.dim_pairs();
        t.c_stride = width;
        for (int g = 0, taken; g < count; g += taken) {
            taken = tile_vectors(rows, count - g);
            for (int i = 0; i < taken; ++i) t.w[i] = scratch.keys[g + i];
            if (piece.tokens == 1) scratch.fetch(g, taken, count, kv);
            for (int tile = 0, row = 0; tile < tiles; ++tile) {
                const int n = (rows - row) / (tiles - tile);
                t.a = reinterpret_cast<const char*>(scratch.q.data() + int64_t(row) * q_width);
                t.c = scratch.scores.data() + row * width + int64_t(g) * kLanes;
                score_kernel<type, kRounded>(n, taken)(t);
                row += n;
            }
        }
        // Weights, in place of the scores.
        const bool first = split == piece.split;
        float* greatest = (first ? scratch.sum_greatest : scratch.greatest).data();
        float* total = (first ? scratch.sum_total : scratch.total).data();
        float* part = (first ? scratch.sum : scratch.part).data();
        for (int r = 0; r < rows; ++r) {
            float* s = scratch.scores.data() + r * width;
            const int limit = position[r / per_kv];
            const int start = first_key(limit, call.chunk_size);
            F16 top = set1(kNone);
            for (int g = 0; g < count; ++g) {
                F16 x = load(s + g * kLanes);
                const int base = scratch.bases[g];
                const int n = std::clamp(limit + 1 - base, 0, scratch.counts[g]);
                if constexpr (type == kInt8) x = mul(x, load(scratch.key_scales[g]));
                if (n < kLanes) x = keep(x, n, set1(kNone));
                if (start > base) x = keep(set1(kNone), std::min(start - base, kLanes), x);
                if (type == kInt8 || n < kLanes || start > base) store(s + g * kLanes, x);
                top = max(x, top);
            }
            greatest[r] = reduce_max(top);
            const F16 shift = set1(greatest[r] == kNone ? 0.0f : greatest[r]);
            F16 sum = zero();
            for (int g = 0; g < count; ++g) {
                F16 x = exp2(sub(load(s + g * kLanes), shift));
                sum = add(sum, x);
                // Lanes past the group's slots may become NaN here; the weighted sum skips them.
                if constexpr (type == kInt8) x = mul(x, load(scratch.value_scales[g]));
                if constexpr (kRounded)
                    store_bf16(scratch.weights.data() + r * width + g * kLanes, x);
                else
                    store(s + g * kLanes, x);
            }
            total[r] = reduce_add(sum);
        }
        // The weighted sum of values.
        ValueTile v{};
        const char* weights = kRounded ? reinterpret_cast<const char*>(scratch.weights.data())
                                       : reinterpret_cast<const char*>(scratch.scores.data());
        v.p_stride = width * (kRounded ? 2 : 4);
        v.groups = scratch.values.data();
        v.counts = scratch.counts.data();
        v.num_groups = count;
        v.vector_stride = kv.value_vector();
        v.out_stride = padded;
        for (int d = 0, taken; d < vectors; d += taken) {
            taken = tile_vectors(rows, vectors - d);
            for (int tile = 0, row = 0; tile < tiles; ++tile) {
                const int n = (rows - row) / (tiles - tile);
                v.p = weights + row * v.p_stride;
                v.out = part + int64_t(row) * padded + d * kLanes;
                value_kernel_for<type, kRounded>(n, taken)(v);
                row += n;
            }
            for (int g = 0; g < count; ++g) scratch.values[g] += taken * kv.value_vector();
        }
        for (int r = 0; r < rows && !first; ++r)
            merge_row(scratch.sum.data() + int64_t(r) * padded, scratch.sum_greatest[r],
                      scratch.sum_total[r], part + int64_t(r) * padded, greatest[r], total[r],
                      padded);
    }
    for (int r = 0; r < rows; ++r) {
        const float* sum = scratch.sum.data() + int64_t(r) * padded;
        const int h = head * per_kv + r % per_kv;
        if (piece.partial >= 0) {
            float* to = call.partial(piece.partial, h);
            to[0] = scratch.sum_greatest[r];
            to[1] = scratch.sum_total[r];
            std::memcpy(to + 2, sum, size_t(padded) * 4);
        } else {
            store_row(call.out, call.rounded, piece.token + r / per_kv, int64_t(h) * dim, sum,
                      scratch.sum_total[r], dim);
        }
    }
}

// Merge the splits of one query, for one of its heads.
inline void merge_splits(const AttentionCall& call, const Piece& piece, int head) {
    const int padded = call.kv.dim_vectors() * kLanes;
    float* sum = call.partial(piece.partial, head);
    for (int i = 1; i < piece.splits; ++i) {
        const float* part = call.partial(piece.partial + i, head);
        merge_row(sum + 2, sum[0], sum[1], part + 2, part[0], part[1], padded);
    }
    store_row(call.out, call.rounded, piece.token, int64_t(head) * call.heads.dim, sum + 2, sum[1],
              call.heads.dim);
}

// Attention of the whole batch in one layer: one phase, or two where splits were computed apart.
inline void attention(Worker& worker, const AttentionPlan& plan, const AttentionCall& call,
                      AttentionScratch& scratch) {
    const int heads = call.heads.kv;
    worker.share(int(plan.pieces.size()) * heads, [&](int item, int) {
        const Piece& piece = plan.pieces[item / heads];
        switch (call.kv.type) {
            case kFloat32: attend<kFloat32, false>(call, piece, item % heads, scratch); break;
            case kInt8: attend<kInt8, false>(call, piece, item % heads, scratch); break;
            case kFloat16: attend<kFloat16, false>(call, piece, item % heads, scratch); break;
            default:
#if defined(ARRIERO_BF16)
                if (!call.exact) {
                    attend<kBFloat16, true>(call, piece, item % heads, scratch);
                    break;
                }
#endif
                attend<kBFloat16, false>(call, piece, item % heads, scratch);
        }
    });
    if (plan.merges.empty()) return;
    worker.share(int(plan.merges.size()) * call.heads.q, [&](int item, int) {
        merge_splits(call, plan.merges[item / call.heads.q], item % call.heads.q);
    });
}

}  // namespace arriero
