// Scaling, casting, checking and norms on the CPU, in one pass over memory each.
#include "common/isa.h"
#include "common/tile.h"
#include "cpu_optim/multi_tensor.h"

namespace {

// Adding up x - x, which is 0 or NaN, takes no branch.
bool all_finite(const float* from, int64_t n) {
    float sums[16] = {};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        for (int k = 0; k < 16; ++k) sums[k] += from[i + k] - from[i + k];
    }
    for (; i < n; ++i) sums[0] += from[i] - from[i];
    float sum = 0;
    for (const float one : sums) sum += one;
    return sum == 0;
}

}  // namespace

extern "C" bool DSL_NAMED(dsl_scale)(const dsl_tensor* tensors, int64_t begin, int64_t end, float factor) {
    bool finite = true;
    for (int64_t start = begin; start < end; start += TILE) {
        const int64_t n = end - start < TILE ? end - start : TILE;
        const Tile in(tensors[0], start, n);
        alignas(64) float scaled[TILE];
        for (int64_t i = 0; i < n; ++i) scaled[i] = in.floats[i] * factor;
        if (tensors[1].data == nullptr) {
            finite &= all_finite(scaled, n);
            continue;
        }
        write(scaled, tensors[1], start, n);
        finite &= all_finite(Tile(tensors[1], start, n).floats, n);  // what is finite in fp32 may not be in fp16
    }
    return finite;
}

extern "C" double DSL_NAMED(dsl_squares)(const dsl_tensor* tensor, int64_t begin, int64_t end) {
    double sum = 0;
    for (int64_t start = begin; start < end; start += TILE) {
        const int64_t n = end - start < TILE ? end - start : TILE;
        sum += sum_of_squares(Tile(*tensor, start, n).floats, n);
    }
    return sum;
}
