// The product of all rows of a batch with a packed matrix, shared out among the threads.
//
// Knows which kernel takes which rows and panels; knows nothing of what the result is for: each
// finished block of columns goes to the caller's epilogue while it is still in the first cache.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "amx_levels.h"
#include "buffer.h"
#include "dot.h"
#include "narrow.h"
#include "pairs.h"
#include "pool.h"
#include "rows.h"

namespace arriero {

inline constexpr int kRowBlock = 96;  // rows of a block: its inputs stay in the second cache

#if !defined(ARRIERO_AVX2)
template <int32_t type, size_t... M>
constexpr auto wide_floats(std::index_sequence<M...>) {
    return std::array<Kernel, sizeof...(M)>{float_kernel<type, int(M) + 1, 2, 2, true>...};
}
template <int32_t type, size_t... M>
constexpr auto thin_floats(std::index_sequence<M...>) {
    return std::array<Kernel, sizeof...(M)>{float_kernel<type, int(M) + 1, 4, 2, true>...};
}
template <int32_t type, size_t... M>
constexpr auto wide_groups(std::index_sequence<M...>) {
    return std::array<Kernel, sizeof...(M)>{group_kernel<type, int(M) + 1, 2>...};
}
template <int32_t type, size_t... M>
constexpr auto thin_groups(std::index_sequence<M...>) {
    return std::array<Kernel, sizeof...(M)>{group_kernel<type, int(M) + 1, 4>...};
}
#endif
#if defined(ARRIERO_BF16)
template <int32_t type, bool kGroups, int M, int V, bool KEEP>
constexpr Kernel pair_kernel_for() {
    if constexpr (kGroups)
        return pair_group_kernel<type, M, V, KEEP>;
    else
        return pair_kernel<type, M, V, 2, true, KEEP>;
}
template <int32_t type, bool kGroups, int V, bool KEEP, size_t... M>
constexpr auto pair_kernels(std::index_sequence<M...>) {
    return std::array<Kernel, sizeof...(M)>{
        pair_kernel_for<type, kGroups, int(M) + 1, V, KEEP>()...};
}

// The kernel over pairs of bf16 for `rows` rows by one panel (wide) or two (thin).
inline Kernel pair_kernel_of(int32_t type, bool groups, bool thin, int rows) {
    using Wide = std::make_index_sequence<kMaxRows>;
    using Thin = std::make_index_sequence<kThinRows>;
#define ARRIERO_KERNELS(TYPE, GROUPS)                                                          \
    {                                                                                        \
        static constexpr auto wide = pair_kernels<TYPE, GROUPS, 2, TYPE != kBFloat16>(Wide{}); \
        static constexpr auto narrow = pair_kernels<TYPE, GROUPS, 4, false>(Thin{});         \
        return thin ? narrow[rows - 1] : wide[rows - 1];                                     \
    }
    switch (type) {
        case kInt8: ARRIERO_KERNELS(kInt8, false)
        case kFp8: ARRIERO_KERNELS(kFp8, false)
        case kInt4: ARRIERO_KERNELS(kInt4, true)
    }
    if (groups) ARRIERO_KERNELS(kBFloat16, true)
    ARRIERO_KERNELS(kBFloat16, false)
#undef ARRIERO_KERNELS
}
#endif

#if !defined(ARRIERO_AVX2)
// The kernel over float32 inputs for `rows` rows by one panel (wide) or two (thin).
inline Kernel float_kernel_of(int32_t type, bool thin, int rows) {
    using Wide = std::make_index_sequence<kMaxRows>;
    using Thin = std::make_index_sequence<kThinRows>;
#define ARRIERO_KERNELS(TYPE, FAMILY)                         \
    case TYPE: {                                              \
        static constexpr auto wide = wide_##FAMILY<TYPE>(Wide{}); \
        static constexpr auto narrow = thin_##FAMILY<TYPE>(Thin{}); \
        return thin ? narrow[rows - 1] : wide[rows - 1];      \
    }
    switch (type) {
        ARRIERO_KERNELS(kFloat32, floats)
        ARRIERO_KERNELS(kBFloat16, floats)
        ARRIERO_KERNELS(kFloat16, floats)
        ARRIERO_KERNELS(kInt8, floats)
        ARRIERO_KERNELS(kFp8, floats)
        ARRIERO_KERNELS(kInt4, groups)
    }
#undef ARRIERO_KERNELS
    return nullptr;
}

inline Kernel kernel_of(int32_t type, [[maybe_unused]] bool groups, [[maybe_unused]] bool rounded,
                        bool thin, int rows) {
#if defined(ARRIERO_BF16)
    if (rounded) return pair_kernel_of(type, groups, thin, rows);
#endif
    return float_kernel_of(type, thin, rows);
}
#endif

// A thread's panel of weights as pairs of bf16, made by the first tile of a block of rows.
inline thread_local Buffer expanded;

// A block of finished sums: `rows` rows from `row`, two panels side by side (`second` is -1 where
// the matrix ends in the first), in c [rows][2 * kPanel].
struct Block {
    int64_t row;
    int rows;
    int64_t first, second;  // panels
    float* c;
};

// What a thread fetches beside a block.
inline thread_local Stream fetched;

inline constexpr int kBlockStride = 2 * kPanel;

// The sums of each group of inputs of `rows` rows, [row][group]; null where no kernel wants them.
inline const float* group_sums([[maybe_unused]] const Matrix& m, [[maybe_unused]] const Rows& a,
                               [[maybe_unused]] int64_t row, [[maybe_unused]] int rows) {
#if defined(ARRIERO_AVX2)
    if (m.group == 0 || takes_levels(m)) return nullptr;
    static thread_local Buffer room;
    const int64_t groups = m.groups();
    float* sums = reinterpret_cast<float*>(room.room(rows * groups * 4));
    for (int r = 0; r < rows; ++r) {
        const float* x = a.floats(row + r);
        for (int64_t g = 0, from = 0; g < groups; ++g, from += m.group) {
            const int64_t to = std::min(from + m.group, m.in_features);
            F16 total = zero();
            int64_t i = from;
            for (; i + kLanes <= to; i += kLanes) total = add(total, load(x + i));
            if (i < to) total = add(total, load_n(x + i, int(to - i)));
            sums[r * groups + g] = reduce_add(total);
        }
    }
    return sums;
#else
    return nullptr;
#endif
}

// Point vectors v and v + 1 of a tile at a panel.
inline void place(Tile& t, const Matrix& m, int v, int64_t panel) {
    for (int half = 0; half < 2; ++half) {
        t.w[v + half] = m.panel(panel) + half * vector_bytes(m.type);
        if (m.group) {
            const int64_t at = panel * m.groups() * m.scale_bytes() + half * m.scale_bytes() / 2;
            t.scale[v + half] = m.scale + at;
            t.zero[v + half] = m.zero ? m.zero + at : nullptr;
        }
    }
}

// Two panels by few rows: `t` fetches along its own streams, on into `fetch`.
inline void multiply_thin(const Matrix& m, [[maybe_unused]] bool rounded, const Block& block,
                          const char* const (&fetch)[2], Tile& t) {
    t.fetch_step = 2048;
    t.fetch = fetch[0] ? fetch[0] : m.panel(block.first);
    t.fetch_second = fetch[1] ? fetch[1] : m.panel(block.second);
    place(t, m, 0, block.first);
    place(t, m, 2, block.second);
    t.stream->pace(1);
    t.stream->step();
#if defined(ARRIERO_AVX2)
    narrow_kernel_of(m.type, 0)(t);
#else
    kernel_of(m.type, m.group != 0, rounded, true, block.rows)(t);
#endif
}

// A panel by a block of rows, whose first is `t.a`; `ahead`: the panel that is multiplied next;
// `panels_left`: how many panels share the stream.
inline void multiply_panel(const Matrix& m, [[maybe_unused]] bool rounded, int64_t panel, int rows,
                           const char* ahead, int panels_left, Tile& t) {
    place(t, m, 0, panel);
#if defined(ARRIERO_AMX)
    if (by_tiles(rounded)) return tile_panel(m, rows, ahead, panels_left, t);
#endif
#if defined(ARRIERO_AVX2)
    narrow_panel(m, rows, ahead, panels_left, t);
#else
    const int64_t step = 2 * vector_bytes(m.type);
    const int tiles = int(ceil_div(rows, kMaxRows));
    const bool expands = rounded && m.type != kBFloat16;
    if (expands) t.kept = expanded.room(t.pairs * 2 * vector_bytes(kBFloat16));
    int32_t type = m.type;
    t.fetch_step = ceil_div(step, tiles);
    t.stream->pace(int64_t(panels_left) * tiles);
    for (int tile = 0, row = 0; tile < tiles; ++tile) {
        const int count = (rows - row) / (tiles - tile);
        t.fetch = ahead + tile * t.fetch_step * t.pairs;
        t.stream->step();
        kernel_of(type, m.group != 0, rounded, false, count)(t);
        row += count;
        t.a += count * t.a_stride;
        t.c += count * t.c_stride;
        if (expands && tile == 0) {  // the others find the panel expanded
            type = kBFloat16;
            t.w[0] = t.kept;
            t.w[1] = t.kept + vector_bytes(kBFloat16);
        }
    }
#endif
}

// A panel of a matrix that takes levels, by a block of rows.
inline void multiply_levels(const Matrix& m, const Rows& a, const Block& block, int64_t panel,
                            const char* ahead, float* c) {
    const int64_t scales = panel * m.groups() * m.scale_bytes();
    Dot d{};
    d.row = reinterpret_cast<const char*>(a.levels(block.row, m.in_features).levels);
    d.row_stride = a.stride;
    d.features = m.in_features;
    d.panel = m.panel(panel);
    d.scale = m.group ? m.scale + scales : nullptr;
    d.zero = m.zero ? m.zero + scales : nullptr;
    d.scale_type = m.scale_type;
    d.scale_bytes = m.scale_bytes();
    d.scale_inputs = m.group ? m.group : m.in_features;
    d.groups = m.in_features / kLevelGroup;
    d.c = c;
    d.c_stride = kBlockStride;
    d.ahead = ahead;
#if defined(ARRIERO_AMX)
    if (block.rows > kDotRows) return tile_dot_panel(m.type, block.rows, d);
#endif
    dot_panel(m.type, block.rows, d);
}

// c = f(c, a number of the column) for a block's sums.
template <class F>
inline void with_columns(const Block& block, const float* numbers, F&& f) {
    for (int half = 0; half < (block.second < 0 ? 1 : 2); ++half) {
        const float* of = numbers + (half ? block.second : block.first) * kPanel;
        const F16 low = load(of), high = load(of + kLanes);
        for (int row = 0; row < block.rows; ++row) {
            float* c = block.c + row * kBlockStride + half * kPanel;
            store(c, f(load(c), low));
            store(c + kLanes, f(load(c + kLanes), high));
        }
    }
}

// Two panels by a block of rows, into c; `fetch`: the two that are multiplied next, or null; `sums`
// of the rows' groups; `stream`: what else is fetched meanwhile.
inline void multiply(const Matrix& m, const Rows& a, bool rounded, Block& block,
                     const char* const (&fetch)[2], const float* sums, Stream& stream) {
    Tile t{};
    t.a = a.data + block.row * a.stride;
    t.a_stride = a.stride;
    t.pairs = m.pairs();
    t.c = block.c;
    t.c_stride = kBlockStride;
    t.group_pairs = m.group ? m.group / 2 : m.pairs();
    t.scale_type = m.scale_type;
    t.group_stride = m.scale_bytes();
    t.sums = sums;
    t.sums_stride = m.groups();
    t.stream = &stream;
    const bool thin = !takes_levels(m) && !by_tiles(rounded) && block.rows <= kThinRows;
    if (thin && block.second >= 0) {
        multiply_thin(m, rounded, block, fetch, t);
    } else {
        const int halves = block.second < 0 ? 1 : 2;
        for (int half = 0; half < halves; ++half) {
            const int64_t panel = half ? block.second : block.first;
            const char* next = !half && block.second >= 0 ? m.panel(block.second) : fetch[0];
            const char* ahead = next ? next : m.panel(panel);
            if (takes_levels(m)) {
                multiply_levels(m, a, block, panel, ahead, t.c + half * kPanel);
                continue;
            }
            Tile own = t;
            own.c += half * kPanel;
            multiply_panel(m, rounded, panel, block.rows, ahead, halves - half, own);
        }
    }
    if (m.group == 0 && m.scale != nullptr) with_columns(block, m.column_scales(), mul);
    if (m.bias != nullptr) with_columns(block, m.bias, add);
}

// What is multiplied next, to be fetched early: two panels, or null.
struct Ahead {
    const char *first = nullptr, *second = nullptr;
};

// y = x Wᵀ (+ bias) for `num_rows` rows, cut into items: blocks of rows by runs of two panels.
// `paired`: panels p and p + half go together (gate and up) instead of 2p and 2p + 1.
class Product {
  public:
    // `wanted`: about so many items, if the rows and panels allow.
    Product(const Matrix& m, const Rows& a, bool rounded, int64_t num_rows, bool paired,
            int64_t wanted)
        : m_(m), a_(a), rounded_(rounded), num_rows_(num_rows), paired_(paired) {
        if (num_rows == 0 || m.panels() == 0) return;
        steps_ = ceil_div(m.panels(), 2);
        row_blocks_ = ceil_div(num_rows, kRowBlock);
        per_block_ = std::min(ceil_div(wanted, row_blocks_), steps_);
        chunk_ = ceil_div(steps_, per_block_);
        per_block_ = ceil_div(steps_, chunk_);
    }

