// The draw of a column by an exponential race: each has a time, and the least time wins.
//
// Knows weights, and the noise of tokens; knows nothing of filters and masks.
//
// Nearly all tokens lose without a logarithm. As -log(u) >= 1 - u, a token can win only if
// 1 - u <= best * weight, with `best` the least time so far. 1 - u is at least `miss` * 2^-31, where
// `miss` has the leading 31 bits of the inverted high word; and 2^-40 of `best` covers what the
// logarithm, the quotient and this product round.
#pragma once

#include "likelihood.h"

namespace arriero {

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

// The leading 31 bits of a token's inverted high word.
inline int32_t miss_of(uint32_t token, const RowKey& key) {
    return int32_t(~mix(token, key.word[0], key.word[1]) >> 1);
}

// The least time so far, and whose it is.
struct Leader {
    int64_t column;
    double time;

    // The largest `miss` of a token of weight 1 that can win.
    double limit() const { return time * (0x1p31 * (1.0 + 0x1p-40)); }

    void race(int64_t other, double its) {
        if (its > time || (its == time && other > column)) return;
        time = its;
        column = other;
    }
};

// The column with the least time among those with weights of at least `floor`; of equal times the
// lowest. `first`: a column with the greatest weight. `ids`: ids of the columns.
inline int64_t race(const int64_t* weights, int64_t columns, int64_t floor, int64_t first,
                    const int32_t* ids, const RowKey& key) {
    Leader leader{first, race_time(key, uint32_t(ids[first]), weights[first])};
    for (int64_t i = 0; i < columns; ++i) {
        if (weights[i] < floor) continue;
        const double miss = double(miss_of(uint32_t(ids[i]), key));
        if (miss > leader.limit() * double(weights[i])) continue;
        leader.race(i, race_time(key, uint32_t(ids[i]), weights[i]));
    }
    return leader.column;
}

// Temperatures up to here take `race_unweighed`: its logarithms stay within float32.
inline constexpr double kMostUnweighed = 0x1p100;

// As above with weights of at least 1, for all columns of a row; `ids` may be null, which says that
// the columns are the ids. Weighs only columns that may win by a bound in float32.
inline int64_t race_unweighed(const float* x, int64_t columns, const Likelihood& of, int64_t first,
                              const int32_t* ids, const RowKey& key) {
    constexpr int64_t kGroup = 64;
    constexpr double kLog2E = 0x1.71547652b82fep0;
    const auto id_of = [&](int64_t i) { return uint32_t(ids ? ids[i] : i); };
    const float top = float(of.greatest);
    const float scale = float(std::min(kLog2E / of.temperature, 0x1p120));
    Leader leader{first, race_time(key, id_of(first), kFullWeight)};
    // miss <= limit * weight in logarithms to base 2. A float's bits, as a whole number in units of
    // 2^-23, are 127 above its logarithm or a little less. 2^-9 covers what these steps round.
    const auto bound_of = [&] {
        return float(std::log2(leader.limit()) + kFractionBits + 127.0 + 0x1p-9);
    };
    const auto score = [&](float logit, int32_t miss) {
        const float bits = float(std::bit_cast<int32_t>(float(miss)));
        return bits * 0x1p-23f - (logit - top) * scale;
    };
    float bound = bound_of();
    float scores[kGroup];
    for (int64_t from = 0; from < columns; from += kGroup) {
        const int64_t size = std::min(kGroup, columns - from);
        int hits = 0;
        if (ids) {
            for (int64_t i = 0; i < size; ++i) {
                scores[i] = score(x[from + i], miss_of(uint32_t(ids[from + i]), key));
                hits += scores[i] <= bound ? 1 : 0;
            }
        } else {
            for (int64_t i = 0; i < size; ++i) {
                scores[i] = score(x[from + i], miss_of(uint32_t(from + i), key));
                hits += scores[i] <= bound ? 1 : 0;
            }
        }
        if (hits == 0) continue;
        for (int64_t i = from; i < from + size; ++i) {
            if (scores[i - from] > bound) continue;
            const int64_t weight = of.weight(x[i]);
            if (weight == 0 || double(miss_of(id_of(i), key)) > leader.limit() * double(weight))
                continue;
            leader.race(i, race_time(key, id_of(i), weight));
            bound = bound_of();
        }
    }
    return leader.column;
}

}  // namespace arriero
