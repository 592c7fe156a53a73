// The GPU kernels' C ABI: what bindings (and tests, through ctypes) call. No function waits for the device.
//
// `tensors` holds (count, roles) entries, the roles in the order that each function names; `numel` has the number of
// elements of each of the `count` tensors. Data may begin anywhere; an absent tensor (named in brackets) is null.
// Numbers that may be known on the device alone are pointers to one float there, or null: a captured CUDA graph reads
// them anew in each replay. Where `found_inf` points to anything but 0 an update does nothing.
// Returns 0, or the error code of the runtime.
#pragma once

#include <cstdint>

#include "common/tensor.h"

// Elements of a tensor that one block of threads takes; norms need scratch for each block.
constexpr int64_t DSL_GPU_BLOCK_NUMEL = 4096;

struct dsl_on_device {
    const float* lr;           // instead of the lr given
    const float* grad_factor;  // multiplies the gradients, as grad_scale does
    const float* found_inf;
};

struct dsl_gpu_adam {
    dsl_on_device on_device;
    float lr, grad_scale, beta2, one_minus_beta1, one_minus_beta2;
    float log_beta1, log_beta2;  // 1 - beta^t is -expm1(t log(beta)): exact where t is small
    float eps, weight_decay;
    int32_t decoupled, bias_correction;
};

struct dsl_gpu_lion {
    dsl_on_device on_device;
    float lr, grad_scale, one_minus_beta1, one_minus_beta2, weight_decay;
};

struct dsl_gpu_lamb {
    dsl_on_device on_device;
    float lr, grad_scale, beta2, one_minus_beta1, one_minus_beta2;
    float log_beta1, log_beta2;
    float eps, weight_decay, min_coeff, max_coeff;
    int32_t eps_inside_sqrt, bias_correction;
};

extern "C" {

// Roles: param, grad, exp_avg, exp_avg_sq, [max_exp_avg_sq], [copy], step (one fp32 on the device).
int dsl_gpu_adam_update(const dsl_tensor* tensors, const int64_t* numel, int64_t count, const dsl_gpu_adam* how,
                        void* stream);

// Roles: param, grad, exp_avg, [copy].
int dsl_gpu_lion_update(const dsl_tensor* tensors, const int64_t* numel, int64_t count, const dsl_gpu_lion* how,
                        void* stream);

// LAMB's phase one: the moments move on, and norms[0][i] = |param i|, norms[1][i] = |update i|, fp32 (2, count).
// Roles: param, grad, exp_avg, exp_avg_sq. `partials` is scratch of 2 * (sum of ceil(numel / DSL_GPU_BLOCK_NUMEL)) floats. The norms of
// empty tensors, and of all where the step is skipped, may stay unwritten: fill them with 0.
int dsl_gpu_lamb_moments(const dsl_tensor* tensors, const int64_t* numel, int64_t count, const dsl_gpu_lamb* how,
                         float* partials, float* norms, void* stream);

// Phase two: the parameters move by lr times the trust ratio of their norms. Roles: param, exp_avg, exp_avg_sq, [copy],
// step (one fp32 on the device).
int dsl_gpu_lamb_apply(const dsl_tensor* tensors, const int64_t* numel, int64_t count, const dsl_gpu_lamb* how,
                       const float* norms, void* stream);

// out = in * factor, in out's dtype; *found_inf = 1 where a result is infinite or NaN, and untouched where none is.
// Roles: in, [out]. `found_inf` may be null.
int dsl_gpu_scale(const dsl_tensor* tensors, const int64_t* numel, int64_t count, float factor,
                  const float* factor_on_device, float* found_inf, void* stream);

// norms[i] = the 2-norm of tensor i, fp32, 0 before. `partials` is scratch of a float for each block.
int dsl_gpu_l2norm(const dsl_tensor* tensors, const int64_t* numel, int64_t count, float* partials, float* norms,
                   void* stream);
}