    int items() const { return int(row_blocks_ * per_block_); }

    // Where an item begins.
    Ahead head(int item) const { return panels_of(item % per_block_ * chunk_); }

    // finish(block) once for each block of sums; `after` is fetched meanwhile.
    template <class Finish>
    void run(int item, const Ahead& after, Finish&& finish) const {
        run(item, after, [](const Block&, Stream&) {}, finish);
    }

    // As above; start(block, stream) before each block names what else is fetched meanwhile.
    template <class Start, class Finish>
    void run(int item, const Ahead& after, Start&& start, Finish&& finish) const {
        alignas(64) float c[kRowBlock * kBlockStride];
        const int64_t block = item / per_block_, from = item % per_block_ * chunk_;
        const int64_t row = num_rows_ * block / row_blocks_;
        const int rows = int(num_rows_ * (block + 1) / row_blocks_ - row);
        const int64_t to = std::min(from + chunk_, steps_);
        const float* sums = group_sums(m_, a_, row, rows);
        Stream& stream = fetched;
        for (int64_t step = from; step < to; ++step) {
            const Ahead next = step + 1 < to ? panels_of(step + 1) : after;
            Block out{row, rows, first_of(step), second_of(step), c};
            stream.clear();
            start(out, stream);
            multiply(m_, a_, rounded_, out, {next.first, next.second}, sums, stream);
            finish(out);
        }
        release_tiles();
    }

