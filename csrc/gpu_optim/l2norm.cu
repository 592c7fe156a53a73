// The 2-norm of each tensor of a list. Memory per element: read once. A norm above fp32's range is infinite, and NaN
// stays NaN.
#include "gpu_optim/gpu_optim.h"
#include "gpu_optim/sum.h"

namespace dsl {

// squares: written, the sum of squares of each block of the list.
template <int PACK>
__global__ void __launch_bounds__(THREADS) squares_kernel(const __grid_constant__ TensorList<1> list, float* squares) {
    const Place place = find_place<PACK>(list);
    const View tensor = view(list, 0, place.index);
    float square = 0;
    for_elements<PACK>(place, [&](auto pack, int64_t i) {
        constexpr int N = decltype(pack)::value;
        const Floats<N> x = widen(fetch<N>(tensor, i), tensor);
        for (int k = 0; k < N; ++k) square += x.at[k] * x.at[k];
    });
    square = sum_over_block(square);
    if (threadIdx.x == 0) squares[blockIdx.x] = square;
}

}  // namespace dsl

extern "C" int dsl_gpu_l2norm(const dsl_tensor* tensors, const int64_t* numel, int64_t count, float* partials,
                              float* norms, void* stream) {
    using namespace dsl;
    return for_each_list<1>(tensors, numel, count, 1, [&](auto pack, const auto& list, uint32_t blocks, int64_t first) {
        DSL_LAUNCH(squares_kernel<decltype(pack)::value>, blocks, THREADS, stream, list, partials);
        const float* const always = nullptr;
        DSL_LAUNCH(norm_kernel<1>, list.count, THREADS, stream, list, partials, norms + first, always);
    });
}
