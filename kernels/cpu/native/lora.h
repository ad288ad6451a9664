// Low-rank adapters: y += (x Aᵀ) B for rows of several adapters at once.
//
// Knows slots, ranks and rows; knows nothing of layers. The sums x Aᵀ are the first items of the
// base's product; their products with B are added to its blocks of sums while these are in the
// first cache, or to finished rows of y. A tile takes a few rows of one adapter, so that its A and
// B are read and converted once for them; what is read next is fetched early.
//
// Same tokens: each row sums alone, in an order that depends on its adapter's rank and on the sizes
// of the product, and never on the other rows.
#pragma once

#include <algorithm>

#include "lora_tiles.h"
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
    int64_t element_bytes() const { return element_size(type); }
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

inline constexpr int64_t kRanksAtOnce = 4;    // ranks of an item
inline constexpr int64_t kLoraColumns = 256;  // columns of y in an item

// A product's adapters for the rows of a batch.
class LoraCall {
  public:
    // `sums`: room for [parts][num_rows][max_rank]. Without `rows` or parts nothing is added.
    LoraCall(LoraParts parts, const LoraRows* rows, int64_t num_rows, float* sums)
        : parts_(parts), rows_(parts.count ? rows : nullptr), num_rows_(num_rows), sums_(sums) {}

    static int64_t room(const LoraParts& parts, int64_t num_rows) {
        return parts.count ? parts.count * num_rows * parts.parts[0].max_rank * 4 : 0;
    }

    // Items of the sums with A: they come before `add` and `expand`.
    int shrink_items() const { return items(rank_steps()); }
    int expand_items() const { return items(column_steps()); }

    // The sums of the inputs with some rows of A; `next`: the item that this thread does next, or
    // -1.
    void shrink(int item, int next, const Rows& x, bool rounded) const {
        const Item of = item_of(item, rank_steps());
        const Item then = next < 0 ? of : item_of(next, rank_steps());
        with_types(of.part, rounded, [&](auto input, auto element) {
            using Element = decltype(element);
            shrink_run<decltype(input), Element>(of, x, a_of<Element>(then));
        });
    }

    // What `add` will read for a block.
    void stream_b(const Block& block, Stream& stream) const {
        for (int64_t run = 0; rows_ != nullptr && run < rows_->num_runs; ++run)
            for (int64_t part = 0; part < parts_.count; ++part) {
                const Lora& lora = parts_.parts[part];
                const int32_t slot = rows_->runs[run].slot;
                const int64_t stride = lora.b_stride() * lora.element_bytes();
                for (int64_t panel : {block.first, block.second}) {
                    if (panel < 0) continue;
                    const Columns columns = columns_of(lora, panel);
                    stream.add(lora.b + slot * lora.max_rank * stride +
                                   columns.from * lora.element_bytes(),
                               stride, lora.ranks[slot], columns.count * lora.element_bytes());
                }
            }
    }

    // The `index`-th of `count` cuts of what `shrink` will read.
    void stream_a(int64_t index, int64_t count, Stream& stream) const {
        for (int64_t run = 0; rows_ != nullptr && run < rows_->num_runs; ++run)
            for (int64_t part = 0; part < parts_.count; ++part) {
                const Lora& lora = parts_.parts[part];
                const int32_t slot = rows_->runs[run].slot;
                const int64_t stride = lora.a_stride() * lora.element_bytes();
                const int64_t lines = lora.ranks[slot] * stride / kLine;
                const int64_t from = lines * index / count, to = lines * (index + 1) / count;
                stream.add(lora.a + slot * lora.max_rank * stride + from * kLine, kLine, to - from,
                           kLine);
            }
    }

    // Add the products with B to a block of the base's sums.
    void add(const Block& block) const {
        if (rows_ == nullptr) return;
        for (int64_t i = 0; i < rows_->num_runs; ++i) {
            const LoraRun& run = rows_->runs[i];
            const int32_t* order = rows_->order;
            const int32_t* last = order + run.stop;
            const int32_t* first = std::lower_bound(order + run.start, last, block.row);
            last = std::lower_bound(first, last, block.row + block.rows);
            if (first == last) continue;
            for (int64_t part = 0; part < parts_.count; ++part)
                for (int half = 0; half < (block.second < 0 ? 1 : 2); ++half) {
                    if (parts_.parts[part].type == kBFloat16)
                        add_panel<bf16>(part, run.slot, first, last, block, half);
                    else
                        add_panel<float>(part, run.slot, first, last, block, half);
                }
        }
    }

