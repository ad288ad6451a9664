// The MLP half of a layer with routed experts: router, shared expert, and the experts held here.
//
// Knows which token goes to which expert, and in which phases that happens; knows nothing of other
// ranks.
//
// Same tokens: every product's row sums as in a batch of one, and a token adds its experts' rows in
// the order of its choices.
#pragma once

#include "decoder.h"

namespace arriero {

// The C struct that Python fills: what a layer has beside its shared expert.
struct Experts {
    Matrix router;                 // a row for each of the model's experts
    const Matrix* const* gate_up;  // of the experts held here, all of one shape and type
    const Matrix* const* down;
    int64_t first, held;  // global number of the first, and how many
    int32_t top_k;

    const Matrix& opening() const { return *gate_up[0]; }
    const Matrix& closing() const { return *down[0]; }
};

inline bool round_inputs(const Matrix* const* matrices, int64_t count, bool exact) {
    return std::all_of(matrices, matrices + count,
                       [&](const Matrix* m) { return rounds_inputs(*m, exact); });
}

// Rows in runs, each times a matrix of its own, as the items of one phase. Made in two parts:
// `count_items` once, by one thread; the object by each, after that.
class Runs {
  public:
    // items[e + 1] - items[e]: of run e, whose rows are starts[e] .. starts[e + 1].
    static void count_items(const Matrix* const* matrices, int64_t count, const int32_t* starts,
                            bool paired, int num_threads, int32_t* items) {
        items[0] = 0;
        const int64_t wanted = wanted_of(count, starts, num_threads);
        for (int64_t e = 0; e < count; ++e)
            items[e + 1] = items[e] + Product(*matrices[e], Rows{}, false,
                                              starts[e + 1] - starts[e], paired, wanted)
                                          .items();
    }

    Runs(const Matrix* const* matrices, int64_t count, const int32_t* starts, const int32_t* items,
         const Rows& a, bool rounded, bool paired, int num_threads)
        : matrices_(matrices), count_(count), starts_(starts), items_(items), a_(a),
          rounded_(rounded), paired_(paired), wanted_(wanted_of(count, starts, num_threads)) {}

    // finish(block, first row of the run) for each block of sums.
    template <class Finish>
    void share(Worker& worker, Finish&& finish) const {
        worker.share(items_[count_], [&](int item, int next) {
            const int64_t e = run_of(item);
            Ahead after;
            if (next >= 0) {
                const int64_t then = run_of(next);
                after = product_of(then).head(next - items_[then]);
            }
            product_of(e).run(item - items_[e], after,
                              [&](const Block& b) { finish(b, int64_t(starts_[e])); });
        });
    }

  private:
    static int64_t wanted_of(int64_t count, const int32_t* starts, int num_threads) {
        int64_t busy = 0;
        for (int64_t e = 0; e < count; ++e) busy += starts[e + 1] > starts[e];
        return num_threads == 1 ? 1 : ceil_div(24 * num_threads, std::max<int64_t>(busy, 1));
    }
    int64_t run_of(int item) const {
        return std::upper_bound(items_, items_ + count_ + 1, item) - items_ - 1;
    }
    Product product_of(int64_t e) const {
        return Product(*matrices_[e], Rows{a_.data + starts_[e] * a_.stride, a_.stride}, rounded_,
                       starts_[e + 1] - starts_[e], paired_, wanted_);
    }

    const Matrix* const* matrices_;
    int64_t count_;
    const int32_t *starts_, *items_;
    Rows a_;
    bool rounded_, paired_;
    int64_t wanted_;
};

// Where a layer's tokens go. A thread that comes late must count the items of phases that are done
// as others did, and these follow from the routing: so each layer of a region has its own.
// A pair is a token's choice: token * top_k + choice.
struct Routes {
    float* score;     // [pair]
    int32_t* expert;  // [pair], global
    int32_t* row;     // [pair], among the rows sorted by expert and then token; -1: not held here
    int32_t* pair;    // [row]
    int32_t *starts, *opening_items, *closing_items;  // [held + 1]

    static int64_t bytes(const Experts& experts, int64_t tokens) {
        return ceil_div((tokens * experts.top_k * 4 + (experts.held + 1) * 3) * 4, 64) * 64;
    }
    Routes(char* memory, const Experts& experts, int64_t tokens) {
        const int64_t pairs = tokens * experts.top_k, ends = experts.held + 1;
        score = reinterpret_cast<float*>(memory);
        expert = reinterpret_cast<int32_t*>(memory) + pairs;
        row = expert + pairs;
        pair = row + pairs;
        starts = pair + pairs;
        opening_items = starts + ends;
        closing_items = opening_items + ends;
    }

