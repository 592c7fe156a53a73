// Bias, dropout, residual and layer norm in one pass over a row, and all of their gradients in another.
#include <cmath>

#include "common/isa.h"
#include "transformer/rows.h"
#include "transformer/transformer.h"

namespace {

// (x + bias) * kept + residual, as it is once written.
void sum_row(const dsl_drop_norm& how, int64_t row, const float* bias, const Buffers& buffers, float* to) {
    const int64_t n = how.hidden, start = row * n;
    const float* const x = read_row(how.x, start, n, buffers[0]);
    const float* const residual = read_row(how.residual, start, n, buffers[1]);
    const float* const factors = how.dropout.threshold ? kept(how.dropout, start, n, buffers[2]) : nullptr;
    for_vectors(n, [&](int64_t i) {
        Vector value = load(x + i);
        if (bias != nullptr) value += load(bias + i);
        if (factors != nullptr) value *= load(factors + i);
        if (residual != nullptr) value += load(residual + i);
        store(to + i, value);
    });
    round_row(to, how.x.dtype, n);
    write_row(to, how.summed, start, n);
}

struct Moments {
    float mean, variance;
};

Moments moments_of(float* row, int64_t n, bool in_one_pass) {
    pad(row, n, 0);
    const float mean = sum_vectors(n, [&](int64_t i) { return load(row + i); }) / n;
    if (in_one_pass) {
        const float squares = sum_vectors(n, [&](int64_t i) { return load(row + i) * load(row + i); }) / n;
        const float variance = squares - mean * mean;
        return {mean, variance < 0 ? 0 : variance};  // NaN stays NaN
    }
    pad(row, n, mean);
    const float squares = sum_vectors(n, [&](int64_t i) {
        const Vector off = load(row + i) - mean;
        return off * off;
    });
    return {mean, squares / n};
}

void norm_row(const dsl_drop_norm& how, int64_t row, const float* weight, const float* shift, float* summed) {
    const Moments moments = moments_of(summed, how.hidden, how.stochastic);
    const float rstd = 1 / std::sqrt(moments.variance + how.eps);
    how.mean[row] = moments.mean;
    how.rstd[row] = rstd;
    for_vectors(how.hidden, [&](int64_t i) {
        store(summed + i, (load(summed + i) - moments.mean) * rstd * load(weight + i) + load(shift + i));
    });
    write_row(summed, how.normed, row * how.hidden, how.hidden);
}

// What backward rows share: the weights as floats, and sums over the rows so far.
struct Shared {
    const float *weight, *shift;
    const float* inverse;  // of the weight, 0 where that is 0; null where the norm's input was kept
    float *grad_bias, *grad_weight, *grad_shift;
};

// The normalized row into `to`.
void normalize_again(const dsl_drop_norm_backward& how, int64_t row, const Shared& shared, float* buffer, float* to) {
    const int64_t n = how.hidden, start = row * n;
    if (shared.inverse != nullptr) {
        const float* const normed = read_row(how.normed, start, n, buffer);
        for_vectors(n, [&](int64_t i) {
            store(to + i, (load(normed + i) - load(shared.shift + i)) * load(shared.inverse + i));
        });
    } else {
        const float* const summed = read_row(how.summed, start, n, buffer);
        const float mean = how.mean[row], rstd = how.rstd[row];
        for_vectors(n, [&](int64_t i) { store(to + i, (load(summed + i) - mean) * rstd); });
    }
}

// The norm's gradient into `to`, and what it adds to its weights' gradients.
void norm_gradient(const dsl_drop_norm_backward& how, int64_t row, const Shared& shared, const Buffers& buffers,
                   float* to) {
    const int64_t n = how.hidden;
    const float* const grad = read_row(how.grad_normed, row * n, n, buffers[0]);
    float* const normalized = buffers[1];
    normalize_again(how, row, shared, buffers[2], normalized);
    pad(normalized, n, 0);
    Vector sums[2] = {}, products[2] = {};
    int k = 0;
    for_vectors(n, [&](int64_t i) {
        const Vector g = load(grad + i), number = load(normalized + i), weighed = g * load(shared.weight + i);
        store(shared.grad_weight + i, load(shared.grad_weight + i) + g * number);
        store(shared.grad_shift + i, load(shared.grad_shift + i) + g);
        sums[k] += weighed;
        products[k] += weighed * number;
        k ^= 1;
    });
    const float mean = sum(sums[0] + sums[1]) / n, along = sum(products[0] + products[1]) / n, rstd = how.rstd[row];
    for_vectors(n, [&](int64_t i) {
        const Vector weighed = load(grad + i) * load(shared.weight + i);
        store(to + i, (weighed - mean - load(normalized + i) * along) * rstd);
    });
}

void backward_row(const dsl_drop_norm_backward& how, int64_t row, const Shared& shared, const Buffers& buffers) {
    const int64_t n = how.hidden, start = row * n;
    float* const grad = buffers[3];
    const bool through_norm = how.grad_normed.data != nullptr;
    if (through_norm) norm_gradient(how, row, shared, buffers, grad);
    if (const float* const other = read_row(how.grad_summed, start, n, buffers[0])) {
        for_vectors(
            n, [&](int64_t i) { store(grad + i, through_norm ? load(grad + i) + load(other + i) : load(other + i)); });
    }
    write_row(grad, how.grad_residual, start, n);
    if (how.grad_x.data == nullptr && how.grad_bias == nullptr) return;
    if (how.dropout.threshold) {
        const float* const factors = kept(how.dropout, start, n, buffers[0]);
        for_vectors(n, [&](int64_t i) { store(grad + i, load(grad + i) * load(factors + i)); });
    }
    for_vectors(n, [&](int64_t i) { store(shared.grad_bias + i, load(shared.grad_bias + i) + load(grad + i)); });
    write_row(grad, how.grad_x, start, n);
}

void clear(const Shared& shared, int64_t n) {
    for (float* const sums : {shared.grad_bias, shared.grad_weight, shared.grad_shift}) {
        std::memset(sums, 0, padded(n) * sizeof(float));
    }
}

void put_part(const dsl_drop_norm_backward& how, const Shared& shared, int64_t part) {
    float* to = how.parts + part * 3 * how.hidden;
    for (const float* const sums : {shared.grad_bias, shared.grad_weight, shared.grad_shift}) {
        std::memcpy(to, sums, how.hidden * sizeof(float));
        to += how.hidden;
    }
}

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace

extern "C" void DSL_NAMED(dsl_drop_norm)(const dsl_drop_norm* how, int64_t begin, int64_t end) {
    const Buffers buffers(7, how->hidden);
    const float* const bias = read_row(how->bias, 0, how->hidden, buffers[4]);
    const float* const weight = read_row(how->weight, 0, how->hidden, buffers[5]);
    const float* const shift = read_row(how->shift, 0, how->hidden, buffers[6]);
    for (int64_t row = begin * DSL_PART; row < least(end * DSL_PART, how->rows); ++row) {
        sum_row(*how, row, bias, buffers, buffers[3]);
        if (how->normed.data != nullptr) norm_row(*how, row, weight, shift, buffers[3]);
    }
}

extern "C" void DSL_NAMED(dsl_drop_norm_backward)(const dsl_drop_norm_backward* how, int64_t begin, int64_t end) {
    const int64_t n = how->hidden;
    const Buffers buffers(10, n);
    Shared shared{};
    shared.weight = read_row(how->weight, 0, n, buffers[4]);
    shared.shift = read_row(how->shift, 0, n, buffers[5]);
    shared.grad_bias = buffers[7], shared.grad_weight = buffers[8], shared.grad_shift = buffers[9];
    if (how->summed.data == nullptr && how->grad_normed.data != nullptr) {
        for (int64_t i = 0; i < padded(n); ++i) {
            buffers[6][i] = i >= n || shared.weight[i] == 0 ? 0 : 1 / shared.weight[i];
        }
        shared.inverse = buffers[6];
    }
    clear(shared, n);
    for (int64_t part = begin; part < end; ++part) {
        for (int64_t row = part * DSL_PART; row < least((part + 1) * DSL_PART, how->rows); ++row) {
            backward_row(*how, row, shared, buffers);
        }
        if (how->stochastic) continue;  // one part for all rows of the call
        put_part(*how, shared, part);
        clear(shared, n);
    }
    if (how->stochastic) put_part(*how, shared, begin);
}

extern "C" void DSL_NAMED(dsl_sum_parts)(const dsl_parts* parts, int64_t begin, int64_t end) {
    float* const to = parts->to;
    for (int64_t i = begin; i < end; ++i) to[i] = 0;
    for (int64_t k = 0; k < parts->count; ++k) {
        const float* const from = parts->from + (parts->which == nullptr ? k : parts->which[k]) * parts->step;
        for (int64_t i = begin; i < end; ++i) to[i] += from[i];
    }
}
