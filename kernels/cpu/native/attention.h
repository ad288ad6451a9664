// Causal attention over the paged cache.
//
// Knows queries, keys and values; knows nothing of weights.
//
// Same tokens: keys are cut into splits at fixed positions. Within a split the greatest score is
// exact whatever the order, exponentials are summed lane by lane in rising order, and the weighted
// sum takes the keys in rising order; splits are merged in rising order. None of it depends on who
// computes a split, or on which other queries share a tile: a key that a query may not see has
// weight 0, and adding 0 changes nothing.
#pragma once

#include <limits>

#include "attention_plan.h"
#include "attention_tiles.h"
#include "exponentials.h"
#include "product.h"

namespace arriero {

inline constexpr float kNone = -std::numeric_limits<float>::infinity();

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
    // values and the scales that the weighted sum will want after this one's scores.
    template <bool kScales>
    void fetch(int group, int taken, int count, const Cache& kv) const {
        for (int g = group; g < group + taken; ++g) {
            for (int64_t i = 0; i < kv.value_bytes(); i += 64) prefetch(values[g] + i);
            if constexpr (kScales) {
                prefetch(reinterpret_cast<const char*>(key_scales[g]));
                prefetch(reinterpret_cast<const char*>(value_scales[g]));
            }
        }
        for (int g = group + taken; g < std::min(group + 2 * taken, count); ++g)
            for (int64_t i = 0; i < kv.key_bytes(); i += 64) prefetch(keys[g] + i);
    }
};

