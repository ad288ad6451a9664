// The greatest numbers of a row of logits, and where they are.
//
// Knows one row of floats; knows nothing of likelihoods. A row is read once from end to end; what
// that leaves says which spans a later search can pass over.
#pragma once

#include <algorithm>
#include <bit>
#include <functional>
#include <limits>

#include "simd.h"

namespace arriero {

inline constexpr int64_t kSpan = 1024;
inline constexpr float kLowest = -std::numeric_limits<float>::infinity();

inline int64_t spans_of(int64_t columns) { return (columns + kSpan - 1) / kSpan; }

// The greatest number of each span of columns; and of each of the span's sixteen lanes, whose
// columns are sixteen apart.
struct Peaks {
    float* span;  // [spans]
    float* lane;  // [spans][kLanes]
    float* room;  // as `lane`

    // Floats of all three, for a row of so many columns.
    static int64_t size(int64_t columns) { return spans_of(columns) * (1 + 2 * kLanes); }
    static Peaks in(float* memory, int64_t columns) {
        const int64_t spans = spans_of(columns);
        return {memory, memory + spans, memory + spans * (1 + kLanes)};
    }

    // A number that at least `count` columns reach, if as many lanes do; else the lowest.
    float reached_by(int64_t count, int64_t columns) const {
        const int64_t lanes = spans_of(columns) * kLanes;
        if (count > lanes) return kLowest;
        std::copy(lane, lane + lanes, room);
        std::nth_element(room, room + count - 1, room + lanes, std::greater<float>());
        return room[count - 1];
    }
};

// The lowest index of the greatest element; -1 where that is not finite, or any is NaN. `peaks`:
// filled unless null or the result is -1.
inline int64_t best_of(const float* x, int64_t columns, const Peaks* peaks) {
    float best = kLowest;
    int64_t at = -1;
    for (int64_t from = 0; from < columns; from += kSpan) {
        const int64_t to = std::min(from + kSpan, columns);
        F16 top = set1(kLowest), sum = zero();
        for (int64_t i = from; i < to; i += kLanes) {
            const int n = int(std::min<int64_t>(kLanes, to - i));
            F16 v = n == kLanes ? load(x + i) : keep(load_n(x + i, n), n, top);
            top = max(v, top);
            sum = add(sum, sub(v, v));  // NaN for NaN and for infinities
        }
        if (reduce_add(sum) != 0.0f || std::isnan(reduce_add(sum)))
            for (int64_t i = from; i < to; ++i)
                if (std::isnan(x[i])) return -1;
        const float span = reduce_max(top);
        if (peaks != nullptr) {
            peaks->span[from / kSpan] = span;
            store(peaks->lane + from / kSpan * kLanes, top);
        }
        if (span > best) {
            best = span;
            for (at = from; x[at] != span; ++at) {
            }
        }
    }
    return std::isfinite(best) ? at : -1;
}

// f(column) for each column of at least `least`, rising.
template <class F>
inline void each_from(const float* x, int64_t columns, const Peaks& peaks, float least, F&& f) {
    const F16 bound = set1(least);
    for (int64_t from = 0; from < columns; from += kSpan) {
        if (peaks.span[from / kSpan] < least) continue;
        const int64_t to = std::min(from + kSpan, columns);
        for (int64_t i = from; i < to; i += kLanes) {
            const int n = int(std::min<int64_t>(kLanes, to - i));
            uint32_t bits = at_least(load_n(x + i, n), bound) & ((uint32_t(1) << n) - 1);
            for (; bits != 0; bits &= bits - 1) f(i + std::countr_zero(bits));
        }
    }
}

// A number's order as a whole number; of equal numbers the lower column comes first.
inline int64_t rank_key(float x, int64_t column, int64_t columns) {
    const int32_t bits = std::bit_cast<int32_t>(x + 0.0f);  // -0.0 + 0.0 is +0.0: a single zero
    const int64_t ordered = bits ^ ((bits >> 31) & 0x7fffffff);
    return int64_t(uint64_t(ordered) << 32) | (columns - 1 - column);
}

// The `count` columns with the greatest numbers, by falling number, then by rising column. `best`:
// the result of `best_of`, whose peaks these are. `room`: for a whole number a column.
inline void top_columns(const float* x, int64_t columns, int64_t count, int64_t best,
                        const Peaks& peaks, int64_t* room, int32_t* top) {
    int64_t size = 0;
    const auto take = [&](int64_t column) { room[size++] = rank_key(x[column], column, columns); };
    if (best < 0)
        for (int64_t i = 0; i < columns; ++i) take(i);
    else
        each_from(x, columns, peaks, peaks.reached_by(count, columns), take);
    std::partial_sort(room, room + count, room + size, std::greater<int64_t>());
    for (int64_t i = 0; i < count; ++i)
        top[i] = int32_t(columns - 1 - (room[i] & 0xffffffff));
}

}  // namespace arriero