    // Add the products with B to rows of y.
    void expand(int item, float* y, int64_t y_stride) const {
        const Item of = item_of(item, column_steps());
        if (parts_.parts[of.part].type == kBFloat16)
            expand_run<bf16>(of, y, y_stride);
        else
            expand_run<float>(of, y, y_stride);
    }

  private:
    // Some ranks or columns of a run's rows.
    struct Item {
        int64_t part, run, step;
    };

    int64_t rank_steps() const {
        return rows_ == nullptr ? 0 : ceil_div(parts_.parts[0].max_rank, kRanksAtOnce);
    }
    int64_t column_steps() const {
        int64_t most = 0;
        for (int64_t part = 0; rows_ != nullptr && part < parts_.count; ++part)
            most = std::max(most, ceil_div(parts_.parts[part].out_features, kLoraColumns));
        return most;
    }
    int items(int64_t steps) const {
        return steps ? int(parts_.count * rows_->num_runs * steps) : 0;
    }
    Item item_of(int item, int64_t steps) const {
        const int64_t at = item / steps;
        return {at / rows_->num_runs, at % rows_->num_runs, item % steps};
    }

    float* sums_of(int64_t part, int64_t row) const {
        return sums_ + (part * num_rows_ + row) * parts_.parts[part].max_rank;
    }

    // The rows of A of an item, which may be more than the adapter's rank.
    template <class Element>
    const Element* a_of(const Item& of) const {
        const Lora& lora = parts_.parts[of.part];
        const int64_t rank = rows_->runs[of.run].slot * lora.max_rank + of.step * kRanksAtOnce;
        return reinterpret_cast<const Element*>(lora.a) + rank * lora.a_stride();
    }

    template <class F>
    void with_types(int64_t part, bool rounded, F&& f) const {
        const bool halves = parts_.parts[part].type == kBFloat16;
        if (rounded)
            halves ? f(bf16{}, bf16{}) : f(bf16{}, float{});
        else
            halves ? f(float{}, bf16{}) : f(float{}, float{});
    }

    // The sums of an item's ranks for all rows of its run; `ahead`: the rows of A read next.
    template <class Input, class Element>
    void shrink_run(const Item& of, const Rows& x, const Element* ahead) const {
        const Lora& lora = parts_.parts[of.part];
        const LoraRun& run = rows_->runs[of.run];
        const int64_t stride = lora.a_stride(), rank = of.step * kRanksAtOnce;
        const int64_t count = std::min<int64_t>(lora.ranks[run.slot] - rank, kRanksAtOnce);
        const Element* a = a_of<Element>(of);
        for (int64_t at = run.start, rows; at < run.stop && count > 0; at += rows) {
            rows = std::min<int64_t>(run.stop - at, kLoraRows);
            const Input* inputs[kLoraRows];
            float* to[kLoraRows];
            for (int64_t m = 0; m < rows; ++m) {
                const int64_t row = rows_->order[at + m];
                inputs[m] = reinterpret_cast<const Input*>(x.data + row * x.stride);
                to[m] = sums_of(of.part, row) + rank;
            }
            with_rows(rows, [&](auto m) {
                constexpr int M = decltype(m)::value;
                constexpr int N = std::min<int>(kLoraSums / M, kRanksAtOnce);
                auto next = [&](int64_t r) { return r < count ? a + r * stride : ahead; };
                int64_t r = 0;
                for (; r + N <= count; r += N) {
                    arriero::shrink<M, N>(a + r * stride, stride, next(r + N), inputs,
                                          lora.in_features, to);
                    for (int64_t i = 0; i < M; ++i) to[i] += N;
                }
                for (; r < count; ++r) {
                    arriero::shrink<M, 1>(a + r * stride, stride, next(r + 1), inputs,
                                          lora.in_features, to);
                    for (int64_t i = 0; i < M; ++i) to[i] += 1;
                }
            });
        }
    }

