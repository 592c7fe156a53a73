// Products of one to eight rows with a weight matrix on GPUs, and packed weights made whole: the weight is read once, 4
// bytes or 16 by a thread, neighbours beside each other.
#include "common/gpu_block.h"
#include "transformer_inference/product.h"

namespace dsl {

constexpr int ROWS = DSL_FEW_ROWS, PANEL = DSL_PANEL, SLICES = BLOCK_THREADS / PANEL;

struct alignas(16) Sixteen {
    uint32_t words[4];
};

// Numbers [i, i + N) of a tensor that begin at a multiple of 16 bytes: 4 of float32, 8 of 16 bits.
template <int N>
__device__ void read_pack(const dsl_tensor& from, int64_t i, float* to) {
    const char* const place = static_cast<const char*>(from.data) + i * (16 / N);
    Sixteen raw{};
    if (check_aligned(place, 16)) raw = *reinterpret_cast<const Sixteen*>(place);
    for (int k = 0; k < N; ++k) {
        if constexpr (N == 4) {
            memcpy(&to[k], &raw.words[k], 4);
        } else {
            const auto bits = static_cast<uint16_t>(raw.words[k / 2] >> (16 * (k % 2)));
            to[k] = from.dtype == DSL_BF16 ? from_bf16(bits) : from_fp16(bits);
        }
    }
}

// An output is a wave's, whose lanes share the inputs; N: in packs of so many, or one by one.
template <int N>
__global__ void __launch_bounds__(BLOCK_THREADS) whole_kernel(const dsl_product p) {
    const int wave = wave_size(), lane = threadIdx.x % wave;
    const int64_t output = static_cast<int64_t>(blockIdx.x) * (BLOCK_THREADS / wave) + threadIdx.x / wave;
    if (output >= p.out) return;  // whole waves
    float sums[ROWS] = {};
    for (int64_t k = lane * N; k < p.width; k += wave * N) {
        float weights[N], inputs[N];
        if constexpr (N == 1) weights[0] = read(p.weight, output * p.width + k);
        if constexpr (N > 1) read_pack<N>(p.weight, output * p.width + k, weights);
        for (int r = 0; r < ROWS; ++r) {
            if (r >= p.rows) continue;
            if constexpr (N == 1) inputs[0] = read(p.input, r * p.width + k);
            if constexpr (N > 1) read_pack<N>(p.input, r * p.width + k, inputs);
            for (int i = 0; i < N; ++i) sums[r] += weights[i] * inputs[i];
        }
    }
    for (int r = 0; r < p.rows; ++r) {
        const float sum = sum_over(sums[r], wave);
        if (lane == 0) put(p.y, r * p.out + output, sum + (p.bias.data == nullptr ? 0 : read(p.bias, output)));
    }
}

// The integer of one of the inputs that four packed bytes hold.
template <int BITS>
__device__ int integer(uint32_t word, int i) {
    return BITS == 8 ? static_cast<int>(word >> (8 * i) & 255) - 128
                     : static_cast<int>(word >> (8 * (i % 4) + i / 4 * 4) & 15) - 8;
}

// A panel is a block's: 16 outputs times 8 slices of the inputs.
template <int BITS>
__global__ void __launch_bounds__(BLOCK_THREADS) packed_kernel(const dsl_product p) {
    constexpr int INPUTS = 32 / BITS;  // in four bytes
    __shared__ float of_slices[SLICES][ROWS][PANEL];
    const int output = threadIdx.x % PANEL, slice = threadIdx.x / PANEL;
    const int64_t panel = blockIdx.x, groups = p.width / p.group, words = p.width / INPUTS;
    const auto* const weight = static_cast<const uint32_t*>(p.weight.data) + panel * words * PANEL;
    float sums[ROWS] = {};
    for (int64_t word = slice; word < words; word += SLICES) {
        const uint32_t packed = weight[word * PANEL + output];
        const int64_t k = word * INPUTS;
        const float scale = from_bf16(p.scales[(panel * groups + k / p.group) * PANEL + output]);
        for (int r = 0; r < ROWS; ++r) {
            if (r >= p.rows) continue;
            float sum = 0;
            for (int i = 0; i < INPUTS; ++i) {
                if (k + i < p.columns) sum += integer<BITS>(packed, i) * read(p.input, r * p.columns + k + i);
            }
            sums[r] += sum * scale;
        }
    }
    for (int r = 0; r < ROWS; ++r) of_slices[slice][r][output] = sums[r];
    __syncthreads();
    const int row = slice;  // there are as many slices as rows
    const int64_t at = panel * PANEL + output;
    if (row >= p.rows || at >= p.out) return;
    float sum = p.bias.data == nullptr ? 0 : read(p.bias, at);
    for (int i = 0; i < SLICES; ++i) sum += of_slices[i][row][output];
    put(p.y, row * p.out + at, sum);
}

template <int BITS>
__global__ void __launch_bounds__(BLOCK_THREADS) unpack_kernel(const dsl_product p, const dsl_tensor to) {
    constexpr int INPUTS = 32 / BITS;
    const int64_t i = static_cast<int64_t>(blockIdx.x) * BLOCK_THREADS + threadIdx.x;
    if (i >= p.out * p.columns) return;
    const int64_t at = i / p.columns, k = i % p.columns, panel = at / PANEL, output = at % PANEL;
    const int64_t groups = p.width / p.group, words = p.width / INPUTS;
    const uint32_t packed = static_cast<const uint32_t*>(p.weight.data)[(panel * words + k / INPUTS) * PANEL + output];
    const float scale = from_bf16(p.scales[(panel * groups + k / p.group) * PANEL + output]);
    put(to, i, integer<BITS>(packed, static_cast<int>(k % INPUTS)) * scale);
}

static_assert(SLICES == ROWS, "a slice of threads writes a row");

static bool in_packs(const dsl_product& p, int64_t numel) {
    const bool aligned =
        (reinterpret_cast<uintptr_t>(p.weight.data) | reinterpret_cast<uintptr_t>(p.input.data)) % 16 == 0;
    return aligned && p.weight.dtype == p.input.dtype && p.width % numel == 0;
}

}  // namespace dsl

