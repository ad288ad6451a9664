// A row of logits to a token; `Ops.sample` and kernels/reference/sampling.py say what is meant.
//
// Knows numbers of one row and its mask; knows nothing of biases and penalties, which are in the
// logits by then.
//
// Likelihoods relative to the row's greatest are whole numbers of 44 binary digits, so that sums
// have no order. Each filter keeps the weights from some floor up: the greatest floor that still
// leaves enough, in number (top-k) or in sum (top-p). It is found by bisection, over fewer and
// fewer weights.
#pragma once

#include <algorithm>
#include <bit>
#include <limits>

#include "simd.h"

namespace arriero {

inline constexpr int kFractionBits = 44;
inline constexpr int64_t kFullWeight = int64_t(1) << kFractionBits;

// The lowest index of the greatest element; -1 where that is not finite, or any is NaN.
inline int64_t best_of(const float* x, int64_t columns) {
    constexpr float kLowest = -std::numeric_limits<float>::infinity();
    constexpr int64_t kSpan = 1024;  // find the span first, then the element in it
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
        if (span > best) {
            best = span;
            for (at = from; x[at] != span; ++at) {
            }
        }
    }
    return std::isfinite(best) ? at : -1;
}

// floor(exp((x - greatest) / temperature) * 2**44). Plain loops that compilers turn into vectors;
// products and sums are not fused, so that every variant gives the same weights.
inline void weigh_row(const float* x, int64_t columns, float greatest, double temperature,
                      int64_t* weights) {
    constexpr double kMagic = 0x1.8p52;  // a sum with it has no fraction left, and n in its low bits
    constexpr double kLn2High = 0x1.62e42fefp-1, kLn2Low = 0x1.473de6af278edp-34;
    const double top = greatest;
    for (int64_t i = 0; i < columns; ++i) {
        double z = (double(x[i]) - top) / temperature;
        z = z > -31.0 ? z : -31.0;  // from here down the weight is 0
        const double shifted = z * 0x1.71547652b82fep0 + kMagic;
        const double n = shifted - kMagic;
        const double r = (z - n * kLn2High) - n * kLn2Low;
        double p = 1.0 / 6227020800.0;  // Taylor's, to a remainder of 4e-18
        p = p * r + 1.0 / 479001600.0;
        p = p * r + 1.0 / 39916800.0;
        p = p * r + 1.0 / 3628800.0;
        p = p * r + 1.0 / 362880.0;
        p = p * r + 1.0 / 40320.0;
        p = p * r + 1.0 / 5040.0;
        p = p * r + 1.0 / 720.0;
        p = p * r + 1.0 / 120.0;
        p = p * r + 1.0 / 24.0;
        p = p * r + 1.0 / 6.0;
        p = p * r + 0.5;
        p = p * r + 1.0;
        p = p * r + 1.0;
        const uint64_t power =
            (std::bit_cast<uint64_t>(shifted) + uint64_t(1023 + kFractionBits)) << 52;
        weights[i] = int64_t(p * std::bit_cast<double>(power));
    }
}

// Number and sum of the weights from a floor up.
struct Held {
    int64_t count = 0, sum = 0;
};

inline Held held_from(const int64_t* weights, int64_t size, int64_t floor) {
    int64_t count = 0, sum = 0;
    for (int64_t i = 0; i < size; ++i) {
        count += weights[i] >= floor ? 1 : 0;
        sum += weights[i] >= floor ? weights[i] : 0;
    }
    return {count, sum};
}

// Those of [low, high) to the front of `kept`, which may be `weights`; returns how many.
inline int64_t keep_between(const int64_t* weights, int64_t size, int64_t low, int64_t high,
                            int64_t* kept) {
    int64_t count = 0;
    for (int64_t i = 0; i < size; ++i) {
        const int64_t weight = weights[i];
        kept[count] = weight;
        count += weight >= low && weight < high ? 1 : 0;
    }
    return count;
}

// The greatest floor, from `low` up, whose weights are enough; `low` where none are.
// `enough(held)` stays true as floors fall. `room`: for `size` weights.
template <class Enough>
inline int64_t greatest_floor(const int64_t* weights, int64_t size, int64_t low, int64_t* room,
                              Enough&& enough) {
    int64_t high = kFullWeight + 1;
    Held from_low{size, 0}, from_high{}, apart{};  // apart: of weights no longer looked at
    while (high - low > 1) {
        // Halve the number of digits while the range spans several, then the range.
        const int digits = int(std::bit_width(uint64_t(high))) - int(std::bit_width(uint64_t(low)));
        const int64_t middle = digits > 1 ? low << digits / 2 : low + (high - low) / 2;
        Held found = held_from(weights, size, middle);
        found.count += apart.count;
        found.sum += apart.sum;
        if (enough(found)) {
            low = middle;
            from_low = found;
        } else {
            high = middle;
            from_high = found;
        }
        if (from_low.count - from_high.count < size / 8) {
            size = keep_between(weights, size, low, high, room);
            weights = room;
            apart = from_high;
        }
    }
    return low;
}

