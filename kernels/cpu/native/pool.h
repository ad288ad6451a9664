// A few threads that walk through the same phases, and share out each phase's items.
//
// Knows threads and counters; knows nothing of what an item is.
//
// A phase ends when all of its items are done, not when all threads have come by: a thread that
// the system has put aside (the gateway and the scheduler share these cores) holds up the others
// only while it is inside an item, and one that wakes late finds its phases done and runs on.
#pragma once

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace arriero {

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spin a little, then let others run, then sleep in short naps: never burn a core for long.
class Waiter {
  public:
    void wait() {
        ++turns_;
        if (turns_ < kSpins) {
            relax();
        } else if (turns_ < kSpins + kYields) {
            std::this_thread::yield();
        } else {
            std::this_thread::sleep_for(std::chrono::microseconds(50));
        }
    }

  private:
    static constexpr int kSpins = 2000, kYields = 200;
    int turns_ = 0;
};

struct alignas(64) PhaseCounter {
    std::atomic<int> claimed{0};
    std::atomic<int> done{0};
};

// One thread's walk through the phases of one region.
struct Worker {
    PhaseCounter* phases;
    int thread;
    int num_threads;

    // Run f(item, next) for each item; `next` is the item this thread does after, or -1, so that
    // its operands can be fetched early. Returns once every item is done, whoever did it.
    template <class F>
    void share(int items, F&& f) {
        if (num_threads == 1) {
            for (int i = 0; i < items; ++i) f(i, i + 1 < items ? i + 1 : -1);
            return;
        }
        PhaseCounter& phase = *phases++;
        if (phase.done.load(std::memory_order_acquire) == items) return;
        int item = phase.claimed.fetch_add(1, std::memory_order_relaxed);
        while (item < items) {
            int next = phase.claimed.fetch_add(1, std::memory_order_relaxed);
            f(item, next < items ? next : -1);
            phase.done.fetch_add(1, std::memory_order_acq_rel);
            item = next;
        }
        Waiter waiter;
        while (phase.done.load(std::memory_order_acquire) != items) waiter.wait();
    }

    // From inside an item of `share`: wait until the first `items` items are done. These must not
    // wait, and every other item of the phase must.
    void await(int items) {
        if (num_threads == 1) return;
        Waiter waiter;
        while (phases[-1].done.load(std::memory_order_acquire) < items) waiter.wait();
    }
};

class Pool {
  public:
    explicit Pool(int num_threads) : num_threads_(num_threads), process_(getpid()) { start(); }

    ~Pool() {
        if (process_ != getpid()) {  // the threads were left behind by a fork
            for (auto& thread : threads_) thread.release();
            return;
        }
        stop_.store(true);
        epoch_.fetch_add(2);
        epoch_.notify_all();
        for (auto& thread : threads_) thread->join();
    }

    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int num_threads() const { return num_threads_; }

    // Run f(worker) on all threads; `num_phases` is at least the number of `share` calls in it.
    template <class F>
    void run(int num_phases, F&& f) {
        revive();
        std::lock_guard<std::mutex> lock(*busy_);
        if (num_threads_ > 1) {
            if (int(phases_.size()) < num_phases) phases_ = std::vector<PhaseCounter>(num_phases);
            for (int i = 0; i < num_phases; ++i) {
                phases_[i].claimed.store(0, std::memory_order_relaxed);
                phases_[i].done.store(0, std::memory_order_relaxed);
            }
        }
        context_ = &f;
        call_ = [](void* context, Worker worker) { (*static_cast<F*>(context))(worker); };
        if (num_threads_ == 1) {
            f(Worker{nullptr, 0, 1});
            return;
        }
        epoch_.fetch_add(1);  // odd: open
        epoch_.notify_all();
        f(Worker{phases_.data(), 0, num_threads_});
        epoch_.fetch_add(1);  // even: closed; who comes now finds it so and leaves
        Waiter waiter;
        while (active_.load() != 0) waiter.wait();
    }

  private:
    // Threads do not survive a fork: the child starts its own on first use.
    void revive() {
        if (process_ == getpid()) return;
        process_ = getpid();
        for (auto& thread : threads_) thread.release();
        threads_.clear();
        (void)busy_.release();  // may have been held by a thread that is not here
        busy_ = std::make_unique<std::mutex>();
        active_.store(0);
        epoch_.store(0);
        start();
    }

    void start() {
        for (int i = 1; i < num_threads_; ++i)
            threads_.push_back(std::make_unique<std::thread>([this, i] { serve(i); }));
    }

    void serve(int thread) {
        uint32_t seen = 0;
        while (true) {
            uint32_t epoch = epoch_.load();
            for (int i = 0; epoch == seen || epoch % 2 == 0; ++i) {
                if (stop_.load()) return;
                if (i < kIdleSpins) {
                    relax();
                } else {
                    epoch_.wait(epoch);
                }
                epoch = epoch_.load();
            }
            if (stop_.load()) return;
            active_.fetch_add(1);
            if (epoch_.load() == epoch) call_(context_, Worker{phases_.data(), thread, num_threads_});
            active_.fetch_sub(1);
            seen = epoch;
        }
    }

    static constexpr int kIdleSpins = 1000;  // some 20 microseconds between two calls of a step

    int num_threads_;
    pid_t process_;
    std::vector<std::unique_ptr<std::thread>> threads_;
    std::unique_ptr<std::mutex> busy_ = std::make_unique<std::mutex>();
    std::vector<PhaseCounter> phases_;
    std::atomic<uint32_t> epoch_{0};
    std::atomic<int> active_{0};
    std::atomic<bool> stop_{false};
    void* context_ = nullptr;
    void (*call_)(void*, Worker) = nullptr;
};

}  // namespace arriero
