// What the bindings of GPU ops share: the device and the stream that torch is at. Without DSL_CUDA and DSL_HIP a binding
// has its op's CPU implementation alone.
#pragma once

#include "common/binding.h"

#if defined(DSL_CUDA) || defined(DSL_HIP)
#define DSL_GPU

#include <torch/csrc/stable/accelerator.h>

// Exported only by a libtorch with CUDA (or ROCm, which calls itself CUDA); weak, so that the file loads without it too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace dsl {

// Calls `launch(stream)` on a device, with torch's current stream there.
template <class Launch>
void on_gpu(const char* op, int32_t device_index, const Launch& launch) {
    const torch::stable::accelerator::DeviceGuard guard(device_index);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
    const int error = launch(stream);
    STD_TORCH_CHECK(error != 209, op, ": error 209, no kernel image is available: it was not compiled for this GPU");
    STD_TORCH_CHECK(error == 0, op, ": a kernel could not be launched, error ", error);
}

// Memory of torch's allocator, on that device and in the order of its current stream.
inline torch::stable::Tensor scratch(int32_t device_index, int64_t floats) {
    const int64_t stride = 1;
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &floats, &stride, aoti_torch_dtype_float32(),
                                                    aoti_torch_device_type_cuda(), device_index, &handle));
    return torch::stable::Tensor(handle);
}

}  // namespace dsl

#define DSL_IMPLEMENT(implement)                                       \
    STABLE_TORCH_LIBRARY_IMPL(deepspeedlite, CPU, m) { implement(m); } \
    STABLE_TORCH_LIBRARY_IMPL(deepspeedlite, CUDA, m) { implement(m); }
#else
#define DSL_IMPLEMENT(implement) \
    STABLE_TORCH_LIBRARY_IMPL(deepspeedlite, CPU, m) { implement(m); }
#endif