// The logarithm of the sum of a row's exponentials, from its weights at temperature 1; NaN where
// the greatest is not finite. `room`: for as many weights as the row has columns.
inline double log_total(const float* x, int64_t columns, int64_t* room) {
    const int64_t best = best_of(x, columns);
    if (best < 0) return std::numeric_limits<double>::quiet_NaN();
    weigh_row(x, columns, x[best], 1.0, room);
    const double sum = double(held_from(room, columns, 1).sum) / double(kFullWeight);
    return double(x[best]) + std::log(sum);
}

// Philox-4x32-10 (Salmon 2011) keyed by the seed, with the position as counter: a row's key.
struct RowKey {
    uint32_t word[4];
};

inline RowKey row_key(uint64_t seed, uint64_t position) {
    uint32_t c[4] = {uint32_t(position), uint32_t(position >> 32), 0, 0};
    uint32_t k[2] = {uint32_t(seed), uint32_t(seed >> 32)};
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t(c[0]) * 0xD2511F53u, p1 = uint64_t(c[2]) * 0xCD9E8D57u;
        const uint32_t next[4] = {uint32_t(p1 >> 32) ^ c[1] ^ k[0], uint32_t(p1),
                                  uint32_t(p0 >> 32) ^ c[3] ^ k[1], uint32_t(p0)};
        std::copy(next, next + 4, c);
        k[0] += 0x9E3779B9u;
        k[1] += 0xBB67AE85u;
    }
    return {{c[0], c[1], c[2], c[3]}};
}

// A token's word, by two words of the row's key; kernels/token_noise.py says why these steps.
inline uint32_t mix(uint32_t token, uint32_t first, uint32_t second) {
    uint32_t x = token ^ first;
    x = (x ^ x >> 17) * 0xED5AD4BBu;
    x = ((x ^ x >> 11) + second) * 0xAC4C1B51u;
    x = (x ^ x >> 15) * 0x31848BABu;
    return x ^ x >> 14;
}

// A token's time in the race: -log(u) / weight, u an odd multiple of 2^-53.
inline double race_time(const RowKey& key, uint32_t token, int64_t weight) {
    const uint64_t high = mix(token, key.word[0], key.word[1]);
    const uint32_t low = mix(token, key.word[2], key.word[3]);
    return -std::log(double(high << 21 | low >> 11 | 1) * 0x1p-53) / double(weight);
}

// The column with the least time among those with weights of at least `floor`; of equal times the
// lowest. `first`: a column with the greatest weight. `ids`: ids of the columns, or null.
//
// Nearly all tokens lose without a logarithm. As -log(u) >= 1 - u, a token can win only if
// 1 - u <= best * weight, with `best` the least time so far. 1 - u is at least `miss` * 2^-31, where
// `miss` has the leading 31 bits of the inverted high word; and 2^-40 of `best` covers what the
// logarithm, the quotient and this product round.
inline int64_t race(const int64_t* weights, int64_t columns, int64_t floor, int64_t first,
                    const int32_t* ids, const RowKey& key) {
    constexpr int64_t kSpan = 512;
    constexpr double kMagic = 0x1p52;  // or a whole number below it into its low bits: the sum
    const auto id_of = [&](int64_t i) { return uint32_t(ids ? ids[i] : i); };
    int64_t winner = first;
    double best = race_time(key, id_of(first), weights[first]);
    int32_t miss[kSpan];
    for (int64_t from = 0; from < columns; from += kSpan) {
        const int64_t size = std::min(kSpan, columns - from);
        const uint32_t k0 = key.word[0], k1 = key.word[1];
        if (ids)
            for (int64_t i = 0; i < size; ++i)
                miss[i] = int32_t(~mix(uint32_t(ids[from + i]), k0, k1) >> 1);
        else
            for (int64_t i = 0; i < size; ++i)
                miss[i] = int32_t(~mix(uint32_t(from + i), k0, k1) >> 1);
        const auto limit = [&] { return best * (0x1p31 * (1.0 + 0x1p-40)); };
        const auto can_win = [&](int64_t i, double bound) {
            const int64_t weight = weights[from + i];
            const uint64_t bits = uint64_t(weight) | std::bit_cast<uint64_t>(kMagic);
            const double scaled = bound * (std::bit_cast<double>(bits) - kMagic);
            return (double(miss[i]) <= scaled) & (weight >= floor);
        };
        const double bound = limit();
        int64_t count = 0;
        for (int64_t i = 0; i < size; ++i) count += can_win(i, bound) ? 1 : 0;
        if (count == 0) continue;
        for (int64_t i = 0; i < size; ++i) {
            if (!can_win(i, limit())) continue;
            const double time = race_time(key, id_of(from + i), weights[from + i]);
            if (time < best || (time == best && from + i < winner)) {
                best = time;
                winner = from + i;
            }
        }
    }
    return winner;
}

