// Low-rank adapters: y += (x Aᵀ) B for rows of several adapters at once.
//
// Knows slots, ranks and rows; knows nothing of layers. The sums x Aᵀ are a phase of their own;
// their products with B are added to the blocks of sums of the base's product while these are in
// the first cache, or to finished rows of y.
//
// Same tokens: each row sums alone, in an order that depends on its adapter's rank and on the sizes
// of the product, and never on the other rows.
#pragma once

#include <cmath>

#include "product.h"

namespace arriero {

// The C struct that Python fills: the adapters of one product, a slot for each. Rows of A and B are
// padded with zeros to whole vectors.
struct Lora {
    const char* a;          // [slots][max_rank][in, padded]
    const char* b;          // [slots][max_rank][out, padded], times the adapter's scale
    const int32_t* ranks;   // [slots]; 0: the adapter leaves the product as it is
    int64_t slots, max_rank, in_features, out_features;
    int64_t first;          // column of y for the first output
    int32_t type;           // kFloat32 or kBFloat16

    int64_t a_stride() const { return ceil_div(in_features, kLanes) * kLanes; }
    int64_t b_stride() const { return ceil_div(out_features, kLanes) * kLanes; }
};

// Rows order[start .. stop) belong to the adapter of `slot`.
struct LoraRun {
    int32_t slot, start, stop;
};

// The rows of a batch that have an adapter. The C struct that Python fills.
struct LoraRows {
    const int32_t* order;  // rows, by slot and then by row
    const LoraRun* runs;
    const int32_t* slots;  // slot of each row of the batch, or -1
    int64_t num_ordered, num_runs;
};

// The adapters of a product, one for each stacked matrix; the C struct that Python fills.
struct LoraParts {
    const Lora* parts;
    int64_t count;
};

// And those of the products of a layer.
struct LayerLora {
    LoraParts qkv, o, gate_up, down;
};

inline F16 load_weights(const float* p) { return load(p); }
inline F16 load_weights(const bf16* p) { return load_bf16(p); }
inline F16 load_some(const float* p, int n) { return load_n(p, n); }
inline F16 load_some(const bf16* p, int n) {
    bf16 values[kLanes] = {};
    std::memcpy(values, p, size_t(n) * sizeof(bf16));
    return load_bf16(values);
}
inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bf16_to_float(x); }

inline constexpr int64_t kRanksAtOnce = 4;    // ranks of an item
inline constexpr int64_t kLoraColumns = 256;  // columns of y in an item

// Sums of products of M rows of x with N rows of A, each in a chain of its own.
template <int M, int N, class Input, class Element>
inline void shrink(const Element* a, int64_t a_stride, const Input* const (&x)[2], int64_t size,
                   float* const (&to)[2]) {
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
    for (int64_t i = 0; i < whole; i += kLanes) add(i, kLanes);
    if (whole < size) add(whole, int(size - whole));
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) to[m][n] = reduce_add(sums[m][n]);
}

// Add `V` vectors of a row's product with B to y; `n` columns of the last vector.
template <int V, class Element>
inline void expand(const Element* b, int64_t b_stride, int64_t rank, const float* sums, float* y,
                   int n) {
    F16 to[V];
    for (int v = 0; v < V; ++v) to[v] = load_n(y + v * kLanes, v + 1 < V ? kLanes : n);
    for (int64_t j = 0; j < rank; ++j) {
        const F16 factor = set1(sums[j]);
        for (int v = 0; v < V; ++v)
            to[v] = fma(factor, load_weights(b + j * b_stride + v * kLanes), to[v]);
    }
    for (int v = 0; v < V; ++v) store_n(y + v * kLanes, to[v], v + 1 < V ? kLanes : n);
}

// A product's adapters for the rows of a batch.
class LoraCall {
  public:
    // `sums`: room for [parts][num_rows][max_rank]. Without `rows` or parts nothing is added.
    LoraCall(LoraParts parts, const LoraRows* rows, int64_t num_rows, float* sums)
        : parts_(parts), rows_(parts.count ? rows : nullptr), num_rows_(num_rows), sums_(sums) {}

    static int64_t room(const LoraParts& parts, int64_t num_rows) {
        return parts.count ? parts.count * num_rows * parts.parts[0].max_rank * 4 : 0;
    }

    // The sums of the inputs with A: a phase, before `add` or `add_to`.
    void shrink_rows(Worker& worker, const Rows& x, bool rounded) const {
        if (rows_ == nullptr) return;
        share(worker, kRanksAtOnce, [](const Lora& lora, const LoraRun& run) {
            return int64_t(lora.ranks[run.slot]);
        }, [&](int64_t part, const LoraRun& run, int64_t rank) {
            with_types(part, rounded, [&](auto input, auto element) {
                shrink_run<decltype(input), decltype(element)>(part, run, rank, x);
            });
        });
    }

    // Add the products with B to a block of the base's sums.
    void add(const Block& block) const {
        if (rows_ == nullptr) return;
        for (int64_t part = 0; part < parts_.count; ++part)
            for (int half = 0; half < (block.second < 0 ? 1 : 2); ++half) {
                if (parts_.parts[part].type == kBFloat16)
                    add_panel<bf16>(part, block, half);
                else
                    add_panel<float>(part, block, half);
            }
    }

    // Add the products with B to rows of y: a phase.
    void add_to(Worker& worker, float* y, int64_t y_stride) const {
        if (rows_ == nullptr) return;
        share(worker, kLoraColumns, [](const Lora& lora, const LoraRun& run) {
            return lora.ranks[run.slot] ? lora.out_features : int64_t(0);
        }, [&](int64_t part, const LoraRun& run, int64_t column) {
            if (parts_.parts[part].type == kBFloat16)
                expand_run<bf16>(part, run, column, y, y_stride);
            else
                expand_run<float>(part, run, column, y, y_stride);
        });
    }

