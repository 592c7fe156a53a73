// The ops deepspeedlite::add_norm, rotary_to_cache, decode_attention and gated_activation, on GPUs and the CPU.
#include "transformer_inference/between.h"

#include <torch/csrc/stable/library.h>

#include "common/arguments.h"
#include "common/isa.h"
#include "common/on_gpu.h"

namespace {

using dsl::Arguments;
using dsl::MaybeTensor;
using dsl::Tensor;
using torch::headeronly::ScalarType;

constexpr int64_t LITTLE = 1 << 13;  // numbers for which waking other threads takes longer than the work

// As dsl::parallel_for, over parts of `numel` numbers each.
template <class Work>
void share(int64_t parts, int64_t numel, const Work& work) {
    parts* numel <= LITTLE ? work(0, parts) : dsl::parallel_for(parts, work);
}

void add_norm(Tensor x, MaybeTensor residual, MaybeTensor weight, MaybeTensor bias, Tensor normed, MaybeTensor summed,
              double eps, bool layer, bool unit_offset) {
    const Arguments arguments("add_norm", x);
    const int64_t numel = x.numel(), hidden = x.dim() == 0 ? 0 : x.size(-1);
    if (numel == 0) return;
    arguments.check(residual.has_value() == summed.has_value(), "summed must be there where residual is");
    dsl_norm how{};
    how.x = arguments.floats("x", x, numel);
    how.residual = arguments.floats("residual", residual, numel);
    how.weight = arguments.floats("weight", weight, hidden);
    how.bias = arguments.floats("bias", bias, hidden);
    how.normed = arguments.floats("normed", normed, numel);
    how.summed = arguments.floats("summed", summed, numel);
    how.hidden = hidden;
    how.eps = static_cast<float>(eps);
    how.layer = layer;
    how.unit_offset = unit_offset;
#if defined(DSL_GPU)
    if (!arguments.on_cpu) {
        return dsl::on_gpu("add_norm", arguments.device_index,
                           [&](void* stream) { return dsl_gpu_norm(&how, numel / hidden, stream); });
    }
#endif
    dsl_norm_kernel* const norm = DSL_BEST(dsl_norm);
    share(numel / hidden, hidden, [&](int64_t begin, int64_t end) { norm(&how, begin, end); });
}

// What keys and values have in common: shape, dtype, and steps, of which that between numbers is 1.
void check_cache(const Arguments& arguments, const Tensor& keys, const Tensor& values, int64_t dim) {
    arguments.check(keys.dim() == 4 && values.dim() == 4, "keys and values must have four dimensions");
    for (int64_t i = 0; i < 4; ++i) {
        arguments.check(keys.size(i) == values.size(i), "keys and values must have the same shape");
        arguments.check(keys.stride(i) == values.stride(i), "keys and values must lie alike");
    }
    arguments.check(keys.scalar_type() == values.scalar_type(), "keys and values must have the same dtype");
    arguments.check(keys.size(3) == dim && keys.stride(3) == 1, "a head of keys must lie in one piece, as long as q's");
    arguments.check(dim > 0 && dim <= DSL_MOST_DIM, "a head must have 1 to 1024 numbers");
}

// From `offset` on.
dsl_tensor part_of(const Arguments& arguments, const char* name, const Tensor& tensor, int64_t offset) {
    const dsl_tensor all = arguments.any_steps(name, tensor);
    return {static_cast<char*>(all.data) + offset * (all.dtype == DSL_FP32 ? 4 : 2), all.dtype};
}

void rotary_to_cache(Tensor qkv, MaybeTensor cos, MaybeTensor sin, Tensor keys, Tensor values, Tensor q, int64_t start,
                     int64_t rotary_dim, bool interleaved) {
    const Arguments arguments("rotary_to_cache", qkv);
    arguments.check(q.dim() == 4 && qkv.dim() == 3, "q must have four dimensions, and qkv three");
    dsl_rotary how{};
    const int64_t batch = q.size(0);
    how.heads = q.size(1), how.tokens = q.size(2), how.dim = q.size(3), how.kv_heads = keys.size(1);
    check_cache(arguments, keys, values, how.dim);
    arguments.check(keys.size(0) == batch && start >= 0 && start + how.tokens <= keys.size(2),
                    "the cache has no room for the tokens");
    if (q.numel() == 0) return;
    how.qkv = arguments.floats("qkv", qkv, batch * how.tokens * (how.heads + 2 * how.kv_heads) * how.dim);
    how.q = arguments.floats("q", q, q.numel());
    how.kv_batch = keys.stride(0), how.kv_head = keys.stride(1), how.kv_token = keys.stride(2);
    how.keys = part_of(arguments, "keys", keys, start * how.kv_token);
    how.values = part_of(arguments, "values", values, start * how.kv_token);
    how.rotary_dim = rotary_dim;
    how.interleaved = interleaved;
    if (cos.has_value() && sin.has_value()) {
        arguments.check(rotary_dim >= 0 && rotary_dim <= how.dim && rotary_dim % 2 == 0, "rotary_dim must be even");
        for (const Tensor& one : {*cos, *sin}) {
            arguments.check(one.dim() == 3 && (one.size(0) == batch || one.size(0) == 1) && one.size(1) == how.tokens &&
                                one.size(2) >= rotary_dim && one.stride(2) == 1,
                            "cos and sin must be (batch or 1, tokens, rotary_dim)");
            arguments.check(one.stride(0) == cos->stride(0) && one.stride(1) == cos->stride(1),
                            "cos and sin must lie alike");
        }
        how.cos = part_of(arguments, "cos", *cos, 0);
        how.sin = part_of(arguments, "sin", *sin, 0);
        how.cos_batch = cos->size(0) == 1 ? 0 : cos->stride(0);
        how.cos_token = cos->stride(1);
    }
#if defined(DSL_GPU)
    if (!arguments.on_cpu) {
        return dsl::on_gpu("rotary_to_cache", arguments.device_index,
                           [&](void* stream) { return dsl_gpu_rotary(&how, batch, stream); });
    }
#endif
    dsl_rotary_kernel* const turn = DSL_BEST(dsl_rotary);
    share(batch * how.tokens, (how.heads + 2 * how.kv_heads) * how.dim,
          [&](int64_t begin, int64_t end) { turn(&how, begin, end); });
}

void decode_attention(Tensor q, Tensor keys, Tensor values, MaybeTensor mask, MaybeTensor slopes, Tensor out,
                      int64_t length, double scale, double softcap, int64_t window) {
    const Arguments arguments("decode_attention", q);
    arguments.check(q.dim() == 4, "q must have four dimensions");
    dsl_attention how{};
    const int64_t batch = q.size(0);
    how.heads = q.size(1), how.tokens = q.size(2), how.dim = q.size(3), how.kv_heads = keys.size(1);
    check_cache(arguments, keys, values, how.dim);
    arguments.check(keys.size(0) == batch && how.tokens <= length && length <= keys.size(2),
                    "length must be that of the tokens at least, and of the cache at most");
    arguments.check(how.kv_heads > 0 && how.heads % how.kv_heads == 0, "kv heads must divide heads");
    if (q.numel() == 0) return;
    how.queries = arguments.floats("q", q, q.numel());
    how.scale = static_cast<float>(scale);
    how.out = arguments.floats("out", out, q.numel());
    how.keys = part_of(arguments, "keys", keys, 0);
    how.values = part_of(arguments, "values", values, 0);
    how.kv_batch = keys.stride(0), how.kv_head = keys.stride(1), how.kv_token = keys.stride(2);
    how.length = length;
    how.softcap = static_cast<float>(softcap);
    how.window = window;
    if (mask.has_value()) {
        arguments.check(mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 && mask->size(0) == batch &&
                            mask->size(1) >= length && mask->stride(1) == 1,
                        "mask must be bool (batch, length)");
        how.mask = static_cast<const uint8_t*>(mask->data_ptr());
        how.mask_batch = mask->stride(0);
    }
    if (slopes.has_value()) how.slopes = arguments.data<float>("slopes", *slopes, ScalarType::Float, how.heads);
    how.chunks = (length + DSL_CHUNK - 1) / DSL_CHUNK;
    const int64_t rows = batch * how.heads * how.tokens;
    const int64_t parts_numel = rows * how.chunks * (how.dim + 2);
#if defined(DSL_GPU)
    if (!arguments.on_cpu) {
        const Tensor parts = dsl::scratch(arguments.device_index, parts_numel);
        how.parts = static_cast<float*>(parts.data_ptr());
        return dsl::on_gpu("decode_attention", arguments.device_index,
                           [&](void* stream) { return dsl_gpu_attention(&how, batch, stream); });
    }
#endif
    float* const wide = dsl::scratch_of_thread(rows * how.dim + parts_numel);
    DSL_BEST(dsl_scaled)(&how.queries, rows * how.dim, how.scale, wide);
    how.q = wide;
    how.parts = wide + rows * how.dim;
    dsl_attend_kernel* const attend = DSL_BEST(dsl_attend);
    dsl_mix_parts_kernel* const mix_parts = DSL_BEST(dsl_mix_parts);
    share(batch * how.kv_heads * how.chunks, rows / (batch * how.kv_heads) * length / how.chunks * how.dim,
          [&](int64_t begin, int64_t end) { attend(&how, begin, end); });
    share(batch * how.kv_heads, rows / (batch * how.kv_heads) * how.chunks * how.dim,
          [&](int64_t begin, int64_t end) { mix_parts(&how, begin, end); });
}

void gated_activation(Tensor x, Tensor out, int64_t activation, bool gated) {
    const Arguments arguments("gated_activation", x);
    const int64_t numel = out.numel(), width = out.dim() == 0 ? 1 : out.size(-1);
    if (numel == 0) return;
    arguments.check(activation >= DSL_SILU && activation <= DSL_RELU_SQUARED, "there is no such activation");
    dsl_gate how{};
    how.x = arguments.floats("x", x, gated ? 2 * numel : numel);
    how.out = arguments.floats("out", out, numel);
    how.activation = static_cast<int32_t>(activation);
    how.gated = gated;
    how.width = gated ? width : numel;  // without a gate, rows do not matter
#if defined(DSL_GPU)
    if (!arguments.on_cpu) {
        return dsl::on_gpu("gated_activation", arguments.device_index,
                           [&](void* stream) { return dsl_gpu_gate(&how, numel, stream); });
    }
#endif
    dsl_gate_kernel* const gate = DSL_BEST(dsl_gate);
    constexpr int64_t EACH = 1024;
    share(numel / how.width * ((how.width + EACH - 1) / EACH), EACH,
          [&](int64_t begin, int64_t end) { gate(&how, begin, end); });
}

void implement(torch::stable::detail::StableLibrary& m) {
    m.impl("add_norm", TORCH_BOX(&add_norm));
    m.impl("rotary_to_cache", TORCH_BOX(&rotary_to_cache));
    m.impl("decode_attention", TORCH_BOX(&decode_attention));
    m.impl("gated_activation", TORCH_BOX(&gated_activation));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(deepspeedlite, m) {
    m.def(
        "add_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!) normed, Tensor(b!)? summed, "
        "float eps, bool layer, bool unit_offset) -> ()");
    m.def(
        "rotary_to_cache(Tensor qkv, Tensor? cos, Tensor? sin, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) q, "
        "int start, int rotary_dim, bool interleaved) -> ()");
    m.def(
        "decode_attention(Tensor q, Tensor keys, Tensor values, Tensor? mask, Tensor? slopes, Tensor(a!) out, "
        "int length, float scale, float softcap, int window) -> ()");
    m.def("gated_activation(Tensor x, Tensor(a!) out, int activation, bool gated) -> ()");
}

DSL_IMPLEMENT(implement)