extern "C" int dsl_gpu_product(const dsl_product* product, void* stream) {
    using namespace dsl;
    const dsl_product& p = *product;
    if (p.out == 0) return 0;
    const uint32_t panels = blocks_for(p.out, PANEL), outputs = blocks_for(p.out, BLOCK_THREADS / 64);
    if (p.bits == 8) {
        DSL_LAUNCH(packed_kernel<8>, panels, BLOCK_THREADS, stream, p);
    } else if (p.bits == 4) {
        DSL_LAUNCH(packed_kernel<4>, panels, BLOCK_THREADS, stream, p);
    } else if (p.weight.dtype == DSL_FP32 && in_packs(p, 4)) {
        DSL_LAUNCH(whole_kernel<4>, outputs, BLOCK_THREADS, stream, p);
    } else if (p.weight.dtype != DSL_FP32 && in_packs(p, 8)) {
        DSL_LAUNCH(whole_kernel<8>, outputs, BLOCK_THREADS, stream, p);
    } else {
        DSL_LAUNCH(whole_kernel<1>, outputs, BLOCK_THREADS, stream, p);
    }
    return launch_error();
}

extern "C" int dsl_gpu_unpack(const dsl_product* product, const dsl_tensor* to, void* stream) {
    using namespace dsl;
    const uint32_t blocks = blocks_for(product->out * product->columns, BLOCK_THREADS);
    if (blocks > 0 && product->bits == 8) DSL_LAUNCH(unpack_kernel<8>, blocks, BLOCK_THREADS, stream, *product, *to);
    if (blocks > 0 && product->bits == 4) DSL_LAUNCH(unpack_kernel<4>, blocks, BLOCK_THREADS, stream, *product, *to);
    return launch_error();
}
