// Rows of inputs for products, in the form that a matrix's kernels want.
//
// Knows where a row's numbers lie and how they are rounded; knows nothing of products.
#pragma once

#include "levels.h"

namespace arriero {

// Rows of inputs for products: float32, or bf16 where the matrix's kernels want it. Strides leave
// room for an odd last input, which is 0.
struct Rows {
    char* data;
    int64_t stride;  // bytes

    float* floats(int64_t row) const { return reinterpret_cast<float*>(data + row * stride); }
    bf16* halves(int64_t row) const { return reinterpret_cast<bf16*>(data + row * stride); }
    // Levels lie behind the floats of a row.
    Levels levels(int64_t row, int64_t features) const {
        char* first = data + row * stride + features * 4;
        return {reinterpret_cast<int8_t*>(first), reinterpret_cast<float*>(first + features)};
    }
};

// Whether inputs of this matrix are rounded to bf16: its weights are then multiplied as bf16 too.
inline bool rounds_inputs([[maybe_unused]] const Matrix& m, [[maybe_unused]] bool exact) {
#if defined(ARRIERO_BF16)
    const bool fits = m.type == kBFloat16 || m.type == kInt8 || m.type == kFp8 ||
                      (m.type == kInt4 && (m.zero == nullptr || m.whole));
    return fits && !exact;
#else
    return false;
#endif
}

// Bytes between rows of `features` inputs: whole cache lines, and never a multiple of 4096, so
// that the rows of a tile do not all fall into one set of the cache.
inline int64_t row_stride(int64_t features) {
    int64_t bytes = (features * 4 + 64 + 63) / 64 * 64;
    return bytes % 4096 == 0 ? bytes + 64 : bytes;
}

// And of inputs for this matrix, with room for levels where it takes them.
inline int64_t row_stride(const Matrix& m) {
    return row_stride(m.in_features +
                      (takes_levels(m) ? ceil_div(levels_bytes(m.in_features), 4) : 0));
}

// Round a row of inputs for this matrix, if it takes levels; the floats stay as they are.
inline void round_row(const Matrix& m, const Rows& rows, int64_t row) {
    if (!takes_levels(m)) return;
    const Levels to = rows.levels(row, m.in_features);
    for (int64_t i = 0, g = 0; i < m.in_features; i += kLevelGroup, ++g)
        round_group(rows.floats(row) + i, m.type == kInt4Dot, to.levels + i, to.factors + 2 * g);
}

// Store 16 inputs (or n < 16) at a multiple of 16, in the form the product wants.
inline void store_inputs(const Rows& rows, bool rounded, int64_t row, int64_t at, F16 value) {
    if (rounded)
        store_bf16(rows.halves(row) + at, value);
    else
        store(rows.floats(row) + at, value);
}

}  // namespace arriero
