// Adam and AdamW (Kingma and Ba 2014, arXiv:1412.6980; Loshchilov and Hutter 2017, arXiv:1711.05101), with AMSGrad
// (Reddi et al. 2018), over a list of tensors: one pass that takes the loss scale and the clip factor out of the
// gradient, decays, updates both moments and the parameter, and writes the model's copy of it.
//
// Memory per element: param, both moments (and AMSGrad's maximum) read and written, the gradient read, the copy written.
#include "gpu_optim/gpu_optim.h"
#include "gpu_optim/multi_tensor.h"

namespace dsl {

enum AdamRole { PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ, COPY, STEP, ADAM_ROLES };

// Four blocks on a multiprocessor keep enough loads under way; packs of 8 have no registers for more than two.
template <int PACK>
__global__ void DSL_LAUNCH_BOUNDS(THREADS, PACK == 4 ? 4 : 2)
    adam_kernel(const __grid_constant__ TensorList<ADAM_ROLES> list, const __grid_constant__ dsl_gpu_adam how) {
    if (either(how.on_device.found_inf, 0) != 0) return;
    const Place place = find_place<PACK>(list);
    const View param = view(list, PARAM, place.index), grad = view(list, GRAD, place.index);
    const View exp_avg = view(list, EXP_AVG, place.index), exp_avg_sq = view(list, EXP_AVG_SQ, place.index);
    const View most = view(list, MAX_EXP_AVG_SQ, place.index), copy = view(list, COPY, place.index);

    const float lr = either(how.on_device.lr, how.lr);
    const float grad_scale = how.grad_scale * either(how.on_device.grad_factor, 1);
    const float decay = how.decoupled ? 1 - lr * how.weight_decay : 1, l2 = how.decoupled ? 0 : how.weight_decay;
    const float step = *static_cast<const float*>(list.data[STEP][place.index]);
    const float step_size = how.bias_correction ? lr / -expm1f(step * how.log_beta1) : lr;
    const float inverse_sqrt_correction = how.bias_correction ? 1 / sqrtf(-expm1f(step * how.log_beta2)) : 1;

    for_elements<PACK>(place, [&](auto pack, int64_t i) {
        constexpr int N = decltype(pack)::value;
        const Raw<N> raw_p = fetch<N>(param, i), raw_g = fetch<N>(grad, i), raw_m = fetch<N>(exp_avg, i);
        const Raw<N> raw_v = fetch<N>(exp_avg_sq, i), raw_most = fetch<N>(most, i);
        Floats<N> p = widen(raw_p, param), m = widen(raw_m, exp_avg), v = widen(raw_v, exp_avg_sq);
        Floats<N> v_max = widen(raw_most, most);
        const Floats<N> g = widen(raw_g, grad);
        for (int k = 0; k < N; ++k) {
            float gradient = g.at[k] * grad_scale;
            if (l2 != 0) gradient += l2 * p.at[k];  // 0 times an infinite weight would be NaN
            m.at[k] += how.one_minus_beta1 * (gradient - m.at[k]);
            v.at[k] = how.beta2 * v.at[k] + how.one_minus_beta2 * gradient * gradient;
            float second = v.at[k];
            if (most.data != nullptr) v_max.at[k] = second = second < v_max.at[k] ? v_max.at[k] : second;
            p.at[k] = p.at[k] * decay - step_size * m.at[k] / (sqrtf(second) * inverse_sqrt_correction + how.eps);
        }
        put(p, param, i);
        put(m, exp_avg, i);
        put(v, exp_avg_sq, i);
        put(v_max, most, i);
        put(p, copy, i);
    });
}

}  // namespace dsl

extern "C" int dsl_gpu_adam_update(const dsl_tensor* tensors, const int64_t* numel, int64_t count,
                                   const dsl_gpu_adam* how, void* stream) {
    using namespace dsl;
    return for_each_list<ADAM_ROLES>(
        tensors, numel, count, STEP, [&](auto pack, const auto& list, uint32_t blocks, int64_t) {
            DSL_LAUNCH(adam_kernel<decltype(pack)::value>, blocks, THREADS, stream, list, *how);
        });
}
