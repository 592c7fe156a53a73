// Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2), in one pass over memory: take the loss scale and the clip
// factor out of the gradient, decay, update momentum and parameter, and write the model's copy of it.
#include "common/isa.h"
#include "common/tile.h"
#include "cpu_optim/lion.h"

namespace {

void update(float* __restrict p, const float* __restrict g, float* __restrict m, const dsl_lion_step s, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        const float grad = g[i] * s.grad_scale;
        const float mixed = m[i] + s.one_minus_beta1 * (grad - m[i]);
        const float direction = mixed > 0 ? 1.0f : mixed < 0 ? -1.0f : mixed;  // 0 and NaN stay what they are
        p[i] = p[i] * s.decay - s.lr * direction;
        m[i] += s.one_minus_beta2 * (grad - m[i]);
    }
}

}  // namespace

extern "C" void DSL_NAMED(dsl_lion)(const dsl_tensor* tensors, const dsl_lion_step* step, int64_t begin, int64_t end) {
    for (int64_t start = begin; start < end; start += TILE) {
        const int64_t n = end - start < TILE ? end - start : TILE;
        const Tile param(tensors[0], start, n), grad(tensors[1], start, n), exp_avg(tensors[2], start, n);
        update(param.floats, grad.floats, exp_avg.floats, *step, n);
        param.put_back();
        exp_avg.put_back();
        param.copy_to(tensors[3]);
    }
}
