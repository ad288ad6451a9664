// Who computes which part of a batch's attention.
//
// Knows positions and splits; knows nothing of what a key is.
#pragma once

#include <algorithm>
#include <vector>

#include "cache.h"

namespace arriero {

inline constexpr int kSplitKeys = 512;

// Some queries of one sequence against some of its splits, for each key/value head.
struct Piece {
    int32_t sequence;
    int32_t token;      // first, in the flat batch
    int32_t tokens;
    int32_t split, splits;  // first split, how many
    int32_t leading;        // so many of these are 0, 1, ... instead: those of the first keys
    int32_t partial;    // where partial results go, or -1: this piece holds all of its splits

    int split_at(int i) const { return i < leading ? i : split + i - leading; }
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

inline AttentionPlan plan_attention(const Batch& batch, const Cache& kv, int per_kv,
                                    const Visible& visible, int num_threads) {
    AttentionPlan plan;
    const int split_keys = split_blocks(kv) * kv.block_size;
    // Few sequences and long contexts: give the splits of one query to several threads.
    const bool apart = num_threads > 1 && batch.sequences * kv.num_heads < 4 * num_threads;
    const int tile = tile_tokens(per_kv);
    for (int64_t s = 0; s < batch.sequences; ++s) {
        const int first = batch.query_start[s], last = batch.query_start[s + 1];
        for (int t = first; t < last; t += tile) {
            const int n = std::min(tile, last - t);
            const int start = visible.first(batch.positions[t]) / split_keys;
            const int leading = std::min(start, int(ceil_div(visible.sinks, split_keys)));
            const int splits = batch.positions[t + n - 1] / split_keys + 1 - start + leading;
            const Piece whole{int32_t(s), t, n, start, splits, leading, -1};
            if (apart && n == 1 && splits > 1) {
                plan.merges.push_back(whole);
                plan.merges.back().partial = int32_t(plan.partials);
                for (int i = 0; i < splits; ++i)
                    plan.pieces.push_back({int32_t(s), t, 1, whole.split_at(i), 1, 0,
                                           int32_t(plan.partials++)});
            } else {
                plan.pieces.push_back(whole);
            }
        }
    }
    // The longest first, so that the last to finish is short.
    std::stable_sort(plan.pieces.begin(), plan.pieces.end(), [](const Piece& a, const Piece& b) {
        return int64_t(a.tokens) * a.splits > int64_t(b.tokens) * b.splits;
    });
    return plan;
}

}  // namespace arriero
