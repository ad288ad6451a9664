// Rows of a matrix into panels: blocks of rows are transposed in registers, and written in order.
//
// Knows where an element of a source lies and where its place in a panel is; knows nothing of
// files and scales. Packing should run at the memory's pace: a model is loaded by it.
#pragma once

#include <algorithm>

#include "matrix.h"

namespace arriero {

// Rows to be packed; strides in elements. Of quantized types an element is a byte (of int4, one
// for each pair of inputs).
struct Source {
    const char* data;
    int64_t rows, row_stride, column_stride;
    int32_t type;

    int64_t size() const { return type == kFloat32 ? 4 : type == kBFloat16 || type == kFloat16 ? 2 : 1; }
    // Elements of a row of `m`.
    int64_t columns(const Matrix& m) const { return pairs() ? m.pairs() : m.in_features; }
    // Whether a byte holds both inputs of a pair.
    bool pairs() const { return type == kInt4 || type == kInt4Dot; }
    const char* at(int64_t row, int64_t column) const {
        return data + (row * row_stride + column * column_stride) * size();
    }
};

// Elements [first, last) of up to 16 rows into their half of a panel, one by one.
template <int kBytes>
void copy_elements(const Matrix& m, char* panel, int column, const Source& from, int64_t first,
                   int64_t last) {
    const bool pairs = from.pairs();
    const int64_t step = element_offset(m.type, 1, 0), stride = from.row_stride * kBytes;
    for (int64_t i = first; i < last; ++i) {
        char* to = panel + m.element(column, pairs ? 2 * i : i);
        const char* row = from.at(0, i);
        if (from.rows == kLanes) {
#pragma GCC unroll 16
            for (int r = 0; r < kLanes; ++r) std::memcpy(to + r * step, row + r * stride, kBytes);
        } else {
            for (int r = 0; r < from.rows; ++r)
                std::memcpy(to + r * step, row + r * stride, kBytes);
        }
    }
}

#if defined(ARRIERO_AVX512)

// 64 bytes of each of 16 rows: out[k] holds the k-th dword of every row.
inline void transpose_dwords(const char* from, int64_t stride, __m512i (&out)[16]) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) a[r] = _mm512_loadu_si512(from + r * stride);
#pragma GCC unroll 4
    for (int r = 0; r < 16; r += 4) {
        b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
        b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
        b[r + 2] = _mm512_unpacklo_epi32(a[r + 2], a[r + 3]);
        b[r + 3] = _mm512_unpackhi_epi32(a[r + 2], a[r + 3]);
        a[r] = _mm512_unpacklo_epi64(b[r], b[r + 2]);
        a[r + 1] = _mm512_unpackhi_epi64(b[r], b[r + 2]);
        a[r + 2] = _mm512_unpacklo_epi64(b[r + 1], b[r + 3]);
        a[r + 3] = _mm512_unpackhi_epi64(b[r + 1], b[r + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        const __m512i p = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x44);
        const __m512i q = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x44);
        const __m512i r = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xee);
        const __m512i s = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xee);
        out[c] = _mm512_shuffle_i32x4(p, q, 0x88);
        out[4 + c] = _mm512_shuffle_i32x4(p, q, 0xdd);
        out[8 + c] = _mm512_shuffle_i32x4(r, s, 0x88);
        out[12 + c] = _mm512_shuffle_i32x4(r, s, 0xdd);
    }
}

// The dwords of 16 rows as the types lay them out: `to` is where the first of their inputs begins.
template <int32_t type>
inline void store_dwords(char* to, __m512i dwords, int k) {
    constexpr int64_t step = 2 * vector_bytes(type);  // from a pair to the next
    if constexpr (type == kFloat32) {
        _mm512_storeu_si512(to + k / 2 * step + k % 2 * 64, dwords);
    } else if constexpr (type == kBFloat16) {
        _mm512_storeu_si512(to + k * step, dwords);
    } else if constexpr (type == kFloat16) {
        const __m512i apart = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5,
                                               3, 1, 30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8,
                                               6, 4, 2, 0);
        _mm512_storeu_si512(to + k * step, _mm512_permutexvar_epi16(apart, dwords));
    } else if constexpr (type == kInt8Dot) {
        _mm512_storeu_si512(to + k * 4 * kPanel, dwords);
    } else {  // four bytes of each row: the first of all rows, then the second, ...
        const __m512i in_lane = _mm512_broadcast_i32x4(
            _mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0));
        const __m512i lanes =
            _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
        const __m512i v =
            _mm512_permutexvar_epi32(lanes, _mm512_shuffle_epi8(dwords, in_lane));
        if constexpr (type == kInt4) {
            auto put = [&](int i, __m128i x) {
                _mm_storeu_si128(reinterpret_cast<__m128i*>(to + (4 * k + i) * step), x);
            };
            put(0, _mm512_castsi512_si128(v));
            put(1, _mm512_extracti32x4_epi32(v, 1));
            put(2, _mm512_extracti32x4_epi32(v, 2));
            put(3, _mm512_extracti32x4_epi32(v, 3));
        } else {
            auto* first = reinterpret_cast<__m256i*>(to + 2 * k * step);
            auto* second = reinterpret_cast<__m256i*>(to + (2 * k + 1) * step);
            _mm256_storeu_si256(first, _mm512_castsi512_si256(v));
            _mm256_storeu_si256(second, _mm512_extracti64x4_epi64(v, 1));
        }
    }
}

