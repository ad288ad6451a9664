// The paged cache: its layout, and what is done to queries, keys and values on the way there.
//
// Knows blocks and slots; knows nothing of weights and scores.
//
// A block holds, for each key/value head, its keys and then its values, cut into groups of 16
// slots (the last one padded when the block size is no multiple of 16). Both are what matrix.h
// calls vectors: of a group's keys, 16 slots are the columns and head dimensions run in pairs; of
// its values, 16 dimensions are the columns and slots run in pairs. So scores and the weighted sum
// use the product kernels' pattern, with nothing copied or transposed.
#pragma once

#include <algorithm>

#include "matrix.h"

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

struct LoraRows;

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
    const LoraRows* adapters;  // or null
};

struct Heads {
    int q, kv, dim;
    int per_kv() const { return q / kv; }
    int64_t width() const { return int64_t(q + 2 * kv) * dim; }
};

enum Rope : int32_t { kHalves = 0, kPairs = 1, kNoRope = 2 };

// Which earlier keys a query sees; all 0: every one. The C struct that Python fills.
struct Visible {
    int32_t chunk_size;  // those of its own chunk of so many
    int32_t window;      // the last so many, its own among them
    int32_t sinks;       // and, beside a window, the first so many

    // The first key that a query at `position` sees, sinks aside.
    int first(int position) const {
        if (chunk_size > 0) return position / chunk_size * chunk_size;
        return window > 0 ? std::max(0, position - window + 1) : 0;
    }
    bool operator==(const Visible&) const = default;
};

// What a layer's attention does beyond Llama 3's. The C struct that Python fills.
struct Style {
    int32_t rope;
    int32_t qk_norm;
    float eps;
    float query_gain, query_floor;  // gain 0 for off
    Visible visible;
    const float* q_norm;  // weights of a norm before RoPE, [head_dim]; null for none
    const float* k_norm;
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

// Divide one head by its root mean square, and multiply it by the weights unless they are null.
inline void norm_head(float* x, int dim, float eps, const float* weight) {
    F16 sum = zero();
    for (int i = 0; i < dim; i += kLanes) {
        F16 v = load_n(x + i, std::min(kLanes, dim - i));
        sum = fma(v, v, sum);
    }
    const F16 factor = set1(1.0f / std::sqrt(reduce_add(sum) / float(dim) + eps));
    for (int i = 0; i < dim; i += kLanes) {
        const int n = std::min(kLanes, dim - i);
        F16 v = mul(load_n(x + i, n), factor);
        store_n(x + i, weight == nullptr ? v : mul(v, load_n(weight + i, n)), n);
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
        const float* weight = h < heads.q ? style.q_norm : style.k_norm;
        if (weight != nullptr) norm_head(x, heads.dim, style.eps, weight);
        rotate(x, heads.dim, cos, sin, style.rope);
        if (style.qk_norm) norm_head(x, heads.dim, style.eps, nullptr);
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

}  // namespace arriero
