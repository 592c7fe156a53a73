// The ops deepspeedlite::sparse_attention_forward and sparse_attention_backward, on GPUs and the CPU.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <memory>

#include "common/arguments.h"
#include "common/isa.h"
#include "common/on_gpu.h"
#include "sparse_attn/cpu.h"

namespace {

using dsl::Arguments;
using dsl::MaybeTensor;
using dsl::Tensor;
using torch::headeronly::ScalarType;

// What one op is given, checked as it is taken over.
class Given {
 public:
    Given(const char* op, const Tensor& q, const Tensor& k, int64_t block, int64_t list_batch, int64_t list_head)
        : arguments_(op, q) {
        arguments_.check(q.dim() == 4 && k.dim() == 4, "q and k must have four dimensions");
        how.batch = q.size(0), how.heads = q.size(1), how.queries = q.size(2), how.dim = q.size(3);
        how.keys = k.size(2), how.block = block, how.list_batch = list_batch, how.list_head = list_head;
        arguments_.check(block == 16 || block == 32 || block == 64 || block == 128, "no such block size");
        arguments_.check(how.queries % block == 0 && how.keys % block == 0, "block must divide queries and keys");
        arguments_.check(how.dim > 0 && how.dim <= DSL_MOST_HEAD, "a head must have 1 to 256 numbers");
    }

    dsl_heads heads(const char* name, const Tensor& tensor, int64_t tokens) const {
        arguments_.check(tensor.dim() == 4 && tensor.size(0) == how.batch && tensor.size(1) == how.heads &&
                             tensor.size(2) == tokens && tensor.size(3) == how.dim,
                         "tensors of heads must have the shapes of q and k");
        arguments_.check(how.dim == 1 || tensor.stride(3) == 1, "the numbers of a head must lie side by side");
        const dsl_tensor found = arguments_.any_steps(name, tensor);
        arguments_.check(how.q.x.data == nullptr || found.dtype == how.q.x.dtype,
                         "tensors of heads must have q's dtype");
        return {found, tensor.stride(0), tensor.stride(1), tensor.stride(2)};
    }

    dsl_blocks blocks(const Tensor& starts, const Tensor& blocks, const MaybeTensor& partial, int64_t rows) const {
        const int64_t lists = (how.batch - 1) * how.list_batch + (how.heads - 1) * how.list_head + 1;
        arguments_.check(starts.numel() >= lists * rows + 1, "starts are too few");
        dsl_blocks found{};
        found.starts = arguments_.data<int32_t>("starts", starts, ScalarType::Int, starts.numel());
        found.blocks = arguments_.data<int32_t>("blocks", blocks, ScalarType::Int, blocks.numel());
        if (partial.has_value()) {
            found.partial = arguments_.data<int32_t>("partial", *partial, ScalarType::Int, blocks.numel());
        }
        return found;
    }

    void masks(const MaybeTensor& partial_masks) {
        if (!partial_masks.has_value()) return;
        how.partial_masks =
            arguments_.data<uint8_t>("partial_masks", *partial_masks, ScalarType::Bool, partial_masks->numel());
    }

    // Views of (batch, heads, queries, keys); `kinds` has a digit to the base of 4 for each.
    void biases(const MaybeTensor& mask, const MaybeTensor& padding, const MaybeTensor& positions, int64_t kinds) {
        const MaybeTensor* const given[DSL_BIASES] = {&mask, &padding, &positions};
        for (int i = 0; i < DSL_BIASES; ++i, kinds /= 4) {
            if (!given[i]->has_value()) continue;
            const Tensor& tensor = **given[i];
            arguments_.check(tensor.dim() == 4 && tensor.size(0) == how.batch && tensor.size(1) == how.heads &&
                                 tensor.size(2) == how.queries && tensor.size(3) == how.keys,
                             "masks must be seen as (batch, heads, queries, keys)");
            dsl_bias& bias = how.biases[i];
            bias.kind = static_cast<dsl_bias_kind>(kinds % 4);
            bias.x =
                bias.kind == DSL_SEEN ? dsl_tensor{tensor.data_ptr(), DSL_FP32} : arguments_.any_steps("mask", tensor);
            arguments_.check((bias.kind == DSL_SEEN) == (tensor.scalar_type() == ScalarType::Bool),
                             "a mask's kind is wrong");
            bias.batch = tensor.stride(0), bias.head = tensor.stride(1);
            bias.row = tensor.stride(2), bias.column = tensor.stride(3);
        }
    }

