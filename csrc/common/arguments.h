// What bindings whose ops take single tensors share: each checked by its name, and scratch memory of the calling thread.
#pragma once

#include "common/binding.h"

namespace dsl {

using Tensor = torch::stable::Tensor;
using MaybeTensor = std::optional<torch::stable::Tensor>;

// An op's arguments, all of which must be on the first one's device.
class Arguments {
 public:
    Arguments(const char* op, const Tensor& first)
        : on_cpu(first.is_cpu()), device_index(first.get_device_index()), op_(op) {}

    // A contiguous tensor of a dtype that kernels know, of `numel` elements.
    dsl_tensor floats(const char* name, const Tensor& tensor, int64_t numel) const {
        check_shape(name, tensor, numel);
        return any_steps(name, tensor);
    }

    // The same, of any number of elements and with any steps between them.
    dsl_tensor any_steps(const char* name, const Tensor& tensor) const {
        using torch::headeronly::ScalarType;
        check_place(name, tensor);
        const ScalarType dtype = tensor.scalar_type();
        STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op_,
                        ": ", name, " must be float32, bfloat16 or float16");
        return {tensor.data_ptr(), dtype == ScalarType::Float      ? DSL_FP32
                                   : dtype == ScalarType::BFloat16 ? DSL_BF16
                                                                   : DSL_FP16};
    }

    dsl_tensor floats(const char* name, const MaybeTensor& tensor, int64_t numel) const {
        return tensor.has_value() ? floats(name, *tensor, numel) : dsl_tensor{nullptr, DSL_FP32};
    }

    // The data of a contiguous tensor of `numel` elements of this very dtype.
    template <class T>
    T* data(const char* name, const Tensor& tensor, torch::headeronly::ScalarType dtype, int64_t numel) const {
        check_place(name, tensor);
        STD_TORCH_CHECK(tensor.scalar_type() == dtype, op_, ": ", name, " has another dtype than it must have");
        check_shape(name, tensor, numel);
        return static_cast<T*>(tensor.data_ptr());
    }

    void check(bool condition, const char* what) const { STD_TORCH_CHECK(condition, op_, ": ", what); }

    const bool on_cpu;
    const int32_t device_index;

 private:
    void check_shape(const char* name, const Tensor& tensor, int64_t numel) const {
        STD_TORCH_CHECK(tensor.is_contiguous(), op_, ": ", name, " is not contiguous");
        STD_TORCH_CHECK(tensor.numel() == numel, op_, ": ", name, " has ", tensor.numel(), " elements, not ", numel);
    }

    void check_place(const char* name, const Tensor& tensor) const {
        STD_TORCH_CHECK(tensor.is_cpu() == on_cpu && tensor.get_device_index() == device_index, op_, ": ", name,
                        " is on another device than the first tensor");
    }

    const char* const op_;
};

// Memory of the calling thread, aligned to a cache line; it is kept, and used by its next call.
inline float* scratch_of_thread(int64_t floats) {
    thread_local std::vector<float> kept;
    if (static_cast<int64_t>(kept.size()) < floats + 16) kept.resize(floats + 16);
    const uintptr_t start = reinterpret_cast<uintptr_t>(kept.data());
    return reinterpret_cast<float*>((start + 63) & ~uintptr_t{63});
}

}  // namespace dsl