  private:
    float* sums_of(int64_t part, int64_t row) const {
        return sums_ + (part * num_rows_ + row) * parts_.parts[part].max_rank;
    }

    template <class F>
    void with_types(int64_t part, bool rounded, F&& f) const {
        const bool halves = parts_.parts[part].type == kBFloat16;
        if (rounded)
            halves ? f(bf16{}, bf16{}) : f(bf16{}, float{});
        else
            halves ? f(float{}, bf16{}) : f(float{}, float{});
    }

    // The sums of ranks [rank, rank + kRanksAtOnce) for all rows of a run, two rows at a time.
    template <class Input, class Element>
    void shrink_run(int64_t part, const LoraRun& run, int64_t rank, const Rows& x) const {
        const Lora& lora = parts_.parts[part];
        const int64_t stride = lora.a_stride();
        const Element* a = reinterpret_cast<const Element*>(lora.a) +
                           run.slot * lora.max_rank * stride;
        const int64_t stop = std::min<int64_t>(rank + kRanksAtOnce, lora.ranks[run.slot]);
        for (int64_t at = run.start; at < run.stop; at += 2) {
            const Input* inputs[2];
            float* to[2];
            for (int m = 0; m < 2; ++m) {
                const int64_t row = rows_->order[std::min<int64_t>(at + m, run.stop - 1)];
                inputs[m] = reinterpret_cast<const Input*>(x.data + row * x.stride);
                to[m] = sums_of(part, row);
            }
            for (int64_t r = rank; r < stop; r += 2) {
                float* const sums[2] = {to[0] + r, to[1] + r};
                const Element* rows = a + r * stride;
                const bool one_row = at + 1 == run.stop, one_rank = r + 1 == stop;
                if (one_row && one_rank)
                    shrink<1, 1>(rows, stride, inputs, lora.in_features, sums);
                else if (one_row)
                    shrink<1, 2>(rows, stride, inputs, lora.in_features, sums);
                else if (one_rank)
                    shrink<2, 1>(rows, stride, inputs, lora.in_features, sums);
                else
                    shrink<2, 2>(rows, stride, inputs, lora.in_features, sums);
            }
        }
    }

    // Add to one panel of a block. A panel may hold columns of several stacked matrices.
    template <class Element>
    void add_panel(int64_t part, const Block& block, int half) const {
        const Lora& lora = parts_.parts[part];
        const int64_t column = (half ? block.second : block.first) * kPanel;
        const int64_t low = std::max(column, lora.first);
        const int n = int(std::min(column + kPanel, lora.first + lora.out_features) - low);
        if (n <= 0) return;
        const int64_t stride = lora.b_stride(), from = low - lora.first;
        for (int row = 0; row < block.rows; ++row) {
            const int32_t slot = rows_->slots[block.row + row];
            const int64_t rank = slot < 0 ? 0 : lora.ranks[slot];
            if (rank == 0) continue;
            const Element* b = reinterpret_cast<const Element*>(lora.b) +
                               slot * lora.max_rank * stride + from;
            const float* sums = sums_of(part, block.row + row);
            float* c = block.c + row * kBlockStride + half * kPanel + (low - column);
            if (from % kLanes) {  // a whole vector of B could end beyond its memory
                for (int64_t j = 0; j < rank; ++j)
                    for (int i = 0; i < n; ++i)
                        c[i] = std::fma(sums[j], to_float(b[j * stride + i]), c[i]);
            } else if (n > kLanes) {
                expand<2>(b, stride, rank, sums, c, n - kLanes);
            } else {
                expand<1>(b, stride, rank, sums, c, n);
            }
        }
    }

    // Add columns [column, column + kLoraColumns) of a run's products with B to y.
    template <class Element>
    void expand_run(int64_t part, const LoraRun& run, int64_t column, float* y,
                    int64_t y_stride) const {
        constexpr int kVectors = 4;
        const Lora& lora = parts_.parts[part];
        const int64_t stride = lora.b_stride(), rank = lora.ranks[run.slot];
        const Element* b = reinterpret_cast<const Element*>(lora.b) +
                           run.slot * lora.max_rank * stride;
        const int64_t stop = std::min(column + kLoraColumns, lora.out_features);
        for (int64_t at = run.start; at < run.stop; ++at) {
            const int64_t row = rows_->order[at];
            const float* sums = sums_of(part, row);
            float* to = y + row * y_stride + lora.first;
            int64_t o = column;
            for (; o + kVectors * kLanes <= stop; o += kVectors * kLanes)
                expand<kVectors>(b + o, stride, rank, sums, to + o, kLanes);
            for (; o < stop; o += kLanes)
                expand<1>(b + o, stride, rank, sums, to + o,
                          int(std::min<int64_t>(kLanes, stop - o)));
        }
    }

    // The work of a phase: an item for each (part, run, step), with a step every `each` of `size`.
    template <class Size, class F>
    void share(Worker& worker, int64_t each, Size&& size, F&& f) const {
        struct Item {
            int64_t part, run, step;
        };
        std::vector<Item> items;
        for (int64_t part = 0; part < parts_.count; ++part)
            for (int64_t run = 0; run < rows_->num_runs; ++run)
                for (int64_t step = 0; step < size(parts_.parts[part], rows_->runs[run]);
                     step += each)
                    items.push_back({part, run, step});
        worker.share(int(items.size()), [&](int i, int) {
            const Item& item = items[size_t(i)];
            f(item.part, rows_->runs[item.run], item.step);
        });
    }

    LoraParts parts_;
    const LoraRows* rows_;
    int64_t num_rows_;
    float* sums_;
};

}  // namespace arriero