    void softmax(double scale, bool causal, double dropout, int64_t seed, int64_t stream) {
        how.scale = static_cast<float>(scale);
        how.causal = causal;
        if (dropout <= 0) return;
        how.dropout.seed = static_cast<uint64_t>(seed), how.dropout.stream = static_cast<uint64_t>(stream);
        how.dropout.threshold = static_cast<uint32_t>(std::min(dropout * 4294967296.0, 4294967295.0));
        how.dropout.scale = dropout >= 1 ? 0.0f : static_cast<float>(1 / (1 - dropout));
    }

    float* each_query(const char* name, const Tensor& tensor) const {
        return arguments_.data<float>(name, tensor, ScalarType::Float, how.batch * how.heads * how.queries);
    }

    const Arguments& arguments() const { return arguments_; }

    dsl_sparse_attention how{};

 private:
    const Arguments arguments_;
};

using Work = dsl_sparse_work;

// Does work `of(0)` to `of(count - 1)`, each by one thread that takes the next when it is done with one.
template <class Of>
void share(const dsl_sparse_attention& how, int64_t count, dsl_sparse_kernel* kernel, bool backward, const Of& of) {
    std::atomic<int64_t> next{0};
    dsl::parallel_for(count, [&](int64_t, int64_t) {
        std::unique_ptr<float[]> memory;
        int64_t floats = -1;
        for (int64_t i = next++; i < count; i = next++) {
            const Work work = of(i);
            const int64_t needed = dsl::SparseRoom(how, work, backward, nullptr).floats + 16;
            if (needed > floats) memory.reset(new float[floats = needed]);
            const uintptr_t start = (reinterpret_cast<uintptr_t>(memory.get()) + 63) & ~uintptr_t{63};
            kernel(&how, &work, reinterpret_cast<float*>(start));
        }
    });
}

int64_t threads() {
    uint32_t found = 1;
    TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&found));
    return std::max<int64_t>(found, 1);
}

void forward_on_cpu(const dsl_sparse_attention& how) {
    const int64_t strips = how.queries / dsl::strip_of(how);
    const int32_t pairs = DSL_BEST(dsl_sparse_pairs)(&how);
    share(how, how.batch * how.heads * strips, DSL_BEST(dsl_sparse_forward), false, [&](int64_t i) {
        const int64_t strip = i % strips, head = i / strips;
        return Work{head / how.heads, head % how.heads, strip, strip + 1, 0, how.keys, 0, 0, pairs};
    });
}

// One thread for a head where there are heads enough: scores are made once. Else strips, and then parts of the keys.
void backward_on_cpu(const dsl_sparse_attention& how) {
    const int64_t strips = how.queries / dsl::strip_of(how), heads = how.batch * how.heads, all = threads();
    const int32_t pairs = DSL_BEST(dsl_sparse_pairs)(&how);
    dsl_sparse_kernel* const kernel = DSL_BEST(dsl_sparse_backward);
    const auto work = [&](int64_t head) {
        return Work{head / how.heads, head % how.heads, 0, strips, 0, how.keys, 1, 1, pairs};
    };
    if (how.dpositions == nullptr && (heads % all == 0 || heads >= 4 * all)) {
        return share(how, heads, kernel, true, work);
    }
    if (how.dpositions == nullptr) {
        share(how, heads * strips, kernel, true, [&](int64_t i) {
            Work one = work(i / strips);
            one.first_strip = i % strips, one.end_strip = one.first_strip + 1, one.wants_dkv = 0;
            return one;
        });
    } else {  // which heads may share: a strip of all of them is one thread's
        dsl::parallel_for(strips, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin * heads; i < end * heads; ++i) {
                Work one = work(i % heads);
                one.first_strip = i / heads, one.end_strip = one.first_strip + 1, one.wants_dkv = 0;
                const int64_t floats = dsl::SparseRoom(how, one, true, nullptr).floats;
                kernel(&how, &one, dsl::scratch_of_thread(floats));
            }
        });
    }
    const int64_t blocks = how.keys / how.block, parts = std::min(blocks, std::max<int64_t>(4 * all / heads, 1));
    share(how, heads * parts, kernel, true, [&](int64_t i) {
        Work one = work(i / parts);
        one.first_key = i % parts * blocks / parts * how.block;
        one.end_key = (i % parts + 1) * blocks / parts * how.block;
        one.wants_dq = 0;
        return one;
    });
}

