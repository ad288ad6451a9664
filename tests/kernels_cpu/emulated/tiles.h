// AMX in plain C++: eight tile registers a thread, and the faults that a processor would raise.
//
// Knows the rules of Intel's manual: which shapes fit which instruction, what a load clears, and in
// which order TDPBF16PS adds. A broken rule ends the process with its name.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated {

inline __m256 flush(__m256 x);
template <bool kSecond>
inline __m256 add_product(__m256 sum, __m256i a, __m256i b);

struct TileShape {
    int rows, bytes;  // bytes of a row

    bool operator==(const TileShape&) const = default;
};

struct Tiles {
    bool ready = false;
    TileShape shape[8];
    alignas(64) char data[8][16][64];
};

inline thread_local Tiles tiles;

inline void require(bool holds, const char* rule) {
    if (holds) return;
    std::fprintf(stderr, "emulated AMX: %s\n", rule);
    std::abort();
}

inline void load_config(const void* config) {
    const auto* bytes = static_cast<const uint8_t*>(config);
    require(bytes[0] == 1, "the palette of a configuration is 1");
    for (int i = 1; i < 16; ++i) require(bytes[i] == 0, "reserved bytes are zeros");
    for (int i = 0; i < 16; ++i) {
        uint16_t row_bytes;
        std::memcpy(&row_bytes, bytes + 16 + 2 * i, 2);
        const int rows = bytes[48 + i];
        require(i < 8 || (rows == 0 && row_bytes == 0), "there are eight tiles");
        require((rows == 0) == (row_bytes == 0), "a tile has rows and bytes, or neither");
        require(rows <= 16 && row_bytes <= 64, "a tile has at most 16 rows of 64 bytes");
        if (i < 8) tiles.shape[i] = {rows, row_bytes};
    }
    std::memset(tiles.data, 0, sizeof tiles.data);
    tiles.ready = true;
}

inline void release() { tiles.ready = false; }

inline TileShape shape_of(int tile) {
    require(tiles.ready, "tiles are used between a configuration and a release");
    require(tiles.shape[tile].rows > 0, "a tile that is used has rows");
    return tiles.shape[tile];
}

inline void zero_tile(int tile) {
    shape_of(tile);
    std::memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
}

inline void load_tile(int tile, const void* from, int64_t stride) {
    const TileShape shape = shape_of(tile);
    zero_tile(tile);
    for (int row = 0; row < shape.rows; ++row)
        std::memcpy(tiles.data[tile][row], static_cast<const char*>(from) + row * stride,
                    size_t(shape.bytes));
}

inline void store_tile(int tile, void* to, int64_t stride) {
    const TileShape shape = shape_of(tile);
    for (int row = 0; row < shape.rows; ++row)
        std::memcpy(static_cast<char*>(to) + row * stride, tiles.data[tile][row],
                    size_t(shape.bytes));
}

// Shapes of sums [rows][columns], a [rows][depth], b [depth][columns], in dwords.
inline void check_product(int sums, int a, int b) {
    const TileShape c = shape_of(sums), left = shape_of(a), right = shape_of(b);
    require(c.rows == left.rows, "sums have the rows of the first factor");
    require(c.bytes == right.bytes, "sums have the columns of the second factor");
    require(left.bytes % 4 == 0 && left.bytes / 4 == right.rows, "the depths of factors agree");
    require(sums != a && sums != b && a != b, "the tiles of a product are three");
}

// The sums of first inputs and of second ones are apart until the depth's end.
inline void tdpbf16ps(int sums, int a, int b) {
    check_product(sums, a, b);
    const int depth = tiles.shape[b].rows;
    for (int row = 0; row < tiles.shape[sums].rows; ++row)
        for (int half = 0; half < 2; ++half) {
            __m256 first = _mm256_setzero_ps(), second = _mm256_setzero_ps();
            for (int k = 0; k < depth; ++k) {
                int32_t pair;
                std::memcpy(&pair, tiles.data[a][row] + 4 * k, 4);
                const __m256i x = _mm256_set1_epi32(pair);
                const __m256i w = _mm256_load_si256(
                    reinterpret_cast<const __m256i*>(tiles.data[b][k] + 32 * half));
                first = add_product<false>(first, x, w);
                second = add_product<true>(second, x, w);
            }
            float* c = reinterpret_cast<float*>(tiles.data[sums][row] + 32 * half);
            const __m256 both = flush(_mm256_add_ps(first, second));
            _mm256_store_ps(c, flush(_mm256_add_ps(flush(_mm256_load_ps(c)), both)));
        }
}

inline void tdpbssd(int sums, int a, int b) {
    check_product(sums, a, b);
    for (int row = 0; row < tiles.shape[sums].rows; ++row)
        for (int column = 0; column < tiles.shape[sums].bytes / 4; ++column) {
            int32_t sum;
            char* c = tiles.data[sums][row] + 4 * column;
            std::memcpy(&sum, c, 4);
            for (int k = 0; k < tiles.shape[a].bytes; ++k)
                sum += int8_t(tiles.data[a][row][k]) *
                       int8_t(tiles.data[b][k / 4][4 * column + k % 4]);
            std::memcpy(c, &sum, 4);
        }
}

}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadconfig(config) emulated::load_config(config)
#define _tile_release() emulated::release()
#define _tile_zero(tile) emulated::zero_tile(tile)
#define _tile_loadd(tile, from, stride) emulated::load_tile(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated::store_tile(tile, to, stride)
#define _tile_dpbf16ps(sums, a, b) emulated::tdpbf16ps(sums, a, b)
#define _tile_dpbssd(sums, a, b) emulated::tdpbssd(sums, a, b)
