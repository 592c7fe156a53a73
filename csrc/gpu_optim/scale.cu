// Lists of tensors times a factor into other tensors, of the same dtype or another: unscaling, casting, flattening (into
// slices of one buffer) and unflattening are all this. Notes on the way whether a result is infinite or NaN; with no
// tensors to write to, that is all it does.
//
// Memory per element: in read, out written. found_inf: one float, written by whoever finds something, with the same 1.
#include "gpu_optim/gpu_optim.h"
#include "gpu_optim/multi_tensor.h"

namespace dsl {

enum ScaleRole { IN, OUT, SCALE_ROLES };

template <int PACK>
__global__ void __launch_bounds__(THREADS) scale_kernel(const __grid_constant__ TensorList<SCALE_ROLES> list,
                                                        float factor, const float* factor_on_device, float* found_inf) {
    const Place place = find_place<PACK>(list);
    const View in = view(list, IN, place.index), out = view(list, OUT, place.index);
    factor *= either(factor_on_device, 1);

    bool all_finite = true;
    for_elements<PACK>(place, [&](auto pack, int64_t i) {
        constexpr int N = decltype(pack)::value;
        Floats<N> x = widen(fetch<N>(in, i), in);
        for (int k = 0; k < N; ++k) x.at[k] *= factor;
        if (out.data != nullptr) {
            const Raw<N> written = narrow(x, out);
            store(written, out, i);
            x = widen(written, out);  // what is finite in fp32 may not be in fp16
        }
        for (int k = 0; k < N; ++k) all_finite &= fabsf(x.at[k]) <= 3.402823466e38f;
    });
    if (!all_finite && found_inf != nullptr) *found_inf = 1;
}

}  // namespace dsl

extern "C" int dsl_gpu_scale(const dsl_tensor* tensors, const int64_t* numel, int64_t count, float factor,
                             const float* factor_on_device, float* found_inf, void* stream) {
    using namespace dsl;
    return for_each_list<SCALE_ROLES>(tensors, numel, count, SCALE_ROLES,
                                      [&](auto pack, const auto& list, uint32_t blocks, int64_t) {
                                          DSL_LAUNCH(scale_kernel<decltype(pack)::value>, blocks, THREADS, stream, list,
                                                     factor, factor_on_device, found_inf);
                                      });
}
