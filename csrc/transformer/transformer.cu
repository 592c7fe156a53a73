// What stands between a training transformer's products, on GPUs; see transformer.h for what it computes.
//
// Threads take four neighbours of a row at a time. A row's sums are a block's or a wave's, sums over rows are made in the
// order of rows by parts of DSL_PART: there are no atomics. In stochastic calls a row's moments are taken in one pass and
// exponentials are the processor's own.
#include "common/gpu_four.h"
#include "transformer/transformer.h"

namespace dsl {

constexpr int KEPT = 4096;                         // numbers of a row that are kept from one pass over it to the next
constexpr int TILE_COLUMNS = 128, ROW_GROUPS = 4;  // of a block that sums over rows: 32 threads take a row's columns
constexpr int SUMS = 3;

static_assert(TILE_COLUMNS == BLOCK_THREADS && TILE_COLUMNS / 4 * ROW_GROUPS == BLOCK_THREADS, "a thread for each");

__device__ inline int four_of(int64_t column, int64_t n) { return n - column < 4 ? static_cast<int>(n - column) : 4; }

__device__ inline float softmax_exponential(float x, bool rough) {
#if defined(DSL_GPU_HOST)
    (void)rough;
    return expf(x);
#else
    return rough ? __expf(x) : expf(x);
#endif
}

// --- bias, dropout, residual, layer norm ----------------------------------------------------------------------------

// (x + bias) * kept + residual, as it is once written in x's dtype.
__device__ inline Four summed_four(const dsl_drop_norm& how, int64_t start, int64_t column, int n) {
    Four value = read_four(how.x, start + column, n);
    if (how.bias.data != nullptr) {
        const Four bias = read_four(how.bias, column, n);
        for (int k = 0; k < 4; ++k) value.at[k] += bias.at[k];
    }
    drop_four(how.dropout, start + column, value);
    if (how.residual.data != nullptr) {
        const Four residual = read_four(how.residual, start + column, n);
        for (int k = 0; k < 4; ++k) value.at[k] += residual.at[k];
    }
    for (int k = 0; k < 4; ++k) {
        if (how.x.dtype == DSL_BF16) value.at[k] = from_bf16(to_bf16(value.at[k]));
        if (how.x.dtype == DSL_FP16) value.at[k] = from_fp16(to_fp16(value.at[k]));
    }
    return value;
}

// A row is a block's. What a thread keeps it takes again itself.
__global__ void __launch_bounds__(BLOCK_THREADS) drop_norm_kernel(const dsl_drop_norm how) {
    __shared__ float kept[KEPT];
    const int64_t n = how.hidden, start = blockIdx.x * n;
    auto again = [&](int64_t column, int some) {
        Four value{};
        if (column >= KEPT) {
            return how.summed.data != nullptr ? read_four(how.summed, start + column, some)
                                              : summed_four(how, start, column, some);
        }
        for (int k = 0; k < 4; ++k) value.at[k] = kept[column + k];
        return value;
    };
    float total = 0, squares = 0;
    for (int64_t column = 4 * threadIdx.x; column < n; column += 4 * BLOCK_THREADS) {
        const int some = four_of(column, n);
        const Four value = summed_four(how, start, column, some);
        put_four(how.summed, start + column, some, value);
        for (int k = 0; k < 4; ++k) {  // beyond the row there are zeros
            if (column < KEPT) kept[column + k] = value.at[k];
            total += value.at[k];
            squares += value.at[k] * value.at[k];
        }
    }
    if (how.normed.data == nullptr) return;
    const float mean = sum_over_block(total) / n;
    float variance;
    if (how.stochastic) {
        variance = sum_over_block(squares) / n - mean * mean;
        variance = variance < 0 ? 0 : variance;  // NaN stays NaN
    } else {
        squares = 0;
        for (int64_t column = 4 * threadIdx.x; column < n; column += 4 * BLOCK_THREADS) {
            const int some = four_of(column, n);
            const Four value = again(column, some);
            for (int k = 0; k < 4; ++k) squares += k < some ? (value.at[k] - mean) * (value.at[k] - mean) : 0;
        }
        variance = sum_over_block(squares) / n;
    }
    const float rstd = 1 / sqrtf(variance + how.eps);
    if (threadIdx.x == 0) {
        how.mean[blockIdx.x] = mean;
        how.rstd[blockIdx.x] = rstd;
    }
    for (int64_t column = 4 * threadIdx.x; column < n; column += 4 * BLOCK_THREADS) {
        const int some = four_of(column, n);
        Four value = again(column, some);
        const Four weight = read_four(how.weight, column, some), shift = read_four(how.shift, column, some);
        for (int k = 0; k < 4; ++k) value.at[k] = (value.at[k] - mean) * rstd * weight.at[k] + shift.at[k];
        put_four(how.normed, start + column, some, value);
    }
}

// The normalized numbers, from what the forward pass left.
__device__ inline Four normalized_four(const dsl_drop_norm_backward& how, int64_t row, int64_t column, int n,
                                       const Four& weight) {
    const int64_t at = row * how.hidden + column;
    if (how.summed.data != nullptr) {
        Four value = read_four(how.summed, at, n);
        for (int k = 0; k < 4; ++k) value.at[k] = (value.at[k] - how.mean[row]) * how.rstd[row];
        return value;
    }
    Four value = read_four(how.normed, at, n);
    const Four shift = read_four(how.shift, column, n);
    for (int k = 0; k < 4; ++k) {
        value.at[k] = weight.at[k] == 0 ? 0 : (value.at[k] - shift.at[k]) * (1 / weight.at[k]);
    }
    return value;
}

// A row's two sums, which its gradient takes: a row is a block's.
__global__ void __launch_bounds__(BLOCK_THREADS) norm_sums_kernel(const dsl_drop_norm_backward how, float* row_sums) {
    const int64_t n = how.hidden, row = blockIdx.x;
    float total = 0, along = 0;
    for (int64_t column = 4 * threadIdx.x; column < n; column += 4 * BLOCK_THREADS) {
        const int some = four_of(column, n);
        const Four grad = read_four(how.grad_normed, row * n + column, some),
                   weight = read_four(how.weight, column, some);
        const Four number = normalized_four(how, row, column, some, weight);
        for (int k = 0; k < 4; ++k) {
            total += grad.at[k] * weight.at[k];
            along += grad.at[k] * weight.at[k] * number.at[k];
        }
    }
    total = sum_over_block(total) / n;
    along = sum_over_block(along) / n;
    if (threadIdx.x == 0) {
        row_sums[2 * row] = total;
        row_sums[2 * row + 1] = along;
    }
}

// A thread's sums over its rows, of four columns, as those of the block's rows: in `parts`, `columns` apart.
template <int N>
__device__ inline void put_part(const Four (&sums)[N], float* parts, int64_t column, int64_t columns) {
    __shared__ float of_groups[N][ROW_GROUPS][TILE_COLUMNS];
    const int group = threadIdx.x / (TILE_COLUMNS / 4), four = threadIdx.x % (TILE_COLUMNS / 4);
    for (int which = 0; which < N; ++which) {
        for (int k = 0; k < 4; ++k) of_groups[which][group][4 * four + k] = sums[which].at[k];
    }
    __syncthreads();
    const int64_t mine = column + threadIdx.x;
    if (parts == nullptr || mine >= columns) return;
    for (int which = 0; which < N; ++which) {
        float sum = 0;
        for (int i = 0; i < ROW_GROUPS; ++i) sum += of_groups[which][i][threadIdx.x];
        parts[which * columns + mine] = sum;
    }
}

// A part's rows and a tile of columns are a block's.
__global__ void __launch_bounds__(BLOCK_THREADS)
    drop_norm_backward_kernel(const dsl_drop_norm_backward how, const float* row_sums, int64_t tiles) {
    const int64_t n = how.hidden, part = blockIdx.x / tiles, first = blockIdx.x % tiles * TILE_COLUMNS;
    const int64_t column = first + threadIdx.x % (TILE_COLUMNS / 4) * 4, end = (part + 1) * DSL_PART;
    const bool through_norm = how.grad_normed.data != nullptr;
    Four sums[SUMS] = {};  // of grad_x, grad_normed * normalized, grad_normed
    const int some = column < n ? four_of(column, n) : 0;
    Four weight{};
    if (through_norm && some > 0) weight = read_four(how.weight, column, some);
    for (int64_t row = part * DSL_PART + threadIdx.x / (TILE_COLUMNS / 4); row < how.rows && row < end && some > 0;
         row += ROW_GROUPS) {
        const int64_t at = row * n + column;
        Four grad{};
        if (through_norm) {
            const Four given = read_four(how.grad_normed, at, some);
            const Four number = normalized_four(how, row, column, some, weight);
            const float mean = row_sums[2 * row], along = row_sums[2 * row + 1], rstd = how.rstd[row];
            for (int k = 0; k < 4; ++k) {
                grad.at[k] = (given.at[k] * weight.at[k] - mean - number.at[k] * along) * rstd;
                sums[1].at[k] += given.at[k] * number.at[k];
                sums[2].at[k] += given.at[k];
            }
        }
        if (how.grad_summed.data != nullptr) {
            const Four other = read_four(how.grad_summed, at, some);
            for (int k = 0; k < 4; ++k) grad.at[k] += other.at[k];
        }
        put_four(how.grad_residual, at, some, grad);
        drop_four(how.dropout, at, grad);
        put_four(how.grad_x, at, some, grad);
        for (int k = 0; k < 4; ++k) sums[0].at[k] += grad.at[k];
    }
    put_part(sums, how.parts == nullptr ? nullptr : how.parts + part * SUMS * n, first, n);
}

// Parts, `step` apart, in their order: column i of sum `which` is a thread's.
struct Totals {
    float* of[SUMS];
};

__global__ void __launch_bounds__(BLOCK_THREADS) sum_parts_kernel(const float* parts, int64_t count, int64_t step,
                                                                  int64_t columns, int64_t sums, const Totals totals) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * BLOCK_THREADS + threadIdx.x;
    if (i >= sums * columns) return;
    float sum = 0;
    for (int64_t part = 0; part < count; ++part) sum += parts[part * step + i];
    float* to = nullptr;  // without an index that is not known when compiling
    for (int which = 0; which < SUMS; ++which) {
        if (which == i / columns) to = totals.of[which];
    }
    if (to != nullptr) to[i % columns] = sum;
}

