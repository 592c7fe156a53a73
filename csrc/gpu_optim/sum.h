// The second half of a norm: each block of a list left one partial sum, and a tensor's are added up by one block.
// The order of additions depends on sizes alone, so norms are the same in every run; there are no atomics.
#pragma once

#include "gpu_optim/multi_tensor.h"

namespace dsl {

// partials: read, the list's blocks; norms: written, one per tensor. blockIdx.x is the tensor's place in the list.
// Where `found_inf` is not 0 there are no partial sums, and no norms.
template <int ROLES>
__global__ void __launch_bounds__(THREADS) norm_kernel(const __grid_constant__ TensorList<ROLES> list,
                                                       const float* partials, float* norms, const float* found_inf) {
    if (either(found_inf, 0) != 0) return;
    double sum = 0;
    const uint32_t end = list.first_block[blockIdx.x + 1];
    for (uint32_t i = list.first_block[blockIdx.x] + threadIdx.x; i < end; i += THREADS) sum += partials[i];
    sum = sum_over_block(sum);
    if (threadIdx.x == 0) norms[blockIdx.x] = static_cast<float>(sqrt(sum));
}

}  // namespace dsl
