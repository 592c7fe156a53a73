// Adagrad (Duchi, Hazan, Singer 2011, JMLR 12) in one pass over memory: take the loss scale and the clip factor out of
// the gradient, add the weight decay, sum up its square, move, and write the model's copy.
#include <cmath>

#include "common/isa.h"
#include "common/tile.h"
#include "cpu_optim/adagrad.h"

namespace {

void update(float* __restrict p, const float* __restrict g, float* __restrict sum, const dsl_adagrad_step s,
            int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        const float scaled = g[i] * s.grad_scale;
        const float grad = s.l2 == 0 ? scaled : scaled + s.l2 * p[i];  // 0 times an infinite weight would be NaN
        sum[i] += grad * grad;
        p[i] -= s.lr * grad / (std::sqrt(sum[i]) + s.eps);
    }
}

}  // namespace

extern "C" void DSL_NAMED(dsl_adagrad)(const dsl_adagrad_run* run, const dsl_adagrad_step* step, int64_t begin,
                                       int64_t end) {
    for (int64_t start = begin; start < end; start += TILE) {
        const int64_t n = end - start < TILE ? end - start : TILE;
        const Tile param(run->param, start, n), grad(run->grad, start, n), sum(run->sum, start, n);
        update(param.floats, grad.floats, sum.floats, *step, n);
        param.put_back();
        sum.put_back();
        param.copy_to(run->copy);
    }
}
