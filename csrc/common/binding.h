// What bindings share: torch's tensors as the kernels see them, and torch's threads.
//
// Of the stable ABI only the plain C functions and the tensor are included: its other headers double the compile time.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "common/tile.h"

namespace dsl {

// The kernel's view of `name[index]`, which must be contiguous, of a dtype that kernels know, and of `numel` elements.
inline dsl_tensor checked(const torch::stable::Tensor& tensor, int64_t numel, const char* op, const char* name,
                          size_t index) {
    using torch::headeronly::ScalarType;
    STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, "[", index, "] is not contiguous");
    STD_TORCH_CHECK(tensor.numel() == numel, op, ": ", name, "[", index, "] has ", tensor.numel(),
                    " elements, its parameter ", numel);
    const ScalarType dtype = tensor.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op, ": ",
                    name, "[", index, "] must be float32, bfloat16 or float16");
    return {tensor.data_ptr(), dtype == ScalarType::Float      ? DSL_FP32
                               : dtype == ScalarType::BFloat16 ? DSL_BF16
                                                               : DSL_FP16};
}

// Calls `work(begin, end)` on torch's threads, for ranges that make up [0, end).
template <class Work>
void parallel_for(int64_t end, const Work& work) {
    auto call = [](int64_t from, int64_t to, void* context) { (*static_cast<const Work*>(context))(from, to); };
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_parallel_for(0, end, 1, call, const_cast<void*>(static_cast<const void*>(&work))));
}

}  // namespace dsl