void forward(Tensor q, Tensor k, Tensor v, Tensor starts, Tensor blocks, MaybeTensor partial, MaybeTensor partial_masks,
             MaybeTensor mask, MaybeTensor padding, MaybeTensor positions, int64_t kinds, Tensor out, Tensor lse,
             int64_t block, int64_t list_batch, int64_t list_head, double scale, bool causal, double dropout,
             int64_t seed, int64_t stream) {
    Given given("sparse_attention_forward", q, k, block, list_batch, list_head);
    dsl_sparse_attention& how = given.how;
    if (q.numel() == 0) return;
    how.q = given.heads("q", q, how.queries);
    how.k = given.heads("k", k, how.keys);
    how.v = given.heads("v", v, how.keys);
    how.out = given.heads("out", out, how.queries);
    how.lse = given.each_query("lse", lse);
    how.by_row = given.blocks(starts, blocks, partial, how.queries / block);
    given.masks(partial_masks);
    given.biases(mask, padding, positions, kinds);
    given.softmax(scale, causal, dropout, seed, stream);
#if defined(DSL_GPU)
    if (!given.arguments().on_cpu) {
        return dsl::on_gpu("sparse_attention_forward", given.arguments().device_index,
                           [&](void* at) { return dsl_gpu_sparse_forward(&how, at); });
    }
#endif
    forward_on_cpu(how);
}

void backward(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor dout, Tensor starts, Tensor blocks,
              MaybeTensor partial, Tensor column_starts, Tensor column_blocks, MaybeTensor column_partial,
              MaybeTensor partial_masks, MaybeTensor mask, MaybeTensor padding, MaybeTensor positions, int64_t kinds,
              Tensor dq, Tensor dk, Tensor dv, MaybeTensor dpositions, int64_t block, int64_t list_batch,
              int64_t list_head, double scale, bool causal, double dropout, int64_t seed, int64_t stream) {
    Given given("sparse_attention_backward", q, k, block, list_batch, list_head);
    dsl_sparse_attention& how = given.how;
    if (q.numel() == 0) return;
    how.q = given.heads("q", q, how.queries);
    how.k = given.heads("k", k, how.keys);
    how.v = given.heads("v", v, how.keys);
    how.out = given.heads("out", out, how.queries);
    how.dout = given.heads("dout", dout, how.queries);
    how.dq = given.heads("dq", dq, how.queries);
    how.dk = given.heads("dk", dk, how.keys);
    how.dv = given.heads("dv", dv, how.keys);
    how.lse = given.each_query("lse", lse);
    how.by_row = given.blocks(starts, blocks, partial, how.queries / block);
    how.by_column = given.blocks(column_starts, column_blocks, column_partial, how.keys / block);
    given.masks(partial_masks);
    given.biases(mask, padding, positions, kinds);
    given.softmax(scale, causal, dropout, seed, stream);
    if (dpositions.has_value()) {
        given.arguments().check(dpositions->dim() == 4, "dpositions must have four dimensions");
        const int64_t numel = dpositions->size(0) * dpositions->size(1) * how.queries * how.keys;
        how.dpositions = given.arguments().data<float>("dpositions", *dpositions, ScalarType::Float, numel);
        how.dpositions_head = dpositions->size(1) == 1 ? 0 : how.queries * how.keys;
        how.dpositions_batch = dpositions->size(0) == 1 ? 0 : dpositions->size(1) * how.queries * how.keys;
    }
#if defined(DSL_GPU)
    if (!given.arguments().on_cpu) {
        const Tensor delta = dsl::scratch(given.arguments().device_index, how.batch * how.heads * how.queries);
        how.delta = static_cast<float*>(delta.data_ptr());
        return dsl::on_gpu("sparse_attention_backward", given.arguments().device_index,
                           [&](void* at) { return dsl_gpu_sparse_backward(&how, at); });
    }
#endif
    backward_on_cpu(how);
}

void implement(torch::stable::detail::StableLibrary& m) {
    m.impl("sparse_attention_forward", TORCH_BOX(&forward));
    m.impl("sparse_attention_backward", TORCH_BOX(&backward));
}

}  // namespace

#define DSL_SCHEMA_BIASES "Tensor? partial_masks, Tensor? mask, Tensor? padding, Tensor? positions, int kinds, "
#define DSL_SCHEMA_REST \
    "int block, int list_batch, int list_head, float scale, bool causal, float dropout, int seed, int stream) -> ()"

STABLE_TORCH_LIBRARY_FRAGMENT(deepspeedlite, m) {
    m.def(
        "sparse_attention_forward(Tensor q, Tensor k, Tensor v, Tensor starts, Tensor blocks, Tensor? "
        "partial, " DSL_SCHEMA_BIASES "Tensor(a!) out, Tensor(b!) lse, " DSL_SCHEMA_REST);
    m.def(
        "sparse_attention_backward(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor dout, Tensor starts, "
        "Tensor blocks, Tensor? partial, Tensor column_starts, Tensor column_blocks, Tensor? "
        "column_partial, " DSL_SCHEMA_BIASES
        "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!)? dpositions, " DSL_SCHEMA_REST);
}

DSL_IMPLEMENT(implement)
