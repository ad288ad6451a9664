// A row of logits to a token; `Ops.sample` and kernels/reference/sampling.py say what is meant.
//
// Knows numbers of one row and its mask; knows nothing of biases and penalties, which are in the
// logits by then.
//
// A draw reads the row once, for its peaks. With filters, the peaks give a logit that no kept column
// is below: only columns from there up are weighed. Without, only those that may win the race are.
#pragma once

#include "race.h"

namespace arriero {

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

// Columns apart from the row that they come from.
struct Apart {
    float* x;
    int32_t* column;
    int32_t* id;
};

// Memory of a thread for draws from rows of so many columns.
class DrawRoom {
  public:
    static int64_t bytes(int64_t columns) {
        const int64_t padded = ceil_to_lanes(columns);
        return padded * (2 * 8 + 2 * 3 * 4) + Peaks::size(padded) * 4;
    }
    DrawRoom(char* memory, int64_t columns) {
        const int64_t padded = ceil_to_lanes(columns);
        const auto take = [&](auto*& part, int64_t size) {
            part = reinterpret_cast<std::remove_reference_t<decltype(part)>>(memory);
            memory += size * int64_t(sizeof(*part));
        };
        take(weights, padded);
        take(spare, padded);
        for (Apart* apart : {&allowed, &likely}) {
            take(apart->x, padded);
            take(apart->column, padded);
            take(apart->id, padded);
        }
        take(peaks_, Peaks::size(padded));
    }
    Peaks peaks(int64_t columns) const { return Peaks::in(peaks_, columns); }

    int64_t *weights, *spare;
    Apart allowed, likely;

  private:
    static int64_t ceil_to_lanes(int64_t columns) {
        return (columns + kLanes - 1) / kLanes * kLanes;
    }
    float* peaks_;
};

// What is left of a row after its filters: columns apart, with weights, of which those from `floor`
// up may be drawn.
struct Filtered {
    int64_t size = 0, best = 0, floor;
};

// Filter a row with top-k, top-p or min-p; `floor` is min-p's. `best`: its column with the greatest
// logit. The columns go to `room.likely`, their weights to `room.weights`.
inline Filtered filter_row(const float* x, int64_t columns, const int32_t* ids, int64_t best,
                           const Likelihood& of, int64_t top_k, double top_p, int64_t floor,
                           const DrawRoom& room) {
    const Peaks peaks = room.peaks(columns);
    int64_t low = floor, total = 0;  // no column with a weight below `low` will be kept
    if (top_k > 0) {
        low = std::max(low, of.weight(peaks.reached_by(top_k, columns)) - 1);
    } else if (top_p < 1.0) {
        total = total_from(x, columns, peaks, of, floor);
        low = std::max(low, share_floor(top_p, total, columns));
    }
    Filtered left{.floor = low};
    const Apart& to = room.likely;
    // `best` is among them whatever the parameters are, even those that no request may have.
    const float bound = of.least_logit(low), least = bound <= x[best] ? bound : x[best];
    each_from(x, columns, peaks, least, [&](int64_t column) {
        if (column == best) left.best = left.size;
        to.x[left.size] = x[column];
        to.column[left.size] = int32_t(column);
        to.id[left.size++] = ids ? ids[column] : int32_t(column);
    });
    weigh_row(to.x, left.size, of, room.weights);
    if (top_k > 0) {
        left.floor = greatest_floor(room.weights, left.size, left.floor, room.spare,
                                    [&](Held held) { return held.count >= top_k; });
        total = held_from(room.weights, left.size, left.floor).sum;
    }
    if (top_p < 1.0) {
        const double target = top_p * double(total);
        left.floor = greatest_floor(room.weights, left.size, left.floor, room.spare,
                                    [&](Held held) { return double(held.sum) >= target; });
    }
    return left;
}

// One row's column of those given. `ids`: ids of the columns, or null.
inline int32_t draw_of(const float* x, int64_t columns, const int32_t* ids, const Draws& draws,
                       int64_t row, const DrawRoom& room) {
    const bool greedy = draws.temperature[row] == 0.0f;
    const Peaks peaks = room.peaks(columns);
    const int64_t best = best_of(x, columns, greedy ? nullptr : &peaks);
    if (best < 0 || greedy) return int32_t(best);
    const Likelihood of{x[best], draws.temperature[row]};
    const RowKey key = row_key(uint64_t(draws.seed[row]), uint64_t(draws.position[row]));
    const int64_t least = int64_t(std::ceil(double(draws.min_p[row]) * double(kFullWeight)));
    const int64_t floor = std::max<int64_t>(least, 1);
    const int64_t top_k = draws.top_k[row];
    const double top_p = draws.top_p[row];
    if (floor == 1 && top_k <= 0 && top_p >= 1.0 && of.temperature <= kMostUnweighed)
        return int32_t(race_unweighed(x, columns, of, best, ids, key));
    const Filtered left = filter_row(x, columns, ids, best, of, top_k, top_p, floor, room);
    const int64_t at =
        race(room.weights, left.size, left.floor, left.best, room.likely.id, key);
    return room.likely.column[at];
}

// One row's column. Only allowed columns are looked at, so that a mask saves time.
inline int32_t draw(const float* x, int64_t columns, const Draws& draws, int64_t row,
                    const DrawRoom& room) {
    if (!draws.allowed) return draw_of(x, columns, draws.token_ids, draws, row, room);
    const Apart& to = room.allowed;
    const uint32_t* allowed = draws.allowed + row * draws.allowed_stride;
    const int64_t count = keep_allowed(x, columns, allowed, to.x, to.column);
    const int32_t* ids = to.column;
    if (draws.token_ids) {
        for (int64_t i = 0; i < count; ++i) to.id[i] = draws.token_ids[to.column[i]];
        ids = to.id;
    }
    const int32_t at = draw_of(to.x, count, ids, draws, row, room);
    return at < 0 ? at : to.column[at];
}

}  // namespace arriero
