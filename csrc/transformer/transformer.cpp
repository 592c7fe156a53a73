// The ops deepspeedlite::drop_norm, bias_gelu, masked_softmax and their backward passes, on GPUs and the CPU. With
// DSL_STOCHASTIC they are another library, and their names begin with stochastic_.
#include "transformer/transformer.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <mutex>

#include "common/arguments.h"
#include "common/isa.h"
#include "common/on_gpu.h"

#if defined(DSL_STOCHASTIC)
#define DSL_OP(name) "stochastic_" name
#else
#define DSL_OP(name) name
#endif

namespace {

#if defined(DSL_STOCHASTIC)
constexpr bool STOCHASTIC = true;
#else
constexpr bool STOCHASTIC = false;
#endif

using dsl::Arguments;
using dsl::MaybeTensor;
using dsl::Tensor;
using torch::headeronly::ScalarType;

constexpr int64_t LITTLE = 1 << 13;  // numbers for which waking other threads takes longer than the work
constexpr int64_t COLUMNS = 256;     // that a thread sums at a time

int64_t parts_of(int64_t rows) { return (rows + DSL_PART - 1) / DSL_PART; }

// Calls `work(begin, end)` for ranges of the parts of `rows` rows of `width` numbers, and returns where they began.
template <class Work>
std::vector<int64_t> share(int64_t rows, int64_t width, const Work& work) {
    std::vector<int64_t> begun;
    std::mutex adding;
    const auto begin_work = [&](int64_t begin, int64_t end) {
        work(begin, end);
        const std::lock_guard<std::mutex> guard(adding);
        begun.push_back(begin);
    };
    rows* width <= LITTLE ? begin_work(0, parts_of(rows)) : dsl::parallel_for(parts_of(rows), begin_work);
    return begun;
}

// The sum of parts into `to`, in order, or of those that threads left.
void sum_parts(const float* from, int64_t rows, int64_t step, int64_t width, const std::vector<int64_t>& begun,
               float* to) {
    if (to == nullptr) return;
    const dsl_parts parts{from, STOCHASTIC ? static_cast<int64_t>(begun.size()) : parts_of(rows), step,
                          STOCHASTIC ? begun.data() : nullptr, to};
    dsl_sum_parts_kernel* const sum = DSL_BEST(dsl_sum_parts);
    const auto work = [&](int64_t begin, int64_t end) { sum(&parts, begin * COLUMNS, std::min(end * COLUMNS, width)); };
    const int64_t shares = (width + COLUMNS - 1) / COLUMNS;
    parts.count* width <= LITTLE ? work(0, shares) : dsl::parallel_for(shares, work);
}

dsl_dropout dropout_of(const Arguments& arguments, double ratio, int64_t seed, int64_t stream) {
    arguments.check(ratio >= 0 && ratio <= 1, "the dropout ratio must be from 0 to 1");
    const double threshold = std::round(ratio * 4294967296.0);
    return {static_cast<uint64_t>(seed), static_cast<uint64_t>(stream),
            static_cast<uint32_t>(std::min(threshold, 4294967295.0)),
            ratio == 1 ? 0.0f : static_cast<float>(1 / (1 - ratio))};
}

float* sums_of(const Arguments& arguments, const char* name, const MaybeTensor& tensor, int64_t numel) {
    return tensor.has_value() ? arguments.data<float>(name, *tensor, ScalarType::Float, numel) : nullptr;
}

int64_t width_of(const Tensor& x) { return x.dim() == 0 ? 1 : x.size(-1); }

void drop_norm(Tensor x, MaybeTensor bias, MaybeTensor residual, MaybeTensor weight, MaybeTensor shift,
               MaybeTensor summed, MaybeTensor normed, MaybeTensor mean, MaybeTensor rstd, double eps, double ratio,
               int64_t seed, int64_t stream) {
    const Arguments arguments(DSL_OP("drop_norm"), x);
    const int64_t numel = x.numel(), hidden = width_of(x);
    if (numel == 0) return;
    dsl_drop_norm how{};
    how.stochastic = STOCHASTIC;
    how.rows = numel / hidden, how.hidden = hidden;
    how.x = arguments.floats("x", x, numel);
    how.bias = arguments.floats("bias", bias, hidden);
    how.residual = arguments.floats("residual", residual, numel);
    how.summed = arguments.floats("summed", summed, numel);
    how.normed = arguments.floats("normed", normed, numel);
    how.weight = arguments.floats("weight", weight, hidden);
    how.shift = arguments.floats("shift", shift, hidden);
    how.mean = sums_of(arguments, "mean", mean, how.rows);
    how.rstd = sums_of(arguments, "rstd", rstd, how.rows);
    how.eps = static_cast<float>(eps);
    how.dropout = dropout_of(arguments, ratio, seed, stream);
    arguments.check(how.normed.data == nullptr || (how.weight.data != nullptr && how.shift.data != nullptr &&
                                                   how.mean != nullptr && how.rstd != nullptr),
                    "a norm needs weight, shift, mean and rstd");
#if defined(DSL_GPU)
    if (!arguments.on_cpu) {
        return dsl::on_gpu(DSL_OP("drop_norm"), arguments.device_index,
                           [&](void* to) { return dsl_gpu_drop_norm(&how, to); });
    }
#endif
    dsl_drop_norm_kernel* const kernel = DSL_BEST(dsl_drop_norm);
    share(how.rows, hidden, [&](int64_t begin, int64_t end) { kernel(&how, begin, end); });
}

void drop_norm_backward(MaybeTensor grad_normed, MaybeTensor grad_summed, MaybeTensor summed, MaybeTensor normed,
                        MaybeTensor weight, MaybeTensor shift, MaybeTensor mean, MaybeTensor rstd, MaybeTensor grad_x,
                        MaybeTensor grad_residual, MaybeTensor grad_bias, MaybeTensor grad_weight,
                        MaybeTensor grad_shift, Tensor parts, double ratio, int64_t seed, int64_t stream) {
    const Arguments arguments(DSL_OP("drop_norm_backward"), parts);
    arguments.check(grad_normed.has_value() || grad_summed.has_value(), "there is no gradient");
    const Tensor& first = grad_normed.has_value() ? *grad_normed : *grad_summed;
    const int64_t numel = first.numel(), hidden = width_of(first);
    if (numel == 0) return;
    dsl_drop_norm_backward how{};
    how.stochastic = STOCHASTIC;
    how.rows = numel / hidden, how.hidden = hidden;
    how.grad_normed = arguments.floats("grad_normed", grad_normed, numel);
    how.grad_summed = arguments.floats("grad_summed", grad_summed, numel);
    how.summed = arguments.floats("summed", summed, numel);
    how.normed = arguments.floats("normed", normed, numel);
    how.weight = arguments.floats("weight", weight, hidden);
    how.shift = arguments.floats("shift", shift, hidden);
    how.mean = sums_of(arguments, "mean", mean, how.rows);
    how.rstd = sums_of(arguments, "rstd", rstd, how.rows);
    how.grad_x = arguments.floats("grad_x", grad_x, numel);
    how.grad_residual = arguments.floats("grad_residual", grad_residual, numel);
    how.grad_bias = sums_of(arguments, "grad_bias", grad_bias, hidden);
    how.grad_weight = sums_of(arguments, "grad_weight", grad_weight, hidden);
    how.grad_shift = sums_of(arguments, "grad_shift", grad_shift, hidden);
    how.parts = arguments.data<float>("parts", parts, ScalarType::Float,
                                      parts_of(how.rows) * 3 * hidden + (arguments.on_cpu ? 0 : 2 * how.rows));
    how.dropout = dropout_of(arguments, ratio, seed, stream);
    arguments.check(
        !grad_normed.has_value() || (how.weight.data != nullptr && how.shift.data != nullptr && how.rstd != nullptr &&
                                     (how.summed.data != nullptr ? how.mean != nullptr : how.normed.data != nullptr)),
        "a norm's gradient needs weight, shift, rstd, and summed and mean, or normed");
#if defined(DSL_GPU)
    if (!arguments.on_cpu) {
        return dsl::on_gpu(DSL_OP("drop_norm_backward"), arguments.device_index,
                           [&](void* to) { return dsl_gpu_drop_norm_backward(&how, to); });
    }
#endif
    dsl_drop_norm_backward_kernel* const kernel = DSL_BEST(dsl_drop_norm_backward);
    const auto begun = share(how.rows, hidden, [&](int64_t begin, int64_t end) { kernel(&how, begin, end); });
    sum_parts(how.parts, how.rows, 3 * hidden, hidden, begun, how.grad_bias);
    sum_parts(how.parts + hidden, how.rows, 3 * hidden, hidden, begun, how.grad_weight);
    sum_parts(how.parts + 2 * hidden, how.rows, 3 * hidden, hidden, begun, how.grad_shift);
}

void bias_gelu(Tensor x, MaybeTensor bias, Tensor out, bool tanh_form, double ratio, int64_t seed, int64_t stream) {
    const Arguments arguments(DSL_OP("bias_gelu"), x);
    const int64_t numel = x.numel(), width = width_of(x);
    if (numel == 0) return;
    dsl_bias_gelu how{};
    how.rows = numel / width, how.width = width;
    how.x = arguments.floats("x", x, numel);
    how.bias = arguments.floats("bias", bias, width);
    how.out = arguments.floats("out", out, numel);
    how.tanh_form = tanh_form;
    how.dropout = dropout_of(arguments, ratio, seed, stream);
#if defined(DSL_GPU)
    if (!arguments.on_cpu) {
        return dsl::on_gpu(DSL_OP("bias_gelu"), arguments.device_index,
                           [&](void* to) { return dsl_gpu_bias_gelu(&how, to); });
    }
#endif
    dsl_bias_gelu_kernel* const kernel = DSL_BEST(dsl_bias_gelu);
    share(how.rows, width, [&](int64_t begin, int64_t end) { kernel(&how, begin, end); });
}

void bias_gelu_backward(Tensor grad_out, Tensor x, MaybeTensor bias, Tensor grad_x, MaybeTensor grad_bias,
                        MaybeTensor parts, MaybeTensor out, bool tanh_form, double ratio, int64_t seed,
                        int64_t stream) {
    const Arguments arguments(DSL_OP("bias_gelu_backward"), grad_out);
    const int64_t numel = x.numel(), width = width_of(x);
    if (numel == 0) return;
    dsl_bias_gelu_backward how{};
    how.stochastic = STOCHASTIC;
    how.rows = numel / width, how.width = width;
    how.grad_out = arguments.floats("grad_out", grad_out, numel);
    how.x = arguments.floats("x", x, numel);
    how.bias = arguments.floats("bias", bias, width);
    how.grad_x = arguments.floats("grad_x", grad_x, numel);
    how.grad_bias = sums_of(arguments, "grad_bias", grad_bias, width);
    how.parts = sums_of(arguments, "parts", parts, parts_of(how.rows) * width);
    how.out = arguments.floats("out", out, numel);
    how.tanh_form = tanh_form;
    how.dropout = dropout_of(arguments, ratio, seed, stream);
    arguments.check(how.grad_bias == nullptr || how.parts != nullptr, "the gradient of the bias needs parts");
#if defined(DSL_GPU)
    if (!arguments.on_cpu) {
        return dsl::on_gpu(DSL_OP("bias_gelu_backward"), arguments.device_index,
                           [&](void* to) { return dsl_gpu_bias_gelu_backward(&how, to); });
    }
#endif
    dsl_bias_gelu_backward_kernel* const kernel = DSL_BEST(dsl_bias_gelu_backward);
    const auto begun = share(how.rows, width, [&](int64_t begin, int64_t end) { kernel(&how, begin, end); });
    sum_parts(how.parts, how.rows, width, width, begun, how.grad_bias);
}

// A mask that lies over (batch, heads, queries, keys): the same for all of a dimension where it has one.
void add_mask(const Arguments& arguments, const Tensor& mask, dsl_softmax& how) {
    arguments.check(mask.dim() == 4, "mask must have four dimensions");
    const int64_t whole[] = {how.batch, how.heads, how.queries, how.keys};
    int64_t* const steps[] = {&how.mask_batch, &how.mask_head, &how.mask_query, &how.mask_key};
    for (int64_t i = 0; i < 4; ++i) {
        arguments.check(mask.size(i) == whole[i] || mask.size(i) == 1, "mask does not lie over the scores");
        *steps[i] = mask.size(i) == 1 ? 0 : mask.stride(i);
    }
    if (mask.scalar_type() == ScalarType::Bool) {
        arguments.check(mask.is_cpu() == arguments.on_cpu && mask.get_device_index() == arguments.device_index,
                        "mask is on another device than the scores");
        how.seen = static_cast<const uint8_t*>(mask.data_ptr());
    } else {
        how.mask = arguments.any_steps("mask", mask);
    }
}

void masked_softmax(Tensor scores, MaybeTensor mask, MaybeTensor probs, MaybeTensor dropped, double scale, double ratio,
                    int64_t seed, int64_t stream) {
    const Arguments arguments(DSL_OP("masked_softmax"), scores);
    arguments.check(scores.dim() == 4, "scores must have four dimensions");
    const int64_t numel = scores.numel();
    if (numel == 0) return;
    dsl_softmax how{};
    how.stochastic = STOCHASTIC;
    how.batch = scores.size(0), how.heads = scores.size(1), how.queries = scores.size(2), how.keys = scores.size(3);
    how.scores = arguments.floats("scores", scores, numel);
    how.probs = arguments.floats("probs", probs, numel);
    how.dropped = arguments.floats("dropped", dropped, numel);
    if (mask.has_value()) add_mask(arguments, *mask, how);
    how.scale = static_cast<float>(scale);
    how.dropout = dropout_of(arguments, ratio, seed, stream);
#if defined(DSL_GPU)
    if (!arguments.on_cpu) {
        return dsl::on_gpu(DSL_OP("masked_softmax"), arguments.device_index,
                           [&](void* to) { return dsl_gpu_softmax(&how, to); });
    }
#endif
    dsl_softmax_kernel* const kernel = DSL_BEST(dsl_softmax);
    share(numel / how.keys, how.keys, [&](int64_t begin, int64_t end) { kernel(&how, begin, end); });
}

void masked_softmax_backward(Tensor grad_dropped, Tensor probs, Tensor grad_scores, double scale, double ratio,
                             int64_t seed, int64_t stream) {
    const Arguments arguments(DSL_OP("masked_softmax_backward"), grad_dropped);
    const int64_t numel = probs.numel();
    if (numel == 0) return;
    dsl_softmax_backward how{};
    how.keys = width_of(probs), how.rows = numel / how.keys;
    how.grad_dropped = arguments.floats("grad_dropped", grad_dropped, numel);
    how.probs = arguments.floats("probs", probs, numel);
    how.grad_scores = arguments.floats("grad_scores", grad_scores, numel);
    how.scale = static_cast<float>(scale);
    how.dropout = dropout_of(arguments, ratio, seed, stream);
#if defined(DSL_GPU)
    if (!arguments.on_cpu) {
        return dsl::on_gpu(DSL_OP("masked_softmax_backward"), arguments.device_index,
                           [&](void* to) { return dsl_gpu_softmax_backward(&how, to); });
    }
#endif
    dsl_softmax_backward_kernel* const kernel = DSL_BEST(dsl_softmax_backward);
    share(how.rows, how.keys, [&](int64_t begin, int64_t end) { kernel(&how, begin, end); });
}

void implement(torch::stable::detail::StableLibrary& m) {
    m.impl(DSL_OP("drop_norm"), TORCH_BOX(&drop_norm));
    m.impl(DSL_OP("drop_norm_backward"), TORCH_BOX(&drop_norm_backward));
    m.impl(DSL_OP("bias_gelu"), TORCH_BOX(&bias_gelu));
    m.impl(DSL_OP("bias_gelu_backward"), TORCH_BOX(&bias_gelu_backward));
    m.impl(DSL_OP("masked_softmax"), TORCH_BOX(&masked_softmax));
    m.impl(DSL_OP("masked_softmax_backward"), TORCH_BOX(&masked_softmax_backward));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(deepspeedlite, m) {
    m.def(DSL_OP("drop_norm") "(Tensor x, Tensor? bias, Tensor? residual, Tensor? weight, Tensor? shift, "
          "Tensor(a!)? summed, Tensor(b!)? normed, Tensor(c!)? mean, Tensor(d!)? rstd, float eps, float ratio, int seed, "
          "int stream) -> ()");
    m.def(DSL_OP("drop_norm_backward") "(Tensor? grad_normed, Tensor? grad_summed, Tensor? summed, Tensor? normed, "
          "Tensor? weight, Tensor? shift, Tensor? mean, Tensor? rstd, Tensor(a!)? grad_x, Tensor(b!)? grad_residual, "
          "Tensor(c!)? grad_bias, Tensor(d!)? grad_weight, Tensor(e!)? grad_shift, Tensor(f!) parts, float ratio, "
          "int seed, int stream) -> ()");
    m.def(DSL_OP("bias_gelu") "(Tensor x, Tensor? bias, Tensor(a!) out, bool tanh_form, float ratio, int seed, "
          "int stream) -> ()");
    m.def(DSL_OP("bias_gelu_backward") "(Tensor grad_out, Tensor x, Tensor? bias, Tensor(a!) grad_x, "
          "Tensor(b!)? grad_bias, Tensor(c!)? parts, Tensor(d!)? out, bool tanh_form, float ratio, int seed, int stream) "
          "-> ()");
    m.def(DSL_OP("masked_softmax") "(Tensor scores, Tensor? mask, Tensor(a!)? probs, Tensor(b!)? dropped, float scale, "
          "float ratio, int seed, int stream) -> ()");
    m.def(DSL_OP("masked_softmax_backward") "(Tensor grad_dropped, Tensor probs, Tensor(a!) grad_scores, float scale, "
          "float ratio, int seed, int stream) -> ()");
}

DSL_IMPLEMENT(implement)