    // The columns of a panel that a part's adapters change, from the part's first output on.
    struct Columns {
        int64_t from, skipped, count;  // skipped: columns of the panel before them
    };
    static Columns columns_of(const Lora& lora, int64_t panel) {
        const int64_t column = panel * kPanel, low = std::max(column, lora.first);
        const int64_t high = std::min(column + kPanel, lora.first + lora.out_features);
        return {low - lora.first, low - column, high - low};
    }

    // Add to one panel of a block, to its rows [first, last) of one slot. A panel may hold columns
    // of several stacked matrices.
    template <class Element>
    void add_panel(int64_t part, int32_t slot, const int32_t* first, const int32_t* last,
                   const Block& block, int half) const {
        const Lora& lora = parts_.parts[part];
        const Columns columns = columns_of(lora, half ? block.second : block.first);
        if (columns.count > 0)
            expand_slot<Element>(
                part, slot, first, last, columns.from, columns.count, [&](int64_t row) {
                    float* c = block.c + (row - block.row) * kBlockStride;
                    return c + half * kPanel + columns.skipped;
                });
    }

    // Add an item's columns of the products with B to y.
    template <class Element>
    void expand_run(const Item& of, float* y, int64_t y_stride) const {
        const Lora& lora = parts_.parts[of.part];
        const LoraRun& run = rows_->runs[of.run];
        const int64_t from = of.step * kLoraColumns;
        const int64_t count = std::min(lora.out_features - from, kLoraColumns);
        expand_slot<Element>(of.part, run.slot, rows_->order + run.start, rows_->order + run.stop,
                             from, count, [&](int64_t row) {
            return y + row * y_stride + lora.first + from;
        });
    }

    // Add `count` columns from `from` on of the products of rows [first, last) with a slot's B, to
    // where place(row) points.
    template <class Element, class Place>
    void expand_slot(int64_t part, int32_t slot, const int32_t* first, const int32_t* last,
                     int64_t from, int64_t count, Place&& place) const {
        const Lora& lora = parts_.parts[part];
        const int64_t stride = lora.b_stride(), rank = lora.ranks[slot];
        if (rank == 0) return;
        const Element* b = reinterpret_cast<const Element*>(lora.b) + slot * lora.max_rank * stride;
        while (first < last) {
            const int64_t rows = std::min<int64_t>(last - first, kLoraRows);
            const float* sums[kLoraRows];
            float* to[kLoraRows];
            for (int64_t m = 0; m < rows; ++m) {
                sums[m] = sums_of(part, first[m]);
                to[m] = place(first[m]);
            }
            with_rows(rows, [&](auto m) {
                expand_rows<decltype(m)::value>(b + from, stride, rank, sums, to, count);
            });
            first += rows;
        }
    }

    LoraParts parts_;
    const LoraRows* rows_;
    int64_t num_rows_;
    float* sums_;
};

// A product and its adapters as one phase: the sums with A are the first items, and a block of the
// product waits for them before it adds their products with B. `next`: the adapters of the product
// that comes after, whose A is fetched meanwhile.
template <class Finish>
void adapted_product(Worker& worker, const Matrix& m, const Rows& a, bool rounded, int64_t num_rows,
                     bool paired, const LoraCall& lora, const LoraCall& next, Finish&& finish) {
    const Product work(m, a, rounded, num_rows, paired, items_wanted(worker, num_rows));
    const int sums = lora.shrink_items();
    const int64_t blocks = ceil_div(m.panels(), 2);
    worker.share(sums + work.items(), [&](int item, int after) {
        if (item < sums) {
            lora.shrink(item, after < sums ? after : -1, a, rounded);
            return;
        }
        work.run(
            item - sums, after < 0 ? Ahead{} : work.head(after - sums),
            [&](const Block& block, Stream& stream) {
                lora.stream_b(block, stream);
                if (block.row == 0)
                    next.stream_a(paired ? block.first : block.first / 2, blocks, stream);
            },
            [&](const Block& block) {
                worker.await(sums);
                lora.add(block);
                finish(block);
            });
    });
}

}  // namespace arriero