// --- bias, GELU, dropout ----------------------------------------------------------------------------------------------

struct Gelu {
    float value, slope;
};

__device__ inline Gelu gelu(float x, bool tanh_form) {
    if (!tanh_form) {
        const float phi = 0.5f * erfcf(-0.70710678f * x);
        return {x * phi, phi + x * expf(-0.5f * x * x) * 0.39894228f};
    }
    // (1 + tanh u) / 2 is the logistic function of 2 u. Beyond 10^8 it is 0 or 1, and x's square may be infinite.
    const float squared = x * x > 1e8f ? 1e8f : x * x;
    const float logistic = 1 / (1 + expf(-1.59576912f * x * (1 + 0.044715f * squared)));
    const float steep = logistic * (1 - logistic) * (1.59576912f + 0.21406445f * squared);
    return {x * logistic, logistic + x * steep};
}

// Four neighbours of a row are a thread's.
__global__ void __launch_bounds__(BLOCK_THREADS) bias_gelu_kernel(const dsl_bias_gelu how, int64_t fours) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * BLOCK_THREADS + threadIdx.x;
    if (i >= how.rows * fours) return;
    const int64_t column = i % fours * 4, at = i / fours * how.width + column;
    const int some = four_of(column, how.width);
    Four value = read_four(how.x, at, some), bias{};
    if (how.bias.data != nullptr) bias = read_four(how.bias, column, some);
    for (int k = 0; k < 4; ++k) value.at[k] = gelu(value.at[k] + bias.at[k], how.tanh_form).value;
    drop_four(how.dropout, at, value);
    put_four(how.out, at, some, value);
}

