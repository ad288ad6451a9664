// What the C interface refuses, and how it says so.
//
// Knows indices and their bounds; knows nothing of what is computed.
#pragma once

#include <algorithm>
#include <exception>
#include <string>

#include "attention_plan.h"
#include "lora.h"

namespace arriero {

inline thread_local std::string failure;

struct Refused {
    std::string why;
};

// Run f; 0, or 1 with the message in `failure`.
template <class F>
int guarded(F&& f) {
    try {
        f();
        return 0;
    } catch (const Refused& refused) {
        failure = refused.why;
    } catch (const std::exception& e) {
        failure = e.what();
    }
    return 1;
}

inline void refuse(const char* field, int64_t index, int64_t value, int64_t low, int64_t high) {
    throw Refused{std::string(field) + "[" + std::to_string(index) + "]=" + std::to_string(value) +
                  " is outside " + std::to_string(low) + " .. " + std::to_string(high)};
}

inline void within(const char* field, int64_t index, int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high) refuse(field, index, value, low, high);
}

// Every index that the kernels will follow.
inline void check(const Batch& batch, const Cache& kv, const Visible& visible) {
    const int64_t slots = int64_t(kv.num_blocks) * kv.block_size;
    within("query_start", 0, batch.query_start[0], 0, 0);
    for (int64_t s = 0; s < batch.sequences; ++s) {
        const int64_t first = batch.query_start[s], last = batch.query_start[s + 1];
        within("query_start", s + 1, last, first, batch.tokens);
        const int64_t count = last - first, context = batch.context[s];
        within("context", s, context, count, batch.table_blocks * kv.block_size);
        for (int64_t t = first; t < last; ++t)
            within("positions", t, batch.positions[t], context - count + (t - first),
                   context - count + (t - first));
        const int64_t seen = visible.first(int(context - count)) / kv.block_size;
        for (int64_t b = 0; b < ceil_div(context, kv.block_size) && count > 0; ++b) {
            if (b * kv.block_size >= visible.sinks) b = std::max(b, seen);
            within("block_table", s * batch.table_stride + b,
                   batch.block_table[s * batch.table_stride + b], 0, kv.num_blocks - 1);
        }
    }
    within("query_start", batch.sequences, batch.query_start[batch.sequences], batch.tokens,
           batch.tokens);
    for (int64_t t = 0; t < batch.tokens; ++t) within("slots", t, batch.slots[t], 0, slots - 1);
}

// Every slot, rank and column of a product's adapters.
inline void check(const LoraParts& parts, const LoraRows& rows, int64_t num_rows, int64_t outs) {
    for (int64_t part = 0; part < parts.count; ++part) {
        const Lora& lora = parts.parts[part];
        within("max_rank", part, lora.max_rank, parts.parts[0].max_rank, parts.parts[0].max_rank);
        within("first", part, lora.first, 0, outs - lora.out_features);
        for (int64_t slot = 0; slot < lora.slots; ++slot)
            within("ranks", slot, lora.ranks[slot], 0, lora.max_rank);
        for (int64_t run = 0; run < rows.num_runs; ++run)
            within("slot", run, rows.runs[run].slot, 0, lora.slots - 1);
    }
    for (int64_t run = 0; run < rows.num_runs; ++run) {
        within("start", run, rows.runs[run].start, 0, rows.num_ordered);
        within("stop", run, rows.runs[run].stop, rows.runs[run].start, rows.num_ordered);
    }
    for (int64_t at = 0; at < rows.num_ordered; ++at)
        within("order", at, rows.order[at], 0, num_rows - 1);
    for (int64_t run = 0; run < rows.num_runs; ++run)
        for (int64_t at = rows.runs[run].start + 1; at < rows.runs[run].stop; ++at)
            within("order", at, rows.order[at], rows.order[at - 1] + 1, num_rows - 1);
}

}  // namespace arriero
