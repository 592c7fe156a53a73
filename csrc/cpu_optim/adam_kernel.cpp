// Adam and AdamW (Kingma and Ba 2014, arXiv:1412.6980; Loshchilov and Hutter 2017, arXiv:1711.05101), with AMSGrad
// (Reddi et al. 2018), in one pass over memory: take the loss scale and the clip factor out of the gradient, decay,
// update both moments and the parameter, and write the model's copy of it.
#include <cmath>

#include "common/isa.h"
#include "common/tile.h"
#include "cpu_optim/adam.h"

namespace {

template <bool AMSGRAD>
void update(float* __restrict p, const float* __restrict g, float* __restrict m, float* __restrict v,
            float* __restrict v_max, const dsl_adam_step s, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        const float scaled = g[i] * s.grad_scale;
        const float grad = s.l2 == 0 ? scaled : scaled + s.l2 * p[i];  // 0 times an infinite weight would be NaN
        const float first = m[i] + s.one_minus_beta1 * (grad - m[i]);
        float second = s.beta2 * v[i] + s.one_minus_beta2 * grad * grad;
        m[i] = first;
        v[i] = second;
        if (AMSGRAD) v_max[i] = second = second < v_max[i] ? v_max[i] : second;  // NaN stays NaN
        p[i] = p[i] * s.decay - s.step_size * first / (std::sqrt(second) * s.inverse_sqrt_correction + s.eps);
    }
}

}  // namespace

extern "C" void DSL_NAMED(dsl_adam)(const dsl_adam_run* run, const dsl_adam_step* step, int64_t begin, int64_t end) {
    for (int64_t start = begin; start < end; start += TILE) {
        const int64_t n = end - start < TILE ? end - start : TILE;
        const Tile param(run->param, start, n), grad(run->grad, start, n);
        const Tile exp_avg(run->exp_avg, start, n), exp_avg_sq(run->exp_avg_sq, start, n);
        const Tile max_exp_avg_sq(run->max_exp_avg_sq, start, n);
        const auto rule = max_exp_avg_sq.floats == nullptr ? update<false> : update<true>;
        rule(param.floats, grad.floats, exp_avg.floats, exp_avg_sq.floats, max_exp_avg_sq.floats, *step, n);
        param.put_back();
        exp_avg.put_back();
        exp_avg_sq.put_back();
        if (max_exp_avg_sq.floats != nullptr) max_exp_avg_sq.put_back();
        param.copy_to(run->copy);
    }
}