__global__ void __launch_bounds__(BLOCK_THREADS)
    bias_gelu_backward_kernel(const dsl_bias_gelu_backward how, int64_t tiles) {
    const int64_t n = how.width, part = blockIdx.x / tiles, first = blockIdx.x % tiles * TILE_COLUMNS;
    const int64_t column = first + threadIdx.x % (TILE_COLUMNS / 4) * 4, end = (part + 1) * DSL_PART;
    const int some = column < n ? four_of(column, n) : 0;
    Four sums[1] = {}, bias{};
    if (how.bias.data != nullptr && some > 0) bias = read_four(how.bias, column, some);
    for (int64_t row = part * DSL_PART + threadIdx.x / (TILE_COLUMNS / 4); row < how.rows && row < end && some > 0;
         row += ROW_GROUPS) {
        const int64_t at = row * n + column;
        const Four x = read_four(how.x, at, some);
        Four grad = read_four(how.grad_out, at, some), out;
        for (int k = 0; k < 4; ++k) {
            const Gelu found = gelu(x.at[k] + bias.at[k], how.tanh_form);
            out.at[k] = found.value;
            grad.at[k] *= found.slope;
        }
        drop_four(how.dropout, at, grad);
        put_four(how.grad_x, at, some, grad);
        for (int k = 0; k < 4; ++k) sums[0].at[k] += grad.at[k];
        if (how.out.data == nullptr) continue;
        drop_four(how.dropout, at, out);
        put_four(how.out, at, some, out);
    }
    put_part(sums, how.grad_bias == nullptr ? nullptr : how.parts + part * n, first, n);
}

