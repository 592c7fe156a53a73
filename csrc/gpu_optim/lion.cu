// Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2) over a list of tensors, with the loss scale and the clip factor
// taken out of the gradient and the model's copy written in the same pass.
//
// Memory per element: param and momentum read and written, the gradient read, the copy written.
#include "gpu_optim/gpu_optim.h"
#include "gpu_optim/multi_tensor.h"

namespace dsl {

enum LionRole { PARAM, GRAD, EXP_AVG, COPY, LION_ROLES };

template <int PACK>
__global__ void __launch_bounds__(THREADS)
    lion_kernel(const __grid_constant__ TensorList<LION_ROLES> list, const __grid_constant__ dsl_gpu_lion how) {
    if (either(how.on_device.found_inf, 0) != 0) return;
    const Place place = find_place<PACK>(list);
    const View param = view(list, PARAM, place.index), grad = view(list, GRAD, place.index);
    const View exp_avg = view(list, EXP_AVG, place.index), copy = view(list, COPY, place.index);
    const float lr = either(how.on_device.lr, how.lr), decay = 1 - lr * how.weight_decay;
    const float grad_scale = how.grad_scale * either(how.on_device.grad_factor, 1);

    for_elements<PACK>(place, [&](auto pack, int64_t i) {
        constexpr int N = decltype(pack)::value;
        const Raw<N> raw_p = fetch<N>(param, i), raw_g = fetch<N>(grad, i), raw_m = fetch<N>(exp_avg, i);
        Floats<N> p = widen(raw_p, param), m = widen(raw_m, exp_avg);
        const Floats<N> g = widen(raw_g, grad);
        for (int k = 0; k < N; ++k) {
            const float gradient = g.at[k] * grad_scale;
            const float mixed = m.at[k] + how.one_minus_beta1 * (gradient - m.at[k]);
            const float direction = mixed > 0 ? 1.0f : mixed < 0 ? -1.0f : mixed;  // 0 and NaN stay what they are
            p.at[k] = p.at[k] * decay - lr * direction;
            m.at[k] += how.one_minus_beta2 * (gradient - m.at[k]);
        }
        put(p, param, i);
        put(m, exp_avg, i);
        put(p, copy, i);
    });
}

}  // namespace dsl

extern "C" int dsl_gpu_lion_update(const dsl_tensor* tensors, const int64_t* numel, int64_t count,
                                   const dsl_gpu_lion* how, void* stream) {
    using namespace dsl;
    return for_each_list<LION_ROLES>(
        tensors, numel, count, LION_ROLES, [&](auto pack, const auto& list, uint32_t blocks, int64_t) {
            DSL_LAUNCH(lion_kernel<decltype(pack)::value>, blocks, THREADS, stream, list, *how);
        });
}