// As `copy_elements`, of 16 rows whose columns lie side by side; returns where it ended.
template <int32_t type>
int64_t copy_blocks(const Matrix& m, char* panel, int column, const Source& from, int64_t first,
                    int64_t last) {
    const int64_t size = from.size(), block = 64 / size, stride = from.row_stride * size;
    int64_t i = first;
    for (; i + block <= last; i += block) {
        __m512i dwords[16];
        transpose_dwords(from.at(0, i), stride, dwords);
        char* to = panel + m.element(column, from.pairs() ? 2 * i : i);
#pragma GCC unroll 16
        for (int k = 0; k < 16; ++k) store_dwords<type>(to, dwords[k], k);
    }
    return i;
}

// As `copy_elements`, of bf16 whose 16 rows lie side by side; returns where it ended.
inline int64_t copy_interleaved(const Matrix& m, char* panel, int column, const Source& from,
                                int64_t first, int64_t last) {
    int64_t i = first;
    for (; i + 2 <= last; i += 2) {
        auto widened = [&](int64_t input) {
            auto* row = reinterpret_cast<const __m256i*>(from.at(0, input));
            return _mm512_cvtepu16_epi32(_mm256_loadu_si256(row));
        };
        const __m512i pair = _mm512_or_si512(widened(i), _mm512_slli_epi32(widened(i + 1), 16));
        _mm512_storeu_si512(panel + m.element(column, i), pair);
    }
    return i;
}

inline int64_t copy_fast(const Matrix& m, char* panel, int column, const Source& from,
                         int64_t first, int64_t last) {
    if (from.rows != kLanes || first % 2) return first;
    if (from.column_stride == 1) {
        switch (m.type) {
            case kFloat32: return copy_blocks<kFloat32>(m, panel, column, from, first, last);
            case kBFloat16: return copy_blocks<kBFloat16>(m, panel, column, from, first, last);
            case kFloat16: return copy_blocks<kFloat16>(m, panel, column, from, first, last);
            case kInt4: return copy_blocks<kInt4>(m, panel, column, from, first, last);
            case kInt8Dot:
            case kInt4Dot:  // bytes all the same
                return first % 4 ? first
                                 : copy_blocks<kInt8Dot>(m, panel, column, from, first, last);
            default: return copy_blocks<kInt8>(m, panel, column, from, first, last);
        }
    }
    if (from.row_stride == 1 && m.type == kBFloat16)
        return copy_interleaved(m, panel, column, from, first, last);
    return first;
}

#else

inline int64_t copy_fast(const Matrix&, char*, int, const Source&, int64_t first, int64_t) {
    return first;
}

#endif

// Elements [first, last) of up to 16 rows into their half of a panel.
inline void copy_half(const Matrix& m, char* panel, int column, const Source& from, int64_t first,
                      int64_t last) {
    if (column % kLanes == 0) first = copy_fast(m, panel, column, from, first, last);
    auto copy = from.size() == 1   ? copy_elements<1>
                : from.size() == 2 ? copy_elements<2>
                                   : copy_elements<4>;
    copy(m, panel, column, from, first, last);
}

// Elements are worked on in chunks of so many: both halves' are written before the next is read.
inline constexpr int64_t kPackColumns = 128;

// Elements [first, last), at most kPackColumns, of up to 16 rows of another type than the matrix.
inline void convert_half(const Matrix& m, char* panel, int column, const Source& from,
                         int64_t first, int64_t last) {
    alignas(64) char made[kLanes * kPackColumns * 4];
    const int64_t size = vector_bytes(m.type) / 32, from_size = from.size();
    for (int64_t r = 0; r < from.rows; ++r) {
        char* to = made + r * kPackColumns * size;
        const char* in = from.at(r, first);
        for (int64_t i = 0; i < last - first; ++i, in += from.column_stride * from_size)
            store_element(m.type, to + i * size, load_element(from.type, in));
    }
    const Source converted{made, from.rows, kPackColumns, 1, m.type};
    copy_half(m, panel + m.element(0, first), column, converted, 0, last - first);
}

// Rows [row, row + from.rows) of the matrix, all in one panel.
inline void pack_panel(const Matrix& m, int64_t row, const Source& from, int64_t first,
                       int64_t last) {
    char* panel = const_cast<char*>(m.data) + row / kPanel * m.panel_bytes();
    for (int64_t start = first; start < last; start += kPackColumns) {
        const int64_t stop = std::min(last, start + kPackColumns);
        for (int64_t r = 0, end; r < from.rows; r = end) {
            const int64_t column = (row + r) % kPanel;
            end = std::min(from.rows, r + kLanes - column % kLanes);
            Source half = from;
            half.data = from.at(r, 0);
            half.rows = end - r;
            auto pack = m.type == from.type ? copy_half : convert_half;
            pack(m, panel, int(column), half, start, stop);
        }
    }
}

// Panels that one thread packs at a time: fresh memory comes in large pages, and two threads that
// touch the same one wait for each other.
inline constexpr int64_t kPackBytes = 4 << 20;

// Rows [row, row + from.rows) of the matrix. Its padding starts as zeros.
inline void pack_rows(const Matrix& m, int64_t row, const Source& from) {
    // Rows that lie side by side are read so many panels at a time, in whole pages; others a panel.
    const bool beside = from.row_stride == 1 && from.column_stride != 1;
    const int64_t columns = from.columns(m), run = beside ? 16 * kPanel : kPanel;
    const int64_t step = beside ? 16 : columns;
    for (int64_t start = 0, stop; start < from.rows; start = stop) {
        stop = std::min(from.rows, start + run - (row + start) % kPanel);
        for (int64_t first = 0; first < columns; first += step) {
            for (int64_t r = start, end; r < stop; r = end) {
                end = std::min(stop, r + kPanel - (row + r) % kPanel);
                Source part = from;
                part.data = from.at(r, 0);
                part.rows = end - r;
                pack_panel(m, row + r, part, first, std::min(columns, first + step));
            }
        }
    }
}

}  // namespace arriero
