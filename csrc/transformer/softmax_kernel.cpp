// The softmax of masked scores, with dropout, and its gradient.
#include "common/isa.h"
#include "transformer/rows.h"
#include "transformer/transformer.h"

namespace {

// Where a row's mask begins.
int64_t mask_start(const dsl_softmax& how, int64_t row) {
    const int64_t query = row % how.queries, head = row / how.queries % how.heads, one = row / how.queries / how.heads;
    return one * how.mask_batch + head * how.mask_head + query * how.mask_query;
}

// What is added to a row's scores, one for each key, or null where nothing is.
const float* mask_row(const dsl_softmax& how, int64_t row, float* buffer) {
    const int64_t n = how.keys;
    if (how.seen != nullptr) {
        const uint8_t* const seen = how.seen + mask_start(how, row);
        for (int64_t i = 0; i < n; ++i) buffer[i] = seen[i * how.mask_key] != 0 ? 0.0f : -INFINITY;
        pad(buffer, n, 0);
        return buffer;
    }
    if (how.mask.data == nullptr) return nullptr;
    const int64_t start = mask_start(how, row);
    if (how.mask_key == 1) return read_row(how.mask, start, n, buffer);
    with_elements(how.mask, [&](const auto* elements) {
        for (int64_t i = 0; i < n; ++i) buffer[i] = one(elements + start + i * how.mask_key);
    });
    pad(buffer, n, 0);
    return buffer;
}

// NaN where any is.
float most_of(const float* row, int64_t n) {
    Vector most = spread(-INFINITY);
    for_vectors(n, [&](int64_t i) { most = larger(most, load(row + i)); });
    float lanes[LANES];
    store(lanes, most);
    float found = lanes[0];
    for (const float lane : lanes) found = lane > found || lane != lane ? lane : found;
    return found;
}

void softmax_row(const dsl_softmax& how, int64_t row, const Buffers& buffers) {
    const int64_t n = how.keys, start = row * n;
    const float* const scores = read_row(how.scores, start, n, buffers[0]);
    const float* const mask = mask_row(how, row, buffers[1]);
    float* const probs = buffers[2];
    for_vectors(n, [&](int64_t i) {
        const Vector score = load(scores + i) * how.scale;
        store(probs + i, mask != nullptr ? score + load(mask + i) : score);
    });
    pad(probs, n, -INFINITY);
    const float most = most_of(probs, n);
    if (most == -INFINITY) {
        std::memset(probs, 0, padded(n) * sizeof(float));
    } else {
        if (how.stochastic) {
            for_vectors(n, [&](int64_t i) { store(probs + i, rough_exponential(load(probs + i) - most)); });
        } else {
            for_vectors(n, [&](int64_t i) { store(probs + i, exponential(load(probs + i) - most)); });
        }
        const float inverse = 1 / sum_vectors(n, [&](int64_t i) { return load(probs + i); });
        for_vectors(n, [&](int64_t i) { store(probs + i, load(probs + i) * inverse); });
    }
    write_row(probs, how.probs, start, n);
    if (how.dropped.data == nullptr) return;
    if (how.dropout.threshold) {
        const float* const factors = kept(how.dropout, start, n, buffers[0]);
        for_vectors(n, [&](int64_t i) { store(probs + i, load(probs + i) * load(factors + i)); });
    }
    write_row(probs, how.dropped, start, n);
}

void backward_row(const dsl_softmax_backward& how, int64_t row, const Buffers& buffers) {
    const int64_t n = how.keys, start = row * n;
    const float* const given = read_row(how.grad_dropped, start, n, buffers[0]);
    const float* const probs = read_row(how.probs, start, n, buffers[1]);
    const float* const factors = how.dropout.threshold ? kept(how.dropout, start, n, buffers[2]) : nullptr;
    float* const grad = buffers[3];
    for_vectors(n, [&](int64_t i) {
        store(grad + i, factors != nullptr ? load(given + i) * load(factors + i) : load(given + i));
    });
    pad(grad, n, 0);
    const float along = sum_vectors(n, [&](int64_t i) { return load(grad + i) * load(probs + i); });
    for_vectors(n, [&](int64_t i) { store(grad + i, load(probs + i) * (load(grad + i) - along) * how.scale); });
    write_row(grad, how.grad_scores, start, n);
}

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace

extern "C" void DSL_NAMED(dsl_softmax)(const dsl_softmax* how, int64_t begin, int64_t end) {
    const Buffers buffers(3, how->keys);
    const int64_t rows = how->batch * how->heads * how->queries;
    for (int64_t row = begin * DSL_PART; row < least(end * DSL_PART, rows); ++row) softmax_row(*how, row, buffers);
}

extern "C" void DSL_NAMED(dsl_softmax_backward)(const dsl_softmax_backward* how, int64_t begin, int64_t end) {
    const Buffers buffers(4, how->keys);
    for (int64_t row = begin * DSL_PART; row < least(end * DSL_PART, how->rows); ++row)
        backward_row(*how, row, buffers);
}
