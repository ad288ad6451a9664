// Products of bf16 pairs by tile registers (AMX): 16 rows by 16 columns at a time.
//
// Knows the eight tiles and their shapes; knows nothing of threads. Weights lie as the tiles want
// them: 16 columns of a pair are a tile's row of 64 bytes.
//
// Same tokens: an output takes its inputs in steps of 32 (16 pairs), in rising order; within a step
// the even and the odd inputs are summed apart. So it is for every number of rows: a single row goes
// through a tile too.
#pragma once

#include <algorithm>

#include "buffer.h"
#include "pairs.h"

#if defined(ARRIERO_BF16) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define ARRIERO_AMX 1
#endif

#if !defined(ARRIERO_AMX)

namespace arriero {

inline bool by_tiles(bool) { return false; }
inline void release_tiles() {}

}  // namespace arriero

#else

#include <sys/syscall.h>
#include <unistd.h>

namespace arriero {

// Ask Linux for the tiles' registers, for all threads of the process; false where it has none.
inline bool tiles_granted() {
#if defined(ARRIERO_EMULATED_AMX)
    return true;
#else
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#endif
}

// Whether a product whose inputs are `rounded` to bf16 goes through tiles.
inline bool by_tiles(bool rounded) { return rounded; }

inline constexpr int kAmxRows = 16, kAmxBytes = 64;  // of a tile, bytes of a row
inline constexpr int kStepPairs = 16;            // pairs of inputs of a step
inline constexpr int kSumRows = 2 * kAmxRows;    // rows whose sums the tiles hold, by one panel
inline constexpr int64_t kTileBlockPairs = 256;  // of a panel: 32 KB, which the first cache holds
inline constexpr int64_t kPairBytes = 2 * kAmxBytes;  // of a pair of inputs by a panel's columns

// The tiles: sums 0 .. 3 (first rows by two halves of a panel, then other rows), inputs 4 and 5 of
// the first and other rows, weights 6 and 7 of the halves.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};  // of a row
    uint8_t rows[16] = {};

    TileShapes(int num_rows, int depth) {
        for (int i = 0; i < 2; ++i) {
            const int part = std::clamp(num_rows - i * kAmxRows, 0, kAmxRows);
            shape(2 * i, part, kAmxBytes);
            shape(2 * i + 1, part, kAmxBytes);
            shape(4 + i, part, 4 * depth);
            shape(6 + i, depth, kAmxBytes);
        }
    }
    void shape(int tile, int of_rows, int row_bytes) {
        rows[tile] = uint8_t(of_rows);
        bytes[tile] = uint16_t(of_rows ? row_bytes : 0);
    }
};

// The compiler does not know what tiles read: what the source has stored by here is in memory.
inline void written(const void* p) { asm volatile("" : : "r"(p) : "memory"); }

// This thread's shapes: of `shaped` rows and depth, 0 where it has none.
inline thread_local int shaped = 0;

// Shapes for up to 32 rows; depth: rows of a tile of weights. Clears all tiles where it changes any.
// `inputs`: what the tiles are about to read.
inline void shape_tiles(int rows, int depth, const char* inputs) {
    written(inputs);
    const int key = rows * 64 + depth;
    if (shaped == key) return;
    const TileShapes shapes(rows, depth);
    written(&shapes);
    _tile_loadconfig(&shapes);
    shaped = key;
}

// Give the tiles back: a core that sleeps, or a fork, has none to keep.
inline void release_tiles() {
    if (shaped == 0) return;
    _tile_release();
    shaped = 0;
}

template <bool kBoth>
inline void clear_sums() {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kBoth) {
        _tile_zero(2);
        _tile_zero(3);
    }
}

// c: [rows][stride bytes], a panel wide.
template <bool kBoth>
inline void load_sums(const char* c, int64_t stride) {
    written(c);
    _tile_loadd(0, c, stride);
    _tile_loadd(1, c + kAmxBytes, stride);
    if constexpr (kBoth) {
        _tile_loadd(2, c + kAmxRows * stride, stride);
        _tile_loadd(3, c + kAmxRows * stride + kAmxBytes, stride);
    }
}

template <bool kBoth>
inline void store_sums(char* c, int64_t stride) {
    _tile_stored(0, c, stride);
    _tile_stored(1, c + kAmxBytes, stride);
    if constexpr (kBoth) {
        _tile_stored(2, c + kAmxRows * stride, stride);
        _tile_stored(3, c + kAmxRows * stride + kAmxBytes, stride);
    }
}

// Inputs at `a` and weights at `w` [depth][kPairBytes].
template <bool kBoth>
inline void load_factors(const char* a, int64_t a_stride, const char* w) {
    _tile_loadd(6, w, kPairBytes);
    _tile_loadd(7, w + kAmxBytes, kPairBytes);
    _tile_loadd(4, a, a_stride);
    if constexpr (kBoth) _tile_loadd(5, a + kAmxRows * a_stride, a_stride);
}

