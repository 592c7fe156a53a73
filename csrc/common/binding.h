// What bindings share: torch's tensors as the kernels see them, and torch's threads.
//
// Of the stable ABI only the plain C functions and the tensor are included: its other headers double the compile time.
// And only what torch 2.10's headers have: TORCH_ERROR_CODE_CHECK, not the STABLE_ one of 2.13.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/tensor.h"

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
    TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, end, 1, call, const_cast<void*>(static_cast<const void*>(&work))));
}

// Elements that one thread takes at a time: whole tiles, so that the number of threads changes no result.
constexpr int64_t BLOCK = 1 << 15;

// Calls `work(i, begin, end)` on torch's threads, for elements [begin, end) of tensor i: all of each of `numels`.
template <class Work>
void parallel_over(const std::vector<int64_t>& numels, const Work& work) {
    std::vector<int64_t> first_block{0};
    for (const int64_t numel : numels) first_block.push_back(first_block.back() + (numel + BLOCK - 1) / BLOCK);
    parallel_for(first_block.back(), [&](int64_t begin, int64_t end) {
        size_t i = std::upper_bound(first_block.begin(), first_block.end(), begin) - first_block.begin() - 1;
        for (int64_t block = begin; block < end; ++block) {
            while (block >= first_block[i + 1]) ++i;
            const int64_t start = (block - first_block[i]) * BLOCK;
            work(i, start, std::min(start + BLOCK, numels[i]));
        }
    });
}

// A list argument of an op. An optional one may be empty; a single one has one fp32 number for each tensor.
enum class Kind { required, optional, single };
struct List {
    const char* name;
    const std::vector<torch::stable::Tensor>& tensors;
    Kind kind = Kind::required;
};

// The lists as kernels see them: `tensors` is (count, lists), an entry of an empty optional list is absent.
struct Table {
    Table(const char* op, std::initializer_list<List> lists) {
        const List& first = *lists.begin();
        for (const List& list : lists) {
            STD_TORCH_CHECK(
                list.tensors.size() == first.tensors.size() || (list.kind == Kind::optional && list.tensors.empty()),
                op, ": ", first.tensors.size(), " ", first.name, ", but ", list.tensors.size(), " ", list.name);
        }
        if (first.tensors.empty()) return;
        on_cpu = first.tensors[0].is_cpu();
        device_index = first.tensors[0].get_device_index();
        for (size_t i = 0; i < first.tensors.size(); ++i) {
            numels.push_back(first.tensors[i].numel());
            for (const List& list : lists) tensors.push_back(entry(op, list, i));
        }
    }

    // A number that may be on the tensors' device: where it lies, or null.
    float* number(const char* op, const char* name, const std::optional<torch::stable::Tensor>& tensor) const {
        if (!tensor.has_value()) return nullptr;
        return static_cast<float*>(entry(op, {name, {*tensor}, Kind::single}, 0).data);
    }

    std::vector<dsl_tensor> tensors;
    std::vector<int64_t> numels;
    bool on_cpu = true;
    int32_t device_index = 0;

 private:
    dsl_tensor entry(const char* op, const List& list, size_t i) const {
        if (list.tensors.empty()) return {nullptr, DSL_FP32};
        const torch::stable::Tensor& tensor = list.tensors[i];
        STD_TORCH_CHECK(tensor.is_cpu() == on_cpu && tensor.get_device_index() == device_index, op, ": ", list.name,
                        "[", i, "] is on another device than the first tensor");
        const dsl_tensor found = checked(tensor, list.kind == Kind::single ? 1 : numels[i], op, list.name, i);
        STD_TORCH_CHECK(list.kind != Kind::single || found.dtype == DSL_FP32, op, ": ", list.name, "[", i,
                        "] must be float32");
        return found;
    }
};

}  // namespace dsl
