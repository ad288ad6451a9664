// The most that this machine can do, for benchmarks: bytes read, products added.
//
// Knows the instructions that the kernels live on; knows nothing of matrices.
#pragma once

#include <vector>

#include "amx.h"
#include "pool.h"
#include "simd.h"

namespace arriero {

// Read every byte once, by all threads; what is returned only keeps the reads alive.
inline float read_once(Pool& pool, const char* data, int64_t bytes) {
    constexpr int64_t kChunk = 1 << 16;
    std::vector<float> found(size_t(pool.num_threads()) * kLanes);
    pool.run(1, [&](Worker worker) {
        F16 a = zero(), b = zero();
        worker.share(int(bytes / kChunk), [&](int item, int) {
            const char* from = data + item * kChunk;
            for (int64_t i = 0; i < kChunk; i += 2 * 64) {
                __builtin_prefetch(from + i + 2048, 0, 2);
                __builtin_prefetch(from + i + 2112, 0, 2);
                a = max(a, load(reinterpret_cast<const float*>(from + i)));
                b = max(b, load(reinterpret_cast<const float*>(from + i + 64)));
            }
        });
        store(&found[size_t(worker.thread) * kLanes], max(a, b));
    });
    return found[0];
}

// Products and sums in registers, enough of them side by side to hide their latency; returns the
// number of operations. `pairs`: of bf16 pairs, where the instruction is there.
inline double multiply_only(Pool& pool, int64_t rounds, [[maybe_unused]] bool pairs) {
#if defined(ARRIERO_AVX512)
    constexpr int kSums = 24;
#else
    constexpr int kSums = 6;
#endif
    double each = 2.0 * kLanes;
    std::vector<float> found(size_t(pool.num_threads()) * kLanes);
    const int items = pool.num_threads() * 8;
#if defined(ARRIERO_AMX)
    if (pairs) {
        std::atomic<double> operations{0.0};
        pool.run(1, [&](Worker worker) {
            worker.share(items, [&](int, int) { operations += multiply_tiles(rounds); });
        });
        return operations;
    }
#endif
#if defined(ARRIERO_BF16)
    if (pairs) each *= 2.0;
#endif
    pool.run(1, [&](Worker worker) {
        F16 sums[kSums];
        for (F16& sum : sums) sum = zero();
        worker.share(items, [&](int item, int) {
            const F16 x = set1(float(item));
            for (int64_t i = 0; i < rounds; ++i) {
#if defined(ARRIERO_BF16)
                if (pairs) {
#pragma GCC unroll 24
                    for (int k = 0; k < kSums; ++k)
                        sums[k] = _mm512_dpbf16_ps(sums[k], (__m512bh)x, (__m512bh)x);
                    continue;
                }
#endif
#pragma GCC unroll 24
                for (int k = 0; k < kSums; ++k) sums[k] = fma(x, x, sums[k]);
            }
        });
        F16 total = zero();
        for (F16& sum : sums) total = add(total, sum);
        store(&found[size_t(worker.thread) * kLanes], total);
    });
    return each * kSums * double(rounds) * items;
}

}  // namespace arriero
