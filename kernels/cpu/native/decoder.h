// A stage's layers over one batch: norms, products, attention, residual sums.
//
// Knows a layer's parts and the order in which threads meet; knows nothing of Python.
#pragma once

#include <string>

#include "attention.h"
#include "exponentials.h"
#include "lora.h"

namespace arriero {

struct Experts;

// The C struct that Python fills.
struct Layer {
    const float* attn_norm;
    const float* mlp_norm;
    Matrix qkv, o, gate_up, down;  // the last two are the shared expert's where there are experts
    const Experts* experts;        // or null
    const LayerLora* lora;         // or null
    int32_t num_q_heads, num_kv_heads, head_dim;
    float scale;
    float eps;
    Style style;
    int32_t local;  // whether its cache is the chunk-local layers' own
    int32_t index;  // its place in its cache

    Heads heads() const { return {num_q_heads, num_kv_heads, head_dim}; }
};

// Root-mean-square norm of one row, handed to `put(at, sixteen values)`; tails come out as 0.
template <class Put>
inline void rms_norm_row(const float* x, const float* weight, float eps, int64_t size, Put&& put) {
    // Four chains, each over every fourth vector: a fixed order, and four times the speed of one.
    F16 sums[4] = {zero(), zero(), zero(), zero()};
    const int64_t whole = size / kLanes * kLanes;
    const int rest = int(size - whole);
    for (int64_t i = 0; i < whole; i += kLanes) {
        F16 v = load(x + i);
        F16& sum = sums[i / kLanes % 4];
        sum = fma(v, v, sum);
    }
    if (rest) {
        F16 v = load_n(x + whole, rest);
        sums[0] = fma(v, v, sums[0]);
    }
    const float total = reduce_add(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
    const F16 factor = set1(1.0f / std::sqrt(total / float(size) + eps));
    for (int64_t i = 0; i < whole; i += kLanes)
        put(i, mul(mul(load(x + i), factor), load(weight + i)));
    if (rest) put(whole, mul(mul(load_n(x + whole, rest), factor), load_n(weight + whole, rest)));
}

// What one set of threads computes with.
struct Machine {
    explicit Machine(int num_threads, bool exact_inputs)
        : pool(num_threads), exact(exact_inputs), scratch(num_threads), own(num_threads) {}

    Pool pool;
    bool exact;  // bf16 matrices take float32 inputs: slower, closer
    Buffer normed, qkv, mixed, hidden, partials;
    Buffer adapted;  // sums of adapters
    Buffer logits, scaled, gated, shared, routed, routes;  // of layers with experts
    std::vector<AttentionScratch> scratch;
    std::vector<Buffer> own;  // each thread's rows, when all threads compute all of them
};

// Below so many rows each thread norms all of them for itself: cheaper than meeting the others.
inline constexpr int64_t kOwnRows = 8;

// Run f(row) for each row, a few rows an item.
template <class F>
inline void share_rows(Worker& worker, int64_t rows, F&& f) {
    const int64_t chunk = rows <= 2 * kOwnRows ? 2 : 8;
    worker.share(int(ceil_div(rows, chunk)), [&](int item, int) {
        for (int64_t row = item * chunk; row < std::min((item + 1) * chunk, rows); ++row) f(row);
    });
}

// Norm the rows into inputs for a product with `m`.
inline Rows norm_rows(Machine& machine, Worker& worker, const float* x, int64_t x_stride,
                      int64_t num_rows, const float* weight, float eps, const Matrix& m,
                      char* shared) {
    const bool rounded = rounds_inputs(m, machine.exact), own = num_rows <= kOwnRows;
    Rows rows{shared, row_stride(m)};
    auto one = [&](int64_t row) {
        rms_norm_row(x + row * x_stride, weight, eps, m.in_features,
                     [&](int64_t at, F16 v) { store_inputs(rows, rounded, row, at, v); });
        round_row(m, rows, row);
    };
    if (own) {
        rows.data = machine.own[worker.thread].room(rows.stride * num_rows);
        for (int64_t row = 0; row < num_rows; ++row) one(row);
    } else {
        share_rows(worker, num_rows, one);
    }
    return rows;
}

// Round finished inputs of a product with `m`, where it takes levels: a phase.
inline void round_rows(Worker& worker, const Matrix& m, const Rows& rows, int64_t num_rows) {
    if (takes_levels(m))
        share_rows(worker, num_rows, [&](int64_t row) { round_row(m, rows, row); });
}

// Store or add a block of sums: out [row][column], columns past the matrix's left alone.
template <bool kAdd>
inline void put_block(const Block& block, float* out, int64_t out_stride, int64_t columns) {
    for (int half = 0; half < (block.second < 0 ? 1 : 2); ++half) {
        const int64_t column = (half ? block.second : block.first) * kPanel;
        for (int v = 0; v < 2; ++v) {
            const int64_t at = column + v * kLanes;
            const int n = int(std::min<int64_t>(kLanes, columns - at));
            if (n <= 0) break;
            const float* c = block.c + half * kPanel + v * kLanes;
            for (int row = 0; row < block.rows; ++row, c += kBlockStride) {
                float* to = out + (block.row + row) * out_stride + at;
                F16 x = load(c);
                if (n == kLanes)
                    store(to, kAdd ? add(load(to), x) : x);
                else
                    store_n(to, kAdd ? add(load_n(to, n), x) : x, n);
            }
        }
    }
}

// The adapters of a layer's product for the rows of a batch.
inline LoraCall lora_of(Machine& machine, const Layer& layer, LoraParts LayerLora::*product,
                        const LoraRows* rows, int64_t tokens) {
    const LoraParts parts = layer.lora == nullptr ? LoraParts{} : layer.lora->*product;
    return {parts, rows, tokens, reinterpret_cast<float*>(machine.adapted.room(0))};
}

// Attention half of a layer: adds to `x`, or writes the partial sum to `part` when that is given.
inline void attention_block(Machine& machine, Worker& worker, const Layer& layer, const Cache& kv,
                            const Batch& batch, const AttentionPlan& plan, float* x, float* part) {
    const int64_t tokens = batch.tokens, hidden = layer.qkv.in_features;
    const Heads heads = layer.heads();
    const int64_t width = ceil_div(heads.width(), kLanes) * kLanes;
    float* qkv = reinterpret_cast<float*>(machine.qkv.room(0));
    Rows normed = norm_rows(machine, worker, x, hidden, tokens, layer.attn_norm, layer.eps,
                            layer.qkv, machine.normed.room(0));
    const bool rounded_qkv = rounds_inputs(layer.qkv, machine.exact);
    auto adapters_of = [&](LoraParts LayerLora::*product) {
        return lora_of(machine, layer, product, batch.adapters, tokens);
    };
    const LoraCall qkv_lora = adapters_of(&LayerLora::qkv), o_lora = adapters_of(&LayerLora::o);
    adapted_product(
        worker, layer.qkv, normed, rounded_qkv, tokens, false, qkv_lora, o_lora,
        [&](const Block& b) { put_block<false>(b, qkv, width, heads.width()); });
    share_rows(worker, tokens, [&](int64_t t) {
        rope_write(batch, t, heads, layer.style, qkv + t * width, kv, layer.index);
    });
    const bool rounded = rounds_inputs(layer.o, machine.exact);
    const Rows mixed{machine.mixed.room(0), row_stride(layer.o)};
    const AttentionCall call{batch, heads, layer.scale, layer.style.visible, kv, layer.index,
                             qkv, width, mixed, rounded, machine.exact,
                             reinterpret_cast<float*>(machine.partials.room(0))};
    attention(worker, plan, call, machine.scratch[worker.thread]);
    round_rows(worker, layer.o, mixed, tokens);
    const LoraCall up_lora = adapters_of(&LayerLora::gate_up);
    adapted_product(worker, layer.o, mixed, rounded, tokens, false, o_lora, up_lora,
                    [&](const Block& b) {
                        if (part != nullptr)
                            put_block<false>(b, part, hidden, layer.o.out_features);
                        else
                            put_block<true>(b, x, hidden, layer.o.out_features);
                    });
}

// silu(gate) * up, from raw sums.
inline void silu_mul_row(const float* gate, const float* up, int64_t size, const Rows& out,
                         bool rounded, int64_t row) {
    for (int64_t i = 0; i < size; i += kLanes) {
        const int n = int(std::min<int64_t>(kLanes, size - i));
        store_output(out, rounded, row, i, mul(silu(load_n(gate + i, n)), load_n(up + i, n)), n);
    }
}

// The sums of a gate and up product, and what becomes of them: silu(gate) * up, in `to`, as inputs
// of the next product.
struct GatedSums {
    Machine& machine;
    const Matrix &m, &next;
    Rows to;
    bool rounded;

    int64_t size() const { return m.out_features / 2; }
    // Whether gate and up columns stand panel by panel; else the sums go through memory.
    bool paired() const { return size() % kPanel == 0; }
    float* sums() const { return reinterpret_cast<float*>(machine.qkv.room(0)); }

    // Take a block whose row 0 is row `first` of `to`.
    void put(const Block& b, int64_t first) const {
        if (!paired()) {
            put_block<false>(b, sums() + first * 2 * size(), 2 * size(), 2 * size());
            return;
        }
        for (int row = 0; row < b.rows; ++row) {
            const float* c = b.c + row * kBlockStride;
            for (int v = 0; v < kPanel; v += kLanes)
                store_inputs(to, rounded, first + b.row + row, b.first * kPanel + v,
                             mul(silu(load(c + v)), load(c + kPanel + v)));
            if (takes_levels(next)) round_panel(first + b.row + row, b.first);
        }
    }
    // After the last block of all rows.
    void finish(Worker& worker, int64_t rows) const {
        if (paired()) return;
        share_rows(worker, rows, [&](int64_t row) {
            const float* gate = sums() + row * 2 * size();
            silu_mul_row(gate, gate + size(), size(), to, rounded, row);
            round_row(next, to, row);
        });
    }

  private:
    // A panel's columns are a group of the next product's inputs.
    void round_panel(int64_t row, int64_t panel) const {
        static_assert(kPanel == kLevelGroup);
        const Levels levels = to.levels(row, size());
        round_group(to.floats(row) + panel * kPanel, next.type == kInt4Dot,
                    levels.levels + panel * kPanel, levels.factors + 2 * panel);
    }
};

// MLP half of a layer; `next`: the layer that comes after, or null.
inline void mlp_block(Machine& machine, Worker& worker, const Layer& layer, const Layer* next,
                      const LoraRows* adapters, int64_t tokens, float* x, float* part) {
    const int64_t hidden = layer.gate_up.in_features;
    const bool rounded = rounds_inputs(layer.down, machine.exact);
    const Rows mixed{machine.hidden.room(0), row_stride(layer.down)};
    Rows normed = norm_rows(machine, worker, x, hidden, tokens, layer.mlp_norm, layer.eps,
                            layer.gate_up, machine.normed.room(0));
    const GatedSums gated{machine, layer.gate_up, layer.down, mixed, rounded};
    const bool rounded_up = rounds_inputs(layer.gate_up, machine.exact);
    const LoraCall up_lora = lora_of(machine, layer, &LayerLora::gate_up, adapters, tokens);
    const LoraCall down_lora = lora_of(machine, layer, &LayerLora::down, adapters, tokens);
    adapted_product(worker, layer.gate_up, normed, rounded_up, tokens, gated.paired(), up_lora,
                    down_lora, [&](const Block& b) { gated.put(b, 0); });
    gated.finish(worker, tokens);
    const LoraCall next_lora =
        lora_of(machine, next == nullptr ? layer : *next, &LayerLora::qkv,
                next == nullptr ? nullptr : adapters, tokens);
    adapted_product(worker, layer.down, mixed, rounded, tokens, false, down_lora, next_lora,
                    [&](const Block& b) {
                        if (part != nullptr)
                            put_block<false>(b, part, hidden, layer.down.out_features);
                        else
                            put_block<true>(b, x, hidden, layer.down.out_features);
                    });
}

// Room for `rows` rows of inputs of `m` in `to`; an odd last input must read as 0.
inline void make_gated_room(Machine& machine, Buffer& to, const Matrix& m, int64_t rows) {
    const int64_t size = m.in_features;
    if (size % kPanel) machine.qkv.room(2 * size * rows * 4);
    char* data = to.room(row_stride(m) * rows);
    if (size % 2) std::memset(data, 0, size_t(row_stride(m) * rows));
}

// Room for all that an attention half keeps between phases; an odd last input must read as 0.
inline void make_attention_room(Machine& machine, const Layer& layer, int64_t tokens,
                                const AttentionPlan& plan) {
    const int64_t width = ceil_div(layer.heads().width(), kLanes) * kLanes;
    const int64_t padded = ceil_div(layer.head_dim, kLanes) * kLanes;
    machine.normed.room(row_stride(layer.qkv) * tokens);
    machine.qkv.room(width * tokens * 4);
    char* mixed = machine.mixed.room(row_stride(layer.o) * tokens);
    if (layer.o.in_features % 2)
        std::memset(mixed, 0, size_t(row_stride(layer.o) * tokens));
    machine.partials.room(plan.partials * layer.num_q_heads * (2 + padded) * 4);
}

// And an MLP half.
inline void make_mlp_room(Machine& machine, const Layer& layer, int64_t tokens) {
    machine.normed.room(row_stride(layer.gate_up) * tokens);
    make_gated_room(machine, machine.hidden, layer.down, tokens);
}

// And the sums of the adapters of each product in turn.
inline void make_lora_room(Machine& machine, const Layer& layer, int64_t tokens) {
    if (layer.lora == nullptr) return;
    for (auto product : {&LayerLora::qkv, &LayerLora::o, &LayerLora::gate_up, &LayerLora::down})
        machine.adapted.room(LoraCall::room(layer.lora->*product, tokens));
}

inline constexpr int kLayerPhases = 24;  // at least the `share` calls of one layer

}  // namespace arriero