// The allowed columns of a row to the front of `kept`, with their logits; returns how many. A bit of
// `allowed` for each column, the lowest bit of a word first.
inline int64_t keep_allowed(const float* x, int64_t columns, const uint32_t* allowed, float* kept_x,
                            int32_t* kept) {
    int64_t count = 0;
    for (int64_t from = 0; from < columns; from += 32) {
        const int64_t size = std::min<int64_t>(32, columns - from);
        uint32_t word = allowed[from / 32] & (~uint32_t(0) >> (32 - size));
        if (word == ~uint32_t(0)) {
            for (int64_t i = 0; i < 32; ++i) {
                kept_x[count + i] = x[from + i];
                kept[count + i] = int32_t(from + i);
            }
            count += 32;
            continue;
        }
        for (; word != 0; word &= word - 1) {
            const int64_t column = from + std::countr_zero(word);
            kept_x[count] = x[column];
            kept[count++] = int32_t(column);
        }
    }
    return count;
}

// Parameters of the rows, each an array. The C struct that Python fills.
struct Draws {
    const float* temperature;  // 0: greedy
    const int32_t* top_k;      // 0: off
    const float* top_p;        // 1: off
    const float* min_p;        // 0: off
    const int64_t* seed;
    const int64_t* position;
    const int32_t* token_ids;  // for each column; null: the columns are the ids
    const uint32_t* allowed;   // the rows' masks, a bit for each column; null: all are allowed
    int64_t allowed_stride;    // words
};

// The number of weights that `draw` needs room for.
inline int64_t draw_room(int64_t columns, const Draws& draws) {
    return (draws.allowed ? 4 : 2) * columns;
}

// One row's column of those given. `ids`: ids of the columns, or null. `room`: for twice as many
// weights as there are columns.
inline int32_t draw_of(const float* x, int64_t columns, const int32_t* ids, const Draws& draws,
                       int64_t row, int64_t* room) {
    const int64_t best = best_of(x, columns);
    if (best < 0 || draws.temperature[row] == 0.0f) return int32_t(best);
    int64_t *weights = room, *spare = room + columns;
    weigh_row(x, columns, x[best], draws.temperature[row], weights);
    int64_t floor = int64_t(std::ceil(double(draws.min_p[row]) * double(kFullWeight)));
    floor = std::max<int64_t>(floor, 1);
    if (draws.top_k[row] > 0)
        floor = greatest_floor(weights, columns, floor, spare,
                               [&](Held held) { return held.count >= draws.top_k[row]; });
    if (draws.top_p[row] < 1.0f) {
        const double total = double(held_from(weights, columns, floor).sum);
        const double target = double(draws.top_p[row]) * total;
        floor = greatest_floor(weights, columns, floor, spare,
                               [&](Held held) { return double(held.sum) >= target; });
    }
    const RowKey key = row_key(uint64_t(draws.seed[row]), uint64_t(draws.position[row]));
    return int32_t(race(weights, columns, floor, best, ids, key));
}

// One row's column. Only allowed columns are weighed, so that a mask saves time.
// `room`: for `draw_room` weights.
inline int32_t draw(const float* x, int64_t columns, const Draws& draws, int64_t row,
                    int64_t* room) {
    if (!draws.allowed) return draw_of(x, columns, draws.token_ids, draws, row, room);
    float* kept_x = reinterpret_cast<float*>(room + 2 * columns);
    int32_t* kept = reinterpret_cast<int32_t*>(kept_x + columns);
    const uint32_t* allowed = draws.allowed + row * draws.allowed_stride;
    const int64_t count = keep_allowed(x, columns, allowed, kept_x, kept);
    const int32_t* ids = kept;
    if (draws.token_ids) {
        int32_t* kept_ids = kept + columns;
        for (int64_t i = 0; i < count; ++i) kept_ids[i] = draws.token_ids[kept[i]];
        ids = kept_ids;
    }
    const int32_t at = draw_of(kept_x, count, ids, draws, row, room);
    return at < 0 ? at : kept[at];
}

}  // namespace arriero
