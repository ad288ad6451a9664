// Likelihoods of a row's columns as whole numbers, and the filters that keep the greatest of them.
//
// Knows numbers of one row; knows nothing of noise and masks.
//
// Likelihoods relative to the row's greatest have 44 binary digits, so that sums have no order.
// Each filter keeps the weights from some floor up: the greatest floor that still leaves enough, in
// number (top-k) or in sum (top-p). It is found by bisection, over fewer and fewer weights.
#pragma once

#include "peaks.h"

namespace arriero {

inline constexpr int kFractionBits = 44;
inline constexpr int64_t kFullWeight = int64_t(1) << kFractionBits;

// A row's likelihoods, from its greatest logit and its temperature.
struct Likelihood {
    double greatest, temperature;

    // floor(exp((x - greatest) / temperature) * 2**44). Loops over it become vectors; products and
    // sums are not fused, so that every variant gives the same weights.
    __attribute__((always_inline)) int64_t weight(float x) const {
        constexpr double kMagic = 0x1.8p52;  // a sum with it is whole, with n in its low bits
        constexpr double kWhole = 0x1p52;    // likewise, of a number that is not negative
        constexpr int64_t kSign = std::numeric_limits<int64_t>::min();
        constexpr double kLn2High = 0x1.62e42fefp-1, kLn2Low = 0x1.473de6af278edp-34;
        // From -31 down the weight is 0. Negative doubles have the order of their bits' magnitudes:
        // GCC makes vectors of comparisons of whole numbers, and of no others.
        const double quotient = (double(x) - greatest) / temperature;
        const int64_t negative = std::bit_cast<int64_t>(quotient) | kSign;
        const double z = std::bit_cast<double>(std::min(negative, std::bit_cast<int64_t>(-31.0)));
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
        const double exact = p * std::bit_cast<double>(power);
        // To the nearest whole number, then down: AVX2 converts no double to 64 bits.
        const double near = exact + kWhole, left = exact - (near - kWhole);
        const int64_t nearest = std::bit_cast<int64_t>(near) - std::bit_cast<int64_t>(kWhole);
        return nearest - int64_t(std::bit_cast<uint64_t>(left) >> 63);
    }

    // Logits below this have weights below `floor`, which is at least 1.
    float least_logit(int64_t floor) const {
        // 2^-10 covers what logarithm, quotient and weight round.
        const double exponent = std::log(double(floor) * 0x1p-44) - 0x1p-10;
        return std::nextafter(float(greatest + exponent * temperature), kLowest);
    }
};

inline void weigh_row(const float* x, int64_t columns, const Likelihood& of, int64_t* weights) {
    const Likelihood own = of;  // a copy that no store to `weights` can change
    for (int64_t i = 0; i < columns; ++i) weights[i] = own.weight(x[i]);
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

// The sum of a row's weights from `floor` up, which is at least 1.
inline int64_t total_from(const float* x, int64_t columns, const Peaks& peaks, const Likelihood& of,
                          int64_t floor) {
    const float least = of.least_logit(floor);
    int64_t weights[kSpan];
    int64_t total = 0;
    for (int64_t from = 0; from < columns; from += kSpan) {
        if (peaks.span[from / kSpan] < least) continue;
        const int64_t size = std::min(kSpan, columns - from);
        weigh_row(x + from, size, of, weights);
        total += held_from(weights, size, floor).sum;
    }
    return total;
}

// The logarithm of the sum of a row's exponentials, from its weights at temperature 1; NaN where
// the greatest is not finite (`best` of -1).
inline double log_total(const float* x, int64_t columns, int64_t best, const Peaks& peaks) {
    if (best < 0) return std::numeric_limits<double>::quiet_NaN();
    const double total = double(total_from(x, columns, peaks, Likelihood{x[best], 1.0}, 1));
    return double(x[best]) + std::log(total / double(kFullWeight));
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
        Held held = held_from(weights, size, middle);
        held.count += apart.count;
        held.sum += apart.sum;
        if (enough(held)) {
            low = middle;
            from_low = held;
        } else {
            high = middle;
            from_high = held;
        }
        if (from_low.count - from_high.count < size / 8) {
            size = keep_between(weights, size, low, high, room);
            weights = room;
            apart = from_high;
        }
    }
    return low;
}

// A floor that top-p's is not below: the weights under it sum to less than what p leaves out.
inline int64_t share_floor(double p, int64_t total, int64_t columns) {
    // p is a float32 below 1: 2^-20 of what it leaves out is far more than these products round.
    return int64_t((1.0 - p) * double(total) / double(columns) * (1.0 - 0x1p-20));
}

}  // namespace arriero
