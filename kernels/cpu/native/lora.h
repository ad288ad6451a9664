// Low-rank adapters: y += (x Aᵀ) B for rows of several adapters at once.
//
// Knows slots, ranks and rows; knows nothing of layers.
//
// Same tokens: each row sums alone, in an order that depends on its adapter's rank and on the sizes
// of the product, and never on the other rows.
#pragma once

#include "decoder.h"

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

struct LoraCall {
    const Lora* parts;
    int64_t num_parts;
    const float* x;
    int64_t x_stride;
    float* y;
    int64_t y_stride;
    const int32_t* order;
    const LoraRun* runs;
    int64_t num_runs;
    float* sums;  // [parts][rows of order][max_rank]
    int64_t num_ordered;

    float* sums_of(int64_t part, int64_t at) const {
        return sums + (part * num_ordered + at) * parts[part].max_rank;
    }
};

inline F16 load_weights(const float* p) { return load(p); }
inline F16 load_weights(const bf16* p) { return load_bf16(p); }

inline constexpr int kRanksAtOnce = 4;  // independent chains of sums
inline constexpr int64_t kLoraColumns = 256;  // columns of y in an item

// N sums of products of a row of x with rows of A.
template <int N, class Element>
inline void shrink(const Element* a, int64_t a_stride, const float* x, int64_t size, float* to) {
    F16 sums[N];
    for (int n = 0; n < N; ++n) sums[n] = zero();
    const int64_t whole = size / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
        const F16 v = load(x + i);
        for (int n = 0; n < N; ++n) sums[n] = fma(v, load_weights(a + n * a_stride + i), sums[n]);
    }
    if (whole < size) {
        const F16 v = load_n(x + whole, int(size - whole));
        for (int n = 0; n < N; ++n)
            sums[n] = fma(v, load_weights(a + n * a_stride + whole), sums[n]);
    }
    for (int n = 0; n < N; ++n) to[n] = reduce_add(sums[n]);
}

// The sums of ranks [rank, rank + N) for all rows of a run.
template <class Element>
inline void shrink_run(const LoraCall& call, int64_t part, const LoraRun& run, int64_t rank) {
    const Lora& lora = call.parts[part];
    const int64_t stride = lora.a_stride();
    const Element* a = reinterpret_cast<const Element*>(lora.a) +
                       (run.slot * lora.max_rank + rank) * stride;
    const int64_t left = lora.ranks[run.slot] - rank;
    for (int64_t at = run.start; at < run.stop; ++at) {
        const float* x = call.x + call.order[at] * call.x_stride;
        float* to = call.sums_of(part, at) + rank;
        switch (left) {
            case 1: shrink<1>(a, stride, x, lora.in_features, to); break;
            case 2: shrink<2>(a, stride, x, lora.in_features, to); break;
            case 3: shrink<3>(a, stride, x, lora.in_features, to); break;
            default: shrink<kRanksAtOnce>(a, stride, x, lora.in_features, to);
        }
    }
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

// Add columns [column, column + kLoraColumns) of a run's products with B to y.
template <class Element>
inline void expand_run(const LoraCall& call, int64_t part, const LoraRun& run, int64_t column) {
    constexpr int kVectors = 4;
    const Lora& lora = call.parts[part];
    const int64_t stride = lora.b_stride(), rank = lora.ranks[run.slot];
    const Element* b = reinterpret_cast<const Element*>(lora.b) + run.slot * lora.max_rank * stride;
    const int64_t stop = std::min(column + kLoraColumns, lora.out_features);
    for (int64_t at = run.start; at < run.stop; ++at) {
        const float* sums = call.sums_of(part, at);
        float* y = call.y + call.order[at] * call.y_stride + lora.first;
        int64_t o = column;
        for (; o + kVectors * kLanes <= stop; o += kVectors * kLanes)
            expand<kVectors>(b + o, stride, rank, sums, y + o, kLanes);
        for (; o < stop; o += kLanes)
            expand<1>(b + o, stride, rank, sums, y + o, int(std::min<int64_t>(kLanes, stop - o)));
    }
}

// The work of one phase: an item for each (part, run, step), with a step every `each` of `size`.
template <class Size, class F>
inline void share_runs(Worker& worker, const LoraCall& call, int64_t each, Size&& size, F&& f) {
    struct Item {
        int64_t part, run, step;
    };
    std::vector<Item> items;
    for (int64_t part = 0; part < call.num_parts; ++part)
        for (int64_t run = 0; run < call.num_runs; ++run)
            for (int64_t step = 0; step < size(call.parts[part], call.runs[run]); step += each)
                items.push_back({part, run, step});
    worker.share(int(items.size()), [&](int i, int) {
        const Item& item = items[size_t(i)];
        f(item.part, call.runs[item.run], item.step);
    });
}

inline void add_lora(Worker& worker, const LoraCall& call) {
    share_runs(
        worker, call, kRanksAtOnce,
        [](const Lora& lora, const LoraRun& run) { return int64_t(lora.ranks[run.slot]); },
        [&](int64_t part, const LoraRun& run, int64_t rank) {
            if (call.parts[part].type == kBFloat16)
                shrink_run<bf16>(call, part, run, rank);
            else
                shrink_run<float>(call, part, run, rank);
        });
    share_runs(
        worker, call, kLoraColumns,
        [](const Lora& lora, const LoraRun& run) {
            return lora.ranks[run.slot] ? lora.out_features : int64_t(0);
        },
        [&](int64_t part, const LoraRun& run, int64_t column) {
            if (call.parts[part].type == kBFloat16)
                expand_run<bf16>(call, part, run, column);
            else
                expand_run<float>(call, part, run, column);
        });
}

}  // namespace arriero
