// Products of levels by tile registers (AMX).
//
// Knows how a group's weights become tiles; knows nothing of threads. Weights lie as the tiles want
// them: 16 columns of four int8 are a tile's row of 64 bytes.
//
// Same tokens: the sums of a group are whole numbers, so every output equals that of dot.h to the
// bit, and either may compute any number of rows.
#pragma once

#include <algorithm>

#include "amx.h"
#include "dot.h"

#if defined(ARRIERO_AMX)

namespace arriero {

template <bool kBoth>
inline void add_level_step(const char* a, int64_t a_stride, const char* w) {
    load_factors<kBoth>(a, a_stride, w);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    if constexpr (kBoth) {
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
}

inline constexpr int kLevelSteps = kLevelGroup / 4;  // dwords of levels of a group

// A group's weights, four int8 of each column side by side; int4 ones are unpacked into `room`.
template <int32_t type>
inline const char* group_weights(const Dot& d, int64_t group, char* room) {
    constexpr int64_t bytes = dot_group_bytes(type);
    const char* from = d.panel + group * bytes;
    for (int64_t at = group * bytes; at < (group + 1) * bytes; at += kStepBytes)
        fetch_panel(d, at, d.groups * bytes);
    if constexpr (type == kInt8Dot) return from;
    const __m512i low = _mm512_set1_epi32(0x0f0f0f0f);
    for (int64_t at = 0; at < bytes; at += kAmxBytes) {
        const __m512i both = _mm512_loadu_si512(from + at);
        char* to = room + at / kStepBytes * 2 * kStepBytes + at % kStepBytes;
        _mm512_store_si512(to, _mm512_and_si512(both, low));
        _mm512_store_si512(to + kStepBytes, _mm512_and_si512(_mm512_srli_epi32(both, 4), low));
    }
    written(room);
    return room;
}

// Groups [d.first, d.last) of up to 32 rows of levels by a panel.
template <int32_t type, bool kBoth>
inline void tile_levels(const Dot& d, int rows) {
    alignas(64) int32_t sums[kSumRows * kPanel];
    alignas(64) char room[kLevelSteps * kStepBytes];
    shape_tiles(rows, kLevelSteps, d.row);
    for (int64_t g = d.first; g < d.last; ++g) {
        const char* w = group_weights<type>(d, g, room);
        clear_sums<kBoth>();
        add_level_step<kBoth>(reinterpret_cast<const char*>(d.levels(0, g)), d.row_stride, w);
        store_sums<kBoth>(reinterpret_cast<char*>(sums), kPanel * 4);
        Dot row = d;
        for (int m = 0; m < rows; ++m, row.row += d.row_stride, row.c += d.c_stride) {
            __m256i own[1][kPanel / 8];
            for (int v = 0; v < kPanel / 8; ++v)
                own[0][v] = bytes_at(reinterpret_cast<const char*>(sums + m * kPanel + v * 8));
            add_group<type, 1, kPanel / 8>(row, g, own);
        }
    }
}

template <int32_t type>
inline void tile_dot_panel_of(int rows, const Dot& whole) {
    constexpr int64_t block = kDotBlockBytes / dot_group_bytes(type);
    for (int row = 0; row < rows; ++row)
        std::memset(whole.c + row * whole.c_stride, 0, kPanel * sizeof(float));
    for (int64_t start = 0; start < whole.groups; start += block) {
        for (int row = 0; row < rows; row += kSumRows) {
            const int count = std::min(rows - row, kSumRows);
            Dot d = whole;
            d.first = start;
            d.last = std::min(start + block, whole.groups);
            d.row = whole.row + row * whole.row_stride;
            d.c = whole.c + row * whole.c_stride;
            if (count > kAmxRows)
                tile_levels<type, true>(d, count);
            else
                tile_levels<type, false>(d, count);
        }
    }
}

// As dot_panel, and to the bit.
inline void tile_dot_panel(int32_t type, int rows, const Dot& whole) {
    if (type == kInt4Dot)
        tile_dot_panel_of<kInt4Dot>(rows, whole);
    else
        tile_dot_panel_of<kInt8Dot>(rows, whole);
}

}  // namespace arriero

#endif
