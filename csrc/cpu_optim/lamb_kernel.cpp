// LAMB (You et al. 2019, arXiv:1904.00962) in two passes over memory, with the norms of whole tensors between them.
#include <cmath>

#include "common/isa.h"
#include "common/tile.h"
#include "cpu_optim/lamb.h"

namespace {

// u = m / (sqrt(v) + eps) + weight_decay p, for a tile.
void direction(float* __restrict u, const float* __restrict p, const float* __restrict m, const float* __restrict v,
               const dsl_lamb_step s, int64_t n) {
    const float inside = s.eps_inside_sqrt ? s.eps : 0, outside = s.eps_inside_sqrt ? 0 : s.eps;
    for (int64_t i = 0; i < n; ++i) {
        const float adam = m[i] / (std::sqrt(v[i] + inside) + outside);
        u[i] = s.weight_decay == 0 ? adam : adam + s.weight_decay * p[i];
    }
}

void advance(const float* __restrict g, float* __restrict m, float* __restrict v, const dsl_lamb_step s, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        const float grad = g[i] * s.grad_scale;
        m[i] += s.one_minus_beta1 * (grad - m[i]);
        v[i] = s.beta2 * v[i] + s.one_minus_beta2 * grad * grad;
    }
}

void subtract(float* __restrict p, const float* __restrict u, float rate, int64_t n) {
    for (int64_t i = 0; i < n; ++i) p[i] -= rate * u[i];
}

}  // namespace

extern "C" void DSL_NAMED(dsl_lamb_moments)(const dsl_tensor* tensors, const dsl_lamb_step* step, int64_t begin,
                                            int64_t end, double* squares) {
    for (int64_t start = begin; start < end; start += TILE) {
        const int64_t n = end - start < TILE ? end - start : TILE;
        const Tile param(tensors[0], start, n), grad(tensors[1], start, n);
        const Tile exp_avg(tensors[2], start, n), exp_avg_sq(tensors[3], start, n);
        alignas(64) float update[TILE];
        advance(grad.floats, exp_avg.floats, exp_avg_sq.floats, *step, n);
        direction(update, param.floats, exp_avg.floats, exp_avg_sq.floats, *step, n);
        squares[0] += sum_of_squares(param.floats, n);
        squares[1] += sum_of_squares(update, n);
        exp_avg.put_back();
        exp_avg_sq.put_back();
    }
}

extern "C" void DSL_NAMED(dsl_lamb_apply)(const dsl_tensor* tensors, const dsl_lamb_step* step, int64_t begin,
                                          int64_t end, float rate) {
    for (int64_t start = begin; start < end; start += TILE) {
        const int64_t n = end - start < TILE ? end - start : TILE;
        const Tile param(tensors[0], start, n), exp_avg(tensors[1], start, n), exp_avg_sq(tensors[2], start, n);
        alignas(64) float update[TILE];
        direction(update, param.floats, exp_avg.floats, exp_avg_sq.floats, *step, n);
        subtract(param.floats, update, rate, n);
        param.put_back();
        param.copy_to(tensors[3]);
    }
}
