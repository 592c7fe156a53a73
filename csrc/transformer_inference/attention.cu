// Attention of a few query tokens over the cache on GPUs. A block has one kv head of one sequence and a chunk of the
// positions, and reads its keys and values once for up to eight rows (query heads' tokens); a second kernel puts the
// chunks together. Sizes alone decide the order of sums.
#include "common/gpu_block.h"
#include "transformer_inference/between.h"

namespace dsl {

constexpr int ROWS = 8;

__device__ inline float most_over_block(float value) {
    __shared__ float of_waves[BLOCK_THREADS / 32];
    const int wave = wave_size();
    value = most_over(value, wave);
    __syncthreads();  // the last call's have been read
    if (threadIdx.x % wave == 0) of_waves[threadIdx.x / wave] = value;
    __syncthreads();
    for (int i = 0; i < BLOCK_THREADS / wave; ++i) value = larger(value, of_waves[i]);
    return value;
}

struct Item {
    int64_t batch, kv, first, n;  // positions [first, first + n)
};

// A score of one row and position, once it is scaled: -infinity where it is not to be seen.
__device__ inline float seen_score(const dsl_attention& how, const Item& item, int64_t row, int64_t position,
                                   float score) {
    const int64_t at = how.length - how.tokens + row % how.tokens;  // the query's position
    if (how.softcap != 0) score = tanhf(score / how.softcap) * how.softcap;
    if (how.slopes != nullptr) {
        const int64_t head = item.kv * (how.heads / how.kv_heads) + row / how.tokens;
        score += how.slopes[head] * static_cast<float>(position - at);
    }
    bool seen = position <= at && (how.window == 0 || position > at - how.window);
    seen = seen && (how.mask == nullptr || how.mask[item.batch * how.mask_batch + position] != 0);
    return seen ? score : -INFINITY;
}

__global__ void __launch_bounds__(BLOCK_THREADS) attend_kernel(const dsl_attention how) {
    __shared__ float scores[ROWS][DSL_CHUNK];
    const int64_t head = blockIdx.x / how.chunks, chunk = blockIdx.x % how.chunks, first = chunk * DSL_CHUNK;
    const Item item{head / how.kv_heads, head % how.kv_heads, first,
                    how.length - first < DSL_CHUNK ? how.length - first : DSL_CHUNK};
    const int64_t rows = how.heads / how.kv_heads * how.tokens;
    const int64_t cache = item.batch * how.kv_batch + item.kv * how.kv_head + first * how.kv_token;
    const int wave = wave_size(), lane = threadIdx.x % wave;
    for (int64_t base = 0; base < rows; base += ROWS) {
        const int count = rows - base < ROWS ? static_cast<int>(rows - base) : ROWS;
        const int64_t query = (head * rows + base) * how.dim;
        for (int64_t i = threadIdx.x / wave; i < item.n; i += BLOCK_THREADS / wave) {
            float sums[ROWS] = {};
            for (int64_t d = lane; d < how.dim; d += wave) {
                const float key = read(how.keys, cache + i * how.kv_token + d);
                for (int r = 0; r < ROWS; ++r) {
                    if (r < count) sums[r] += key * read(how.queries, query + r * how.dim + d);
                }
            }
            for (int r = 0; r < count; ++r) {
                const float score = sum_over(sums[r], wave) * how.scale;
                if (lane == 0) scores[r][i] = seen_score(how, item, base + r, first + i, score);
            }
        }
        __syncthreads();
        float* const parts = how.parts + ((head * how.chunks + chunk) * rows + base) * (how.dim + 2);
        for (int r = 0; r < count; ++r) {
            float most = -INFINITY, weight = 0;
            for (int64_t i = threadIdx.x; i < item.n; i += BLOCK_THREADS) most = larger(most, scores[r][i]);
            most = most_over_block(most);
            for (int64_t i = threadIdx.x; i < item.n; i += BLOCK_THREADS) {
                const float one = most == -INFINITY ? 0 : expf(scores[r][i] - most);
                scores[r][i] = one;
                weight += one;
            }
            weight = sum_over_block(weight);
            if (threadIdx.x == 0) {
                parts[r * (how.dim + 2) + how.dim] = most;
                parts[r * (how.dim + 2) + how.dim + 1] = weight;
            }
        }
        __syncthreads();
        for (int64_t d = threadIdx.x; d < how.dim; d += BLOCK_THREADS) {
            float mixed[ROWS] = {};
            for (int64_t i = 0; i < item.n; ++i) {
                const float value = read(how.values, cache + i * how.kv_token + d);
                for (int r = 0; r < ROWS; ++r) {
                    if (r < count) mixed[r] += scores[r][i] * value;
                }
            }
            for (int r = 0; r < count; ++r) parts[r * (how.dim + 2) + d] = mixed[r];
        }
        __syncthreads();  // the scores have been read
    }
}

// A row is a block's.
__global__ void __launch_bounds__(BLOCK_THREADS) mix_parts_kernel(const dsl_attention how) {
    const int64_t rows = how.heads / how.kv_heads * how.tokens, head = blockIdx.x / rows, row = blockIdx.x % rows;
    const int64_t step = how.dim + 2;
    const float* const parts = how.parts + (head * how.chunks * rows + row) * step;
    float most = -INFINITY, weight = 0;
    for (int64_t chunk = 0; chunk < how.chunks; ++chunk) most = larger(most, parts[chunk * rows * step + how.dim]);
    for (int64_t chunk = 0; chunk < how.chunks && most != -INFINITY; ++chunk) {
        const float* const part = parts + chunk * rows * step;
        weight += part[how.dim + 1] * expf(part[how.dim] - most);
    }
    const int64_t batch = head / how.kv_heads, token = row % how.tokens;
    const int64_t query_head = head % how.kv_heads * (how.heads / how.kv_heads) + row / how.tokens;
    for (int64_t d = threadIdx.x; d < how.dim; d += BLOCK_THREADS) {
        float mixed = 0;
        for (int64_t chunk = 0; chunk < how.chunks && most != -INFINITY; ++chunk) {
            const float* const part = parts + chunk * rows * step;
            mixed += part[d] * expf(part[how.dim] - most);
        }
        put(how.out, ((batch * how.tokens + token) * how.heads + query_head) * how.dim + d,
            weight == 0 ? 0 : mixed / weight);
    }
}

}  // namespace dsl

extern "C" int dsl_gpu_attention(const dsl_attention* attention, int64_t batch, void* stream) {
    using namespace dsl;
    const int64_t heads = batch * attention->kv_heads,
                  rows = attention->heads / attention->kv_heads * attention->tokens;
    if (heads * rows == 0) return 0;
    DSL_LAUNCH(attend_kernel, static_cast<uint32_t>(heads * attention->chunks), BLOCK_THREADS, stream, *attention);
    if (const int error = launch_error()) return error;
    DSL_LAUNCH(mix_parts_kernel, static_cast<uint32_t>(heads * rows), BLOCK_THREADS, stream, *attention);
    return launch_error();
}