  private:
    int64_t first_of(int64_t step) const { return paired_ ? step : 2 * step; }
    int64_t second_of(int64_t step) const {
        const int64_t panel = paired_ ? step + m_.panels() / 2 : 2 * step + 1;
        return panel < m_.panels() ? panel : -1;
    }
    Ahead panels_of(int64_t step) const {
        const int64_t second = second_of(step);
        return {m_.panel(first_of(step)), second < 0 ? nullptr : m_.panel(second)};
    }

    const Matrix& m_;
    Rows a_;
    bool rounded_;
    int64_t num_rows_;
    bool paired_;
    int64_t steps_ = 0, row_blocks_ = 0, per_block_ = 1, chunk_ = 1;
};

// Enough items to even out the threads, few enough that counting them costs nothing.
inline int64_t items_wanted(const Worker& worker, int64_t num_rows) {
    return worker.num_threads == 1 ? 1 : worker.num_threads * (num_rows <= kMaxRows ? 12 : 8);
}

// A product as a phase of its own.
template <class Finish>
void product(Worker& worker, const Matrix& m, const Rows& a, bool rounded, int64_t num_rows,
             bool paired, Finish&& finish) {
    const Product work(m, a, rounded, num_rows, paired, items_wanted(worker, num_rows));
    worker.share(work.items(), [&](int item, int next) {
        work.run(item, next < 0 ? Ahead{} : work.head(next), finish);
    });
}

}  // namespace arriero