// Merge a split's row into the row of all splits before it.
inline void merge_row(float* sum, float& sum_greatest, float& sum_total, const float* part,
                      float greatest, float total, int padded) {
    if (greatest == kNone) return;  // the row sees none of it
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
    Visible visible;
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
class Attending {
  public:
    Attending(const AttentionCall& call, const Piece& piece, int head, AttentionScratch& scratch)
        : call_(call),
          kv_(call.kv),
          piece_(piece),
          scratch_(scratch),
          position_(call.batch.positions + piece.token),
          head_(head),
          per_kv_(call.heads.per_kv()),
          rows_(piece.tokens * per_kv_),
          tiles_(int(ceil_div(rows_, kMaxRows))),
          padded_(kv_.dim_vectors() * kLanes),
          q_width_(kv_.dim_pairs() * 2),
          width_(int64_t(split_blocks(kv_)) * kv_.groups() * kLanes) {
        scratch_.make_room(rows_, q_width_, width_, padded_);
    }

    void run() {
        load_queries();
        for (int i = 0; i < piece_.splits; ++i) {
            const bool first = i == 0;
            float* greatest = (first ? scratch_.sum_greatest : scratch_.greatest).data();
            float* total = (first ? scratch_.sum_total : scratch_.total).data();
            float* part = (first ? scratch_.sum : scratch_.part).data();
            find_groups(piece_.split_at(i));
            score();
            for (int r = 0; r < rows_; ++r) weigh(r, greatest[r], total[r]);
            sum_values(part);
            for (int r = 0; r < rows_ && !first; ++r)
                merge_row(sum_of(r), scratch_.sum_greatest[r], scratch_.sum_total[r],
                          part + int64_t(r) * padded_, greatest[r], total[r], padded_);
        }
        for (int r = 0; r < rows_; ++r) hand_over(r);
    }

  private:
    float* sum_of(int row) { return scratch_.sum.data() + int64_t(row) * padded_; }

    // f(first row, rows) for each register tile.
    template <class F>
    void each_tile(F&& f) {
        for (int tile = 0, row = 0; tile < tiles_; ++tile) {
            const int n = (rows_ - row) / (tiles_ - tile);
            f(row, n);
            row += n;
        }
    }

    // Rows are (token, query head of the group), scaled so that scores are powers of 2, not of e.
    void load_queries() {
        const F16 scale = set1(call_.scale * 1.44269504088896341f);
        const int dim = call_.heads.dim;
        for (int r = 0; r < rows_; ++r) {
            const float* from = call_.q + (piece_.token + r / per_kv_) * call_.q_stride +
                                (head_ * per_kv_ + r % per_kv_) * int64_t(dim);
            const Rows to{reinterpret_cast<char*>(scratch_.q.data() + int64_t(r) * q_width_), 0};
            for (int i = 0; i < dim; i += kLanes) {
                const int n = std::min(kLanes, dim - i);
                store_output(to, kRounded, 0, i, mul(load_n(from + i, n), scale), n);
            }
        }
    }

    // The groups of 16 slots that this split holds: of sinks, and from the first key that a query
    // sees to the last. Other blocks may be freed: not even their table entries are looked at.
    void find_groups(int split) {
        const int32_t* table =
            call_.batch.block_table + piece_.sequence * call_.batch.table_stride;
        const int last = position_[piece_.tokens - 1];
        const int earliest = call_.visible.first(position_[0]), sinks = call_.visible.sinks;
        const int per_split = split_blocks(kv_);
        count_ = 0;
        for (int b = split * per_split; b < (split + 1) * per_split; ++b) {
            if (b * kv_.block_size > last) break;
            if ((b + 1) * kv_.block_size <= earliest && b * kv_.block_size >= sinks) continue;
            char* block = kv_.head(call_.layer, table[b], head_);
            for (int g = 0; g < kv_.groups(); ++g) {
                const int base = b * kv_.block_size + g * kLanes;
                if (base > last) break;
                if (base + kLanes <= earliest && base >= sinks) continue;
                if constexpr (type == kInt8) {
                    scratch_.key_scales[count_] = kv_.scales(block, g, 0);
                    scratch_.value_scales[count_] = kv_.scales(block, g, 1);
                }
                scratch_.keys[count_] = kv_.keys(block, g);
                scratch_.values[count_] = kv_.values(block, g);
                scratch_.bases[count_] = base;
                scratch_.counts[count_++] =
                    std::min({kLanes, kv_.block_size - g * kLanes, last + 1 - base});
            }
        }
    }

    void score() {
        Tile t{};
        t.a_stride = int64_t(q_width_) * 4;
        t.pairs = kv_.dim_pairs();
        t.c_stride = width_;
        for (int g = 0, taken; g < count_; g += taken) {
            taken = tile_vectors(rows_, count_ - g);
            for (int i = 0; i < taken; ++i) t.w[i] = scratch_.keys[g + i];
            if (piece_.tokens == 1) scratch_.fetch<type == kInt8>(g, taken, count_, kv_);
            each_tile([&](int row, int n) {
                t.a = reinterpret_cast<const char*>(scratch_.q.data() + int64_t(row) * q_width_);
                t.c = scratch_.scores.data() + row * width_ + int64_t(g) * kLanes;
                score_kernel<type, kRounded>(n, taken)(t);
            });
        }
    }

    // A row's scores become weights relative to its greatest one.
    void weigh(int row, float& greatest, float& total) {
        float* s = scratch_.scores.data() + row * width_;
        const int limit = position_[row / per_kv_];
        const int start = call_.visible.first(limit), sinks = call_.visible.sinks;
        F16 top = set1(kNone);
        for (int g = 0; g < count_; ++g) {
            F16 x = load(s + g * kLanes);
            const int base = scratch_.bases[g];
            const int n = std::clamp(limit + 1 - base, 0, scratch_.counts[g]);
            if constexpr (type == kInt8) x = mul(x, load(scratch_.key_scales[g]));
            if (n < kLanes) x = keep(x, n, set1(kNone));
            if (start > base) {
                const F16 hidden = keep(set1(kNone), std::min(start - base, kLanes), x);
                x = sinks > base ? keep(x, std::min(sinks - base, kLanes), hidden) : hidden;
            }
            if (type == kInt8 || n < kLanes || start > base) store(s + g * kLanes, x);
            top = max(x, top);
        }
        greatest = reduce_max(top);
        const F16 shift = set1(greatest == kNone ? 0.0f : greatest);
        F16 sum = zero();
        for (int g = 0; g < count_; ++g) {
            F16 x = exp2(sub(load(s + g * kLanes), shift));
            sum = add(sum, x);
            // Lanes past the group's slots may become NaN here; the weighted sum skips them.
            if constexpr (type == kInt8) x = mul(x, load(scratch_.value_scales[g]));
            if constexpr (kRounded)
                store_bf16(scratch_.weights.data() + row * width_ + g * kLanes, x);
            else
                store(s + g * kLanes, x);
        }
        total = reduce_add(sum);
    }

    void sum_values(float* part) {
        const char* weights = kRounded ? reinterpret_cast<const char*>(scratch_.weights.data())
                                       : reinterpret_cast<const char*>(scratch_.scores.data());
        ValueTile t{};
        t.p_stride = width_ * (kRounded ? 2 : 4);
        t.groups = scratch_.values.data();
        t.counts = scratch_.counts.data();
        t.num_groups = count_;
        t.vector_stride = kv_.value_vector();
        t.out_stride = padded_;
        for (int d = 0, taken; d < kv_.dim_vectors(); d += taken) {
            taken = tile_vectors(rows_, kv_.dim_vectors() - d);
            each_tile([&](int row, int n) {
                t.p = weights + row * t.p_stride;
                t.out = part + int64_t(row) * padded_ + d * kLanes;
                value_kernel_for<type, kRounded>(n, taken)(t);
            });
            for (int g = 0; g < count_; ++g) scratch_.values[g] += taken * kv_.value_vector();
        }
    }

    void hand_over(int row) {
        const int h = head_ * per_kv_ + row % per_kv_, dim = call_.heads.dim;
        if (piece_.partial >= 0) {
            float* to = call_.partial(piece_.partial, h);
            to[0] = scratch_.sum_greatest[row];
            to[1] = scratch_.sum_total[row];
            std::memcpy(to + 2, sum_of(row), size_t(padded_) * 4);
        } else {
            store_row(call_.out, call_.rounded, piece_.token + row / per_kv_, int64_t(h) * dim,
                      sum_of(row), scratch_.sum_total[row], dim);
        }
    }

    const AttentionCall& call_;
    const Cache& kv_;
    const Piece& piece_;
    AttentionScratch& scratch_;
    const int32_t* position_;
    const int head_, per_kv_, rows_, tiles_, padded_, q_width_;
    const int64_t width_;
    int count_ = 0;
};

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
        const int head = item % heads;
        switch (call.kv.type) {
            case kFloat32: Attending<kFloat32, false>(call, piece, head, scratch).run(); break;
            case kFloat16: Attending<kFloat16, false>(call, piece, head, scratch).run(); break;
            case kInt8: Attending<kInt8, false>(call, piece, head, scratch).run(); break;
            case kFp8: Attending<kFp8, false>(call, piece, head, scratch).run(); break;
            default:
#if defined(ARRIERO_BF16)
                if (!call.exact) {
                    Attending<kBFloat16, true>(call, piece, head, scratch).run();
                    break;
                }
#endif
                Attending<kBFloat16, false>(call, piece, head, scratch).run();
        }
    });
    if (plan.merges.empty()) return;
    worker.share(int(plan.merges.size()) * call.heads.q, [&](int item, int) {
        merge_splits(call, plan.merges[item / call.heads.q], item % call.heads.q);
    });
}

}  // namespace arriero