// --- masked softmax, dropout ------------------------------------------------------------------------------------------

// Scores [column, column + n) of a row, scaled and masked; -infinity beyond.
__device__ inline Four masked_four(const dsl_softmax& how, int64_t row, int64_t mask_start, int64_t column, int n) {
    Four score = read_four(how.scores, row * how.keys + column, n);
    for (int k = 0; k < 4; ++k) {
        score.at[k] *= how.scale;
        const int64_t at = mask_start + (column + k) * how.mask_key;
        if (k >= n) {
            score.at[k] = -INFINITY;
        } else if (how.seen != nullptr) {
            score.at[k] += how.seen[at] != 0 ? 0.0f : -INFINITY;
        } else if (how.mask.data != nullptr) {
            score.at[k] += read(how.mask, at);
        }
    }
    return score;
}

// A row is a wave's.
__global__ void __launch_bounds__(BLOCK_THREADS) softmax_kernel(const dsl_softmax how) {
    const int wave = wave_size(), lane = threadIdx.x % wave;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (BLOCK_THREADS / wave) + threadIdx.x / wave;
    if (row >= how.batch * how.heads * how.queries) return;  // whole waves
    const int64_t query = row % how.queries, head = row / how.queries % how.heads, one = row / how.queries / how.heads;
    const int64_t mask_start = one * how.mask_batch + head * how.mask_head + query * how.mask_query, n = how.keys;
    float most = -INFINITY, weight = 0;
    for (int64_t column = 4 * lane; column < n; column += 4 * wave) {
        const Four score = masked_four(how, row, mask_start, column, four_of(column, n));
        float higher = most;
        for (int k = 0; k < 4; ++k) higher = larger(higher, score.at[k]);
        if (higher == -INFINITY) continue;
        weight *= softmax_exponential(most - higher, how.stochastic);
        for (int k = 0; k < 4; ++k) weight += softmax_exponential(score.at[k] - higher, how.stochastic);
        most = higher;
    }
    const float whole = most_over(most, wave);
    weight = sum_over(most == -INFINITY ? 0 : weight * softmax_exponential(most - whole, how.stochastic), wave);
    const float inverse = 1 / weight;
    for (int64_t column = 4 * lane; column < n; column += 4 * wave) {
        const int some = four_of(column, n);
        Four probs = masked_four(how, row, mask_start, column, some);
        for (int k = 0; k < 4; ++k) {
            probs.at[k] = whole == -INFINITY ? 0 : softmax_exponential(probs.at[k] - whole, how.stochastic) * inverse;
        }
        put_four(how.probs, row * n + column, some, probs);
        if (how.dropped.data == nullptr) continue;
        drop_four(how.dropout, row * n + column, probs);
        put_four(how.dropped, row * n + column, some, probs);
    }
}

__global__ void __launch_bounds__(BLOCK_THREADS) softmax_backward_kernel(const dsl_softmax_backward how) {
    const int wave = wave_size(), lane = threadIdx.x % wave;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (BLOCK_THREADS / wave) + threadIdx.x / wave, n = how.keys;
    if (row >= how.rows) return;  // whole waves
    float along = 0;
    for (int64_t column = 4 * lane; column < n; column += 4 * wave) {
        const int some = four_of(column, n);
        Four grad = read_four(how.grad_dropped, row * n + column, some);
        const Four probs = read_four(how.probs, row * n + column, some);
        drop_four(how.dropout, row * n + column, grad);
        for (int k = 0; k < 4; ++k) along += grad.at[k] * probs.at[k];
    }
    along = sum_over(along, wave);
    for (int64_t column = 4 * lane; column < n; column += 4 * wave) {
        const int some = four_of(column, n);
        Four grad = read_four(how.grad_dropped, row * n + column, some);
        const Four probs = read_four(how.probs, row * n + column, some);
        drop_four(how.dropout, row * n + column, grad);
        for (int k = 0; k < 4; ++k) grad.at[k] = probs.at[k] * (grad.at[k] - along) * how.scale;
        put_four(how.grad_scores, row * n + column, some, grad);
    }
}