    // A token's experts: the greatest logits, the lower number first of equal ones.
    void choose(const Experts& experts, int64_t token, const float* logits) {
        int32_t* chosen = expert + token * experts.top_k;
        for (int k = 0; k < experts.top_k; ++k) {
            int32_t best = -1;
            for (int32_t e = 0; e < experts.router.out_features; ++e) {
                if (best >= 0 && !(logits[e] > logits[best])) continue;
                if (std::find(chosen, chosen + k, e) == chosen + k) best = e;
            }
            chosen[k] = best;
            score[token * experts.top_k + k] = 1.0f / (1.0f + std::exp(-logits[best]));
        }
    }

    void order(const Experts& experts, int64_t tokens, bool paired, int num_threads) {
        const int64_t pairs = tokens * experts.top_k;
        std::fill(starts, starts + experts.held + 1, 0);
        auto held = [&](int64_t p) {
            const int64_t e = expert[p] - experts.first;
            return e >= 0 && e < experts.held ? e : -1;
        };
        for (int64_t p = 0; p < pairs; ++p)
            if (held(p) >= 0) ++starts[held(p) + 1];
        for (int64_t e = 0; e < experts.held; ++e) starts[e + 1] += starts[e];
        int32_t* next = opening_items;
        std::copy(starts, starts + experts.held, next);
        for (int64_t p = 0; p < pairs; ++p) {
            const int64_t e = held(p);
            row[p] = e < 0 ? -1 : next[e]++;
            if (e >= 0) pair[row[p]] = int32_t(p);
        }
        Runs::count_items(experts.gate_up, experts.held, starts, paired, num_threads,
                          opening_items);
        Runs::count_items(experts.down, experts.held, starts, false, num_threads, closing_items);
    }
};

// MLP half of a layer with experts: adds to `x`, or writes the partial sum to `part` when that is
// given. `memory`: of the layer's own Routes.
inline void moe_block(Machine& machine, Worker& worker, const Layer& layer, int64_t tokens,
                      float* x, float* part, char* memory) {
    const Experts& experts = *layer.experts;
    const Matrix &up = experts.opening(), &down = experts.closing();
    const int64_t hidden = layer.gate_up.in_features, held = experts.held;
    const int64_t expert_size = down.in_features;
    const int64_t width = experts.router.columns(), threads = worker.num_threads;
    const bool exact = machine.exact, paired = expert_size % kPanel == 0;
    const bool rounded_up = round_inputs(experts.gate_up, held, exact);
    const bool rounded_down = round_inputs(experts.down, held, exact);
    Routes routes(memory, experts, tokens);

    // Norm: as the shared expert and the router want it, and in float32 for the experts.
    const bool own = tokens <= kOwnRows;
    const int64_t stride = row_stride(layer.gate_up);
    char* room = own ? machine.own[worker.thread].room(2 * stride * tokens)
                     : machine.normed.room(0);
    const Rows exact_rows{room, stride}, rounded_rows{room + stride * tokens, stride};
    auto inputs_of = [&](const Matrix& m) {
        return rounds_inputs(m, exact) ? rounded_rows : exact_rows;
    };
    auto norm = [&](int64_t row) {
        rms_norm_row(x + row * hidden, layer.mlp_norm, layer.eps, hidden, [&](int64_t at, F16 v) {
            store_inputs(exact_rows, false, row, at, v);
            store_inputs(rounded_rows, true, row, at, v);
        });
        round_row(layer.gate_up, exact_rows, row);
    };
    if (own)
        for (int64_t row = 0; row < tokens; ++row) norm(row);
    else
        share_rows(worker, tokens, norm);

    // Router, and the shared expert's first product.
    float* logits = reinterpret_cast<float*>(machine.logits.room(0));
    const Rows mixed{machine.hidden.room(0), row_stride(layer.down)};
    const bool rounded = rounds_inputs(layer.down, exact);
    const Product router(experts.router, inputs_of(experts.router),
                         rounds_inputs(experts.router, exact), tokens, false, threads);
    const GatedSums shared_sums{machine, layer.gate_up, layer.down, mixed, rounded};
    const Product open(layer.gate_up, inputs_of(layer.gate_up), rounds_inputs(layer.gate_up, exact),
                       tokens, shared_sums.paired(), items_wanted(worker, tokens));
    const int routers = router.items();
    auto head = [&](int item) {
        if (item < 0) return Ahead{};
        return item < routers ? router.head(item) : open.head(item - routers);
    };
    worker.share(routers + open.items(), [&](int item, int next) {
        if (item < routers)
            router.run(item, head(next),
                       [&](const Block& b) { put_block<false>(b, logits, width, width); });
        else
            open.run(item - routers, head(next),
                     [&](const Block& b) { shared_sums.put(b, 0); });
    });
    shared_sums.finish(worker, tokens);

    // Who goes where, and what the experts are given: the normed row times its score.
    const Rows scaled{machine.scaled.room(0), row_stride(up)};
    auto scale = [&](int64_t row) {
        const int64_t pair = routes.pair[row];
        const float* from = exact_rows.floats(pair / experts.top_k);
        const F16 score = set1(routes.score[pair]);
        for (int64_t i = 0; i < hidden; i += kLanes)
            store_inputs(scaled, rounded_up, row, i, mul(load(from + i), score));
        round_row(up, scaled, row);
    };
    auto choose = [&](int64_t token) { routes.choose(experts, token, logits + token * width); };
    if (!own) share_rows(worker, tokens, choose);
    // Ordering is one thread's work; the others have the shared expert's last product meanwhile.
    float* shared = reinterpret_cast<float*>(machine.shared.room(0));
    const Product close(layer.down, mixed, rounded, tokens, false, items_wanted(worker, tokens));
    worker.share(1 + close.items(), [&](int item, int next) {
        if (item > 0) {
            close.run(item - 1, next < 0 ? Ahead{} : close.head(next - 1),
                      [&](const Block& b) { put_block<false>(b, shared, hidden, hidden); });
            return;
        }
        if (own)
            for (int64_t token = 0; token < tokens; ++token) choose(token);
        routes.order(experts, tokens, paired, worker.num_threads);
        if (own)
            for (int64_t row = 0; row < routes.starts[held]; ++row) scale(row);
    });
    if (!own) share_rows(worker, routes.starts[held], scale);

    // The experts.
    const Rows gated{machine.gated.room(0), row_stride(down)};
    const GatedSums sums{machine, up, down, gated, rounded_down};
    Runs(experts.gate_up, held, routes.starts, routes.opening_items, scaled, rounded_up, paired,
         worker.num_threads)
        .share(worker, [&](const Block& b, int64_t first) { sums.put(b, first); });
    sums.finish(worker, routes.starts[held]);
    float* routed = reinterpret_cast<float*>(machine.routed.room(0));
    Runs(experts.down, held, routes.starts, routes.closing_items, gated, rounded_down, false,
         worker.num_threads)
        .share(worker, [&](const Block& b, int64_t first) {
            put_block<false>(b, routed + first * hidden, hidden, hidden);
        });

    share_rows(worker, tokens, [&](int64_t token) {
        const int32_t* rows = routes.row + token * experts.top_k;
        const float* from = shared + token * hidden;
        float* to = (part != nullptr ? part : x) + token * hidden;
        for (int64_t i = 0; i < hidden; i += kLanes) {
            const int n = int(std::min<int64_t>(kLanes, hidden - i));
            F16 sum = zero();
            for (int k = 0; k < experts.top_k; ++k)
                if (rows[k] >= 0) sum = add(sum, load_n(routed + rows[k] * hidden + i, n));
            sum = add(load_n(from + i, n), sum);
            store_n(to + i, part != nullptr ? sum : add(load_n(to + i, n), sum), n);
        }
    });
}

// Room for all that the block keeps between phases, but the layers' Routes.
inline void make_moe_room(Machine& machine, const Layer& layer, int64_t tokens) {
    const Experts& experts = *layer.experts;
    const int64_t hidden = layer.gate_up.in_features, pairs = tokens * experts.top_k;
    machine.normed.room(2 * row_stride(layer.gate_up) * tokens);
    machine.logits.room(experts.router.columns() * tokens * 4);
    machine.scaled.room(row_stride(experts.opening()) * pairs);
    machine.shared.room(hidden * tokens * 4);
    machine.routed.room(hidden * pairs * 4);
    make_gated_room(machine, machine.hidden, layer.down, tokens);
    make_gated_room(machine, machine.gated, experts.closing(), pairs);
}

}  // namespace arriero
