// LAMB (You et al. 2019, arXiv:1904.00962) over a list of tensors, in two phases with the norms of whole tensors between
// them: they may be replaced there by the norms of what is spread over several tensors, or ranks. The bias correction
// multiplies the whole step, as in DeepSpeed.
//
// The update u = m / (sqrt(v) + eps) + weight_decay p is not stored: phase two makes it again from p, m and v, which
// costs the same traffic (10 words per element) and no memory.
// Phase one: param and gradient read, both moments read and written. Phase two: param read and written, moments read,
// the copy written.
#include "gpu_optim/gpu_optim.h"
#include "gpu_optim/sum.h"

namespace dsl {

static_assert(sizeof(dsl_gpu_lamb) + 2 * sizeof(void*) <= NUMBER_BYTES, "of all ops this has the most numbers");

enum MomentsRole { PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, MOMENTS_ROLES };
enum ApplyRole { APPLY_PARAM, APPLY_EXP_AVG, APPLY_EXP_AVG_SQ, COPY, STEP, APPLY_ROLES };

__device__ inline float lamb_direction(float p, float m, float v, const dsl_gpu_lamb& how) {
    const float root = how.eps_inside_sqrt ? sqrtf(v + how.eps) : sqrtf(v) + how.eps;
    return how.weight_decay == 0 ? m / root : m / root + how.weight_decay * p;
}

// squares: written, the sum of p^2 for each block of the grid, and after them that of u^2 for each.
template <int PACK>
__global__ void __launch_bounds__(THREADS)
    lamb_moments_kernel(const __grid_constant__ TensorList<MOMENTS_ROLES> list,
                        const __grid_constant__ dsl_gpu_lamb how, float* squares) {
    if (either(how.on_device.found_inf, 0) != 0) return;
    const Place place = find_place<PACK>(list);
    const View param = view(list, PARAM, place.index), grad = view(list, GRAD, place.index);
    const View exp_avg = view(list, EXP_AVG, place.index), exp_avg_sq = view(list, EXP_AVG_SQ, place.index);
    const float grad_scale = how.grad_scale * either(how.on_device.grad_factor, 1);

    float param_square = 0, update_square = 0;
    for_elements<PACK>(place, [&](auto pack, int64_t i) {
        constexpr int N = decltype(pack)::value;
        const Raw<N> raw_p = fetch<N>(param, i), raw_g = fetch<N>(grad, i);
        const Raw<N> raw_m = fetch<N>(exp_avg, i), raw_v = fetch<N>(exp_avg_sq, i);
        const Floats<N> p = widen(raw_p, param), g = widen(raw_g, grad);
        Floats<N> m = widen(raw_m, exp_avg), v = widen(raw_v, exp_avg_sq);
        for (int k = 0; k < N; ++k) {
            const float gradient = g.at[k] * grad_scale;
            m.at[k] += how.one_minus_beta1 * (gradient - m.at[k]);
            v.at[k] = how.beta2 * v.at[k] + how.one_minus_beta2 * gradient * gradient;
            const float u = lamb_direction(p.at[k], m.at[k], v.at[k], how);
            param_square += p.at[k] * p.at[k];
            update_square += u * u;
        }
        put(m, exp_avg, i);
        put(v, exp_avg_sq, i);
    });
    param_square = sum_over_block(param_square);
    update_square = sum_over_block(update_square);
    if (threadIdx.x == 0) {
        squares[blockIdx.x] = param_square;
        squares[blockIdx.x + gridDim.x] = update_square;
    }
}

// norms: read, |p| of each tensor of the list, and |u| at `stride` floats from there. 0 stands for ratio 1.
template <int PACK>
__global__ void __launch_bounds__(THREADS)
    lamb_apply_kernel(const __grid_constant__ TensorList<APPLY_ROLES> list, const __grid_constant__ dsl_gpu_lamb how,
                      const float* norms, int64_t stride) {
    if (either(how.on_device.found_inf, 0) != 0) return;
    const Place place = find_place<PACK>(list);
    const View param = view(list, APPLY_PARAM, place.index), copy = view(list, COPY, place.index);
    const View exp_avg = view(list, APPLY_EXP_AVG, place.index);
    const View exp_avg_sq = view(list, APPLY_EXP_AVG_SQ, place.index);

    float rate = either(how.on_device.lr, how.lr);
    if (how.bias_correction) {
        const float step = *static_cast<const float*>(list.data[STEP][place.index]);
        rate *= sqrtf(-expm1f(step * how.log_beta2)) / -expm1f(step * how.log_beta1);
    }
    const float param_norm = norms[place.index], update_norm = norms[place.index + stride];
    if (param_norm > 0 && update_norm > 0) {
        const float ratio = param_norm / update_norm;
        rate *= ratio < how.min_coeff ? how.min_coeff : ratio > how.max_coeff ? how.max_coeff : ratio;
    }
    for_elements<PACK>(place, [&](auto pack, int64_t i) {
        constexpr int N = decltype(pack)::value;
        const Raw<N> raw_p = fetch<N>(param, i), raw_m = fetch<N>(exp_avg, i), raw_v = fetch<N>(exp_avg_sq, i);
        Floats<N> p = widen(raw_p, param);
        const Floats<N> m = widen(raw_m, exp_avg), v = widen(raw_v, exp_avg_sq);
        for (int k = 0; k < N; ++k) p.at[k] -= rate * lamb_direction(p.at[k], m.at[k], v.at[k], how);
        put(p, param, i);
        put(p, copy, i);
    });
}

}  // namespace dsl

extern "C" int dsl_gpu_lamb_moments(const dsl_tensor* tensors, const int64_t* numel, int64_t count,
                                    const dsl_gpu_lamb* how, float* partials, float* norms, void* stream) {
    using namespace dsl;
    return for_each_list<MOMENTS_ROLES>(
        tensors, numel, count, MOMENTS_ROLES, [&](auto pack, const auto& list, uint32_t blocks, int64_t first) {
            DSL_LAUNCH(lamb_moments_kernel<decltype(pack)::value>, blocks, THREADS, stream, list, *how, partials);
            for (int64_t which = 0; which < 2; ++which) {
                DSL_LAUNCH(norm_kernel<MOMENTS_ROLES>, list.count, THREADS, stream, list, partials + which * blocks,
                           norms + which * count + first, how->on_device.found_inf);
            }
        });
}

extern "C" int dsl_gpu_lamb_apply(const dsl_tensor* tensors, const int64_t* numel, int64_t count,
                                  const dsl_gpu_lamb* how, const float* norms, void* stream) {
    using namespace dsl;
    return for_each_list<APPLY_ROLES>(tensors, numel, count, STEP,
                                      [&](auto pack, const auto& list, uint32_t blocks, int64_t first) {
                                          DSL_LAUNCH(lamb_apply_kernel<decltype(pack)::value>, blocks, THREADS, stream,
                                                     list, *how, norms + first, count);
                                      });
}