static int64_t parts_of(int64_t rows) { return (rows + DSL_PART - 1) / DSL_PART; }

}  // namespace dsl

extern "C" int dsl_gpu_drop_norm(const dsl_drop_norm* how, void* stream) {
    const auto rows = static_cast<uint32_t>(how->rows);
    if (rows > 0) DSL_LAUNCH(dsl::drop_norm_kernel, rows, dsl::BLOCK_THREADS, stream, *how);
    return dsl::launch_error();
}

extern "C" int dsl_gpu_drop_norm_backward(const dsl_drop_norm_backward* how, void* stream) {
    using namespace dsl;
    const int64_t n = how->hidden, parts = parts_of(how->rows), tiles = (n + TILE_COLUMNS - 1) / TILE_COLUMNS;
    float* const row_sums = how->parts == nullptr ? nullptr : how->parts + parts * SUMS * n;
    if (parts * tiles > 0) {
        if (how->grad_normed.data != nullptr) {
            const auto rows = static_cast<uint32_t>(how->rows);
            DSL_LAUNCH(norm_sums_kernel, rows, BLOCK_THREADS, stream, *how, row_sums);
            if (const int error = launch_error()) return error;
        }
        const auto blocks = static_cast<uint32_t>(parts * tiles);
        DSL_LAUNCH(drop_norm_backward_kernel, blocks, BLOCK_THREADS, stream, *how, row_sums, tiles);
        if (const int error = launch_error()) return error;
    }
    const Totals totals{{how->grad_bias, how->grad_weight, how->grad_shift}};
    if (n == 0 || (totals.of[0] == nullptr && totals.of[1] == nullptr && totals.of[2] == nullptr)) return 0;
    const uint32_t blocks = blocks_for(SUMS * n, BLOCK_THREADS);
    DSL_LAUNCH(sum_parts_kernel, blocks, BLOCK_THREADS, stream, how->parts, parts, SUMS * n, n, SUMS, totals);
    return launch_error();
}

extern "C" int dsl_gpu_bias_gelu(const dsl_bias_gelu* how, void* stream) {
    using namespace dsl;
    const int64_t fours = (how->width + 3) / 4;
    const uint32_t blocks = blocks_for(how->rows * fours, BLOCK_THREADS);
    if (blocks > 0) DSL_LAUNCH(bias_gelu_kernel, blocks, BLOCK_THREADS, stream, *how, fours);
    return launch_error();
}

extern "C" int dsl_gpu_bias_gelu_backward(const dsl_bias_gelu_backward* how, void* stream) {
    using namespace dsl;
    const int64_t n = how->width, parts = parts_of(how->rows), tiles = (n + TILE_COLUMNS - 1) / TILE_COLUMNS;
    if (parts * tiles > 0) {
        const auto blocks = static_cast<uint32_t>(parts * tiles);
        DSL_LAUNCH(bias_gelu_backward_kernel, blocks, BLOCK_THREADS, stream, *how, tiles);
        if (const int error = launch_error()) return error;
    }
    if (n == 0 || how->grad_bias == nullptr) return 0;
    const uint32_t blocks = blocks_for(n, BLOCK_THREADS);
    DSL_LAUNCH(sum_parts_kernel, blocks, BLOCK_THREADS, stream, how->parts, parts, n, n, 1, Totals{{how->grad_bias}});
    return launch_error();
}

extern "C" int dsl_gpu_softmax(const dsl_softmax* how, void* stream) {
    using namespace dsl;
    // Waves of 64 need so many; where they have 32 the second half of the blocks has nothing to do.
    const uint32_t blocks = blocks_for(how->batch * how->heads * how->queries, BLOCK_THREADS / 64);
    if (blocks > 0) DSL_LAUNCH(softmax_kernel, blocks, BLOCK_THREADS, stream, *how);
    return launch_error();
}

extern "C" int dsl_gpu_softmax_backward(const dsl_softmax_backward* how, void* stream) {
    using namespace dsl;
    const uint32_t blocks = blocks_for(how->rows, BLOCK_THREADS / 64);
    if (blocks > 0) DSL_LAUNCH(softmax_backward_kernel, blocks, BLOCK_THREADS, stream, *how);
    return launch_error();
}
