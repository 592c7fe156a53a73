// Numbers to integers of 8 or 4 bits by groups, and back: a group is a wave's, whose lanes take pairs of neighbours.
#include "common/gpu_block.h"
#include "quantizer/quantizer.h"

namespace dsl {

struct Place {
    int64_t row, first, n;  // in its row; numbers
};

__device__ Place place_of(const dsl_groups& how, int64_t index) {
    const int64_t first = index % how.groups * how.group;
    return {index / how.groups, first, how.width - first < how.group ? how.width - first : how.group};
}

// The number in the tensor's dtype that is not below `value`, which is not negative.
__device__ float rounded_up(const dsl_tensor& like, float value) {
    if (like.dtype == DSL_FP32) return value;
    const bool brain = like.dtype == DSL_BF16;
    const uint16_t bits = brain ? to_bf16(value) : to_fp16(value);
    const float near = brain ? from_bf16(bits) : from_fp16(bits);
    if (!(near < value)) return near;
    return brain ? from_bf16(bits + 1) : from_fp16(bits + 1);
}

__global__ void __launch_bounds__(BLOCK_THREADS) quantize_kernel(const dsl_groups how) {
    const int wave = wave_size(), lane = threadIdx.x % wave;
    const int64_t index = (static_cast<int64_t>(blockIdx.x) * BLOCK_THREADS + threadIdx.x) / wave;
    if (index >= how.rows * how.groups) return;  // whole waves
    const Place place = place_of(how, index);
    const int64_t start = place.row * how.width + place.first;
    const bool symmetric = how.minima.data == nullptr;
    const int half = 1 << (how.bits - 1);
    const float low = symmetric ? -half : 0, high = symmetric ? half - 1 : 2 * half - 1;
    float most = -INFINITY, least = -INFINITY, beyond = 0;  // least: of the numbers with the other sign, the most
    for (int64_t i = lane; i < place.n; i += wave) {
        const float value = read(how.x, start + i);
        most = value > most ? value : most;
        least = -value > least ? -value : least;
        beyond += value - value;
    }
    most = most_over(most, wave), least = most_over(least, wave), beyond = sum_over(beyond, wave);
    float minimum = 0, scale;
    if (symmetric) {
        scale = (most > least ? most : least) / (high + 0.5f);
    } else {
        minimum = -least + beyond;
        if (how.minima.dtype == DSL_BF16) minimum = from_bf16(to_bf16(minimum));
        if (how.minima.dtype == DSL_FP16) minimum = from_fp16(to_fp16(minimum));
        scale = most - minimum;
        scale = (scale < 0 ? 0 : scale) / high;
    }
    scale += beyond;
    const float step = rounded_up(how.scales, scale - scale == 0 ? scale : NAN);
    if (lane == 0) {
        put(how.scales, index, step);
        if (!symmetric) put(how.minima, index, minimum);
    }
    const float inverse = step > 0 ? 1 / step : 0;
    uint8_t* const values = how.values + place.row * how.value_bytes;
    for (int64_t i = 2 * lane; i < place.n; i += 2 * wave) {
        int whole[2] = {};
        for (int k = 0; k < 2 && i + k < place.n; ++k) {
            float value = (read(how.x, start + i + k) - minimum) * inverse;
            value = value == value ? value : 0;
            value = value < low ? low : value > high ? high : value;
            whole[k] = static_cast<int>(rintf(value));
            if (how.bits == 8) values[place.first + i + k] = static_cast<uint8_t>(whole[k]);
        }
        if (how.bits == 4) values[(place.first + i) / 2] = static_cast<uint8_t>((whole[0] & 15) | (whole[1] & 15) << 4);
    }
}

__global__ void __launch_bounds__(BLOCK_THREADS) dequantize_kernel(const dsl_groups how) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * BLOCK_THREADS + threadIdx.x;
    if (i >= how.rows * how.width) return;
    const int64_t row = i / how.width, at = i % how.width, index = row * how.groups + at / how.group;
    const uint8_t* const values = how.values + row * how.value_bytes;
    const bool symmetric = how.minima.data == nullptr;
    const int sign = symmetric ? 1 << (how.bits - 1) : 0;  // two's complement by (v ^ sign) - sign
    const int whole = how.bits == 8 ? values[at] : values[at / 2] >> (4 * (at % 2)) & 15;
    const float scaled = static_cast<float>((whole ^ sign) - sign) * read(how.scales, index);
    put(how.x, i, symmetric ? scaled : scaled + read(how.minima, index));
}

}  // namespace dsl

extern "C" int dsl_gpu_quantize(const dsl_groups* groups, void* stream) {
    using namespace dsl;
    // Waves of 64 need so many; where they have 32 the second half of the blocks has nothing to do.
    const uint32_t blocks = blocks_for(groups->rows * groups->groups, BLOCK_THREADS / 64);
    if (blocks > 0) DSL_LAUNCH(quantize_kernel, blocks, BLOCK_THREADS, stream, *groups);
    return launch_error();
}

extern "C" int dsl_gpu_dequantize(const dsl_groups* groups, void* stream) {
    using namespace dsl;
    const uint32_t blocks = blocks_for(groups->rows * groups->width, BLOCK_THREADS);
    if (blocks > 0) DSL_LAUNCH(dequantize_kernel, blocks, BLOCK_THREADS, stream, *groups);
    return launch_error();
}