template <bool kBoth>
inline void add_pair_step(const char* a, int64_t a_stride, const char* w) {
    load_factors<kBoth>(a, a_stride, w);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kBoth) {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

// So many products of tiles, four side by side and nothing else: the machine's limit, for benchmarks.
// Returns the number of operations.
inline double multiply_tiles(int64_t rounds) {
    shape_tiles(kSumRows, kStepPairs, nullptr);
    clear_sums<true>();
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (int64_t i = 0; i < rounds; ++i) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    release_tiles();
    return double(rounds) * 4 * kAmxRows * kAmxRows * 4 * kStepPairs;
}

// Add `pairs` pairs of inputs at `a` by weights at `w` to the sums of `rows` rows; `ahead`: weights
// to fetch meanwhile, or null.
template <bool kBoth>
inline void add_steps(int rows, const char* a, int64_t a_stride, const char* w, int64_t pairs,
                      const char* ahead) {
    constexpr int64_t bytes = kStepPairs * kPairBytes;
    int64_t p = 0;
    for (; p + kStepPairs <= pairs; p += kStepPairs, w += bytes) {
        if (ahead)
            for (int64_t i = 0; i < bytes; i += 64) prefetch(ahead + p * kPairBytes + i);
        add_pair_step<kBoth>(a + p * 4, a_stride, w);
    }
    const size_t left = size_t(pairs - p);
    if (left == 0) return;
    // What lies behind the last inputs and weights is not theirs: zeros take its place.
    alignas(64) char inputs[kSumRows][kAmxBytes] = {}, weights[bytes] = {};
    for (int row = 0; row < rows; ++row)
        std::memcpy(inputs[row], a + row * a_stride + p * 4, left * 4);
    std::memcpy(weights, w, left * kPairBytes);
    written(inputs);
    written(weights);
    add_pair_step<kBoth>(inputs[0], kAmxBytes, weights);
}

// Pairs [start, end) of a panel as bf16; `room` holds them where the matrix has another type.
template <int32_t type>
inline const char* weights_of(const Tile& t, int64_t start, int64_t end, int64_t group, char* room,
                              const char* ahead) {
    constexpr int64_t bytes = vector_bytes(type);
    if constexpr (type == kBFloat16) return t.w[0] + start * 2 * bytes;
    F16 zeros[2] = {};
    if constexpr (type == kInt4)
        for (int v = 0; v < 2; ++v) zeros[v] = group_zeros(t, v, group);
    char* to = room;
    for (int64_t p = start; p < end; ++p) {
        prefetch(ahead + p * 2 * bytes);
        for (int v = 0; v < 2; ++v, to += kAmxBytes)
            _mm512_store_si512(to, pairs_of<type>(t.w[v] + p * 2 * bytes, zeros[v]));
    }
    written(room);
    return room;
}

// c = a group's sums, scaled; from the second group on they are added to what is there.
inline void add_scaled(const Tile& t, int64_t group, int rows, const float* sums, float* c) {
    for (int v = 0; v < 2; ++v) {
        const F16 scale = group_scales(t, v, group);
        for (int row = 0; row < rows; ++row) {
            const F16 sum = load(sums + row * kPanel + v * kLanes);
            float* to = c + row * t.c_stride + v * kLanes;
            store(to, group == 0 ? mul(sum, scale) : fma(sum, scale, load(to)));
        }
    }
}

// Up to 32 rows by pairs [start, end) of a panel.
template <int32_t type, bool kBoth>
inline void tile_rows(const Tile& t, int row, int rows, int64_t start, int64_t end, int64_t group,
                      const char* w, const char* ahead) {
    const char* a = t.a + row * t.a_stride + start * 4;
    float* c = t.c + row * t.c_stride;
    shape_tiles(rows, kStepPairs, a);
    if (type == kInt4 || start == 0)
        clear_sums<kBoth>();
    else
        load_sums<kBoth>(reinterpret_cast<char*>(c), t.c_stride * 4);
    add_steps<kBoth>(rows, a, t.a_stride, w, end - start, ahead);
    if constexpr (type == kInt4) {
        alignas(64) float sums[kSumRows * kPanel];
        store_sums<kBoth>(reinterpret_cast<char*>(sums), kPanel * 4);
        add_scaled(t, group, rows, sums, c);
    } else {
        store_sums<kBoth>(reinterpret_cast<char*>(c), t.c_stride * 4);
    }
}

// A panel by `rows` rows of bf16 inputs. The inputs go by in blocks (of int4, in the groups that
// share a scale), and a block's weights stay in the first cache until all rows have met them.
template <int32_t type>
inline void tile_panel_of(const Tile& t, int rows, const char* ahead) {
    static thread_local Buffer room;
    const int64_t block = type == kInt4 ? t.group_pairs : kTileBlockPairs;
    char* made = type == kBFloat16 ? nullptr : room.room(block * kPairBytes);
    for (int64_t start = 0, group = 0; start < t.pairs; start += block, ++group) {
        const int64_t end = std::min(start + block, t.pairs);
        const char* w = weights_of<type>(t, start, end, group, made, ahead);
        for (int row = 0; row < rows; row += kSumRows) {
            const int count = std::min(rows - row, kSumRows);
            const bool fetches = type == kBFloat16 && row == 0;
            const char* next = fetches ? ahead + start * kPairBytes : nullptr;
            const auto run = count > kAmxRows ? tile_rows<type, true> : tile_rows<type, false>;
            run(t, row, count, start, end, group, w, next);
            t.stream->step();
        }
    }
}

// As above, of any type that meets bf16 inputs; `panels_left`: how many panels share the stream.
inline void tile_panel(const Matrix& m, int rows, const char* ahead, int panels_left,
                       const Tile& t) {
    const int64_t block = m.type == kInt4 ? t.group_pairs : kTileBlockPairs;
    t.stream->pace(panels_left * ceil_div(t.pairs, block) * ceil_div(rows, kSumRows));
    switch (m.type) {
        case kInt8: return tile_panel_of<kInt8>(t, rows, ahead);
        case kFp8: return tile_panel_of<kFp8>(t, rows, ahead);
        case kInt4: return tile_panel_of<kInt4>(t, rows, ahead);
        default: return tile_panel_of<kBFloat16>(t, rows, ahead);
    }
}

}  // namespace arriero

#endif
