// Block-sparse attention on GPUs; sparse_attn.h says what it is.
//
// A block of threads owns some rows (queries, or for dk and dv keys) and up to 128 of a head's numbers, and meets the tokens
// that its list keeps, a tile at a time; a tile gathers as many blocks as it has room for. Products are dsl::mma's, of
// chunks of a head's numbers that pass through shared memory, so it stays within 48 KB at any size of a head; where a head
// is larger than 128 scores are made once for each part of it. Each result is one block's: there are no atomics.
#include "common/gpu_four.h"
#include "sparse_attn/sparse_attn.h"

namespace dsl {

constexpr int OWN = 32, CHUNK = 64,
              CHUNKS = 2;  // rows of a block of threads at most; numbers of a head at a time; chunks

// Sizes, and what lies in shared memory. OTHERS: tokens of a tile; strides keep fragments' rows in different banks.
template <class Fragments>
struct Tile {
    using F = Fragments;
    using T = typename F::Type;
    using Stored = typename T::Stored;
    using C = typename F::C;
    static constexpr int OTHERS = sizeof(Stored) == 4 ? 32 : 64, GAP = 16 / sizeof(Stored);
    static constexpr int STRIDE = CHUNK + GAP, WEIGHTS_STRIDE = OTHERS + GAP, SCORES_STRIDE = OTHERS + 4;
    static constexpr int WAVES = BLOCK_THREADS / F::LANES;
    static constexpr int SCORES = OWN / F::ROWS * (OTHERS / F::COLUMNS) / WAVES;  // sums of a lane, in fragments
    static constexpr int SUMS = OWN / F::ROWS * (CHUNK / F::COLUMNS) / WAVES;

    Stored mine[OWN * STRIDE], theirs[OTHERS * STRIDE];
    float scores[OWN * SCORES_STRIDE], products[OWN * SCORES_STRIDE];  // q k^T, and dP
    Stored weights[OWN * WEIGHTS_STRIDE], changes[OWN * WEIGHTS_STRIDE];
    int32_t token[OTHERS], partial[OTHERS];  // of each of a tile: -1 where there is none
    float most[OWN], total[OWN], factor[OWN];
};

// What a block of threads owns, and the part of its list that may matter to it.
struct Own {
    int64_t batch, head, first, begin, end;
    int64_t column;  // of a head's numbers, the first that it writes
    int rows;
    bool keys;  // its rows are keys, and those that it meets are queries
};

// Bf16's kernels are Fp16's too, which halves what there is to compile: a launch's numbers are all of one type.
template <class F>
__device__ inline void add_product(const dsl_sparse_attention& how, typename F::C& c, const typename F::A& a,
                                   const typename F::B& b) {
    if (how.q.x.dtype == DSL_FP16) {
        using Other = std::conditional_t<std::is_same_v<typename F::Type, Bf16>, typename F::template With<Fp16>, F>;
        mma<Other>(c, a, b);
    } else {
        mma<F>(c, a, b);
    }
}

template <class T>
__device__ inline typename T::Stored narrow_to(const dsl_sparse_attention& how, float value) {
    if constexpr (std::is_same_v<T, Bf16>) {
        if (how.q.x.dtype == DSL_FP16) return narrow<Fp16>(value);
    }
    return narrow<T>(value);
}

// How many blocks of threads share a head's numbers.
__host__ __device__ inline int64_t parts_of(int64_t dim) { return (dim + CHUNKS * CHUNK - 1) / (CHUNKS * CHUNK); }

template <class Stored>
struct alignas(4 * sizeof(Stored)) Quad {
    Stored at[4];
};

__device__ inline int64_t start_of(const dsl_heads& heads, const Own& own) {
    return own.batch * heads.batch + own.head * heads.head;
}

// Takes the list of its batch and head.
__device__ inline void take_list(const dsl_sparse_attention& how, Own& own) {
    const int64_t length = own.keys ? how.keys : how.queries, block = how.block;
    const dsl_blocks& lists = own.keys ? how.by_column : how.by_row;
    const int64_t list = own.batch * how.list_batch + own.head * how.list_head;
    const int32_t* const starts = lists.starts + list * (length / block) + own.first / block;
    own.begin = starts[0], own.end = starts[1];
    if (!how.causal) return;
    if (own.keys) {  // queries before its first key see none of them
        while (own.begin < own.end && (lists.blocks[own.begin] + 1) * block <= own.first) ++own.begin;
    } else {
        while (own.begin < own.end && lists.blocks[own.end - 1] * block >= own.first + own.rows) --own.end;
    }
}

// The place of a block of threads in a grid over batches, `heads`, rows and parts of a head's numbers, the last fastest.
__device__ inline Own own_of(const dsl_sparse_attention& how, bool keys, int64_t heads) {
    Own own{};
    own.keys = keys;
    own.rows = how.block < OWN ? static_cast<int>(how.block) : OWN;
    const int64_t tiles = (keys ? how.keys : how.queries) / own.rows, place = blockIdx.x / parts_of(how.dim);
    own.column = blockIdx.x % parts_of(how.dim) * (CHUNKS * CHUNK);
    own.batch = place / tiles / heads, own.head = place / tiles % heads, own.first = place % tiles * own.rows;
    return own;
}

// Which tokens a tile has: those of the list's blocks in a row, from number `at` of them on. A barrier must follow.
template <class S>
__device__ inline void gather(const dsl_sparse_attention& how, const Own& own, int64_t at, S& shared) {
    __syncthreads();  // the last tile's have been read
    const int i = threadIdx.x;
    if (i < S::OTHERS) {
        const dsl_blocks& lists = own.keys ? how.by_column : how.by_row;
        const int64_t entry = own.begin + (at + i) / how.block;
        const bool there = entry < own.end;
        shared.token[i] = there ? static_cast<int32_t>(lists.blocks[entry] * how.block + (at + i) % how.block) : -1;
        shared.partial[i] = there && lists.partial != nullptr ? lists.partial[entry] : -1;
    }
}

// Numbers [column, column + CHUNK) of some tokens' heads, zeros beyond; token_of(i) is -1 where there is none.
template <class S, class Token>
__device__ inline void stage(typename S::Stored* to, const dsl_heads& heads, int64_t start, int count, int64_t column,
                             int64_t dim, const Token& token_of) {
    using Stored = typename S::Stored;
    DSL_ROLLED
    for (int i = threadIdx.x; i < count * (CHUNK / 4); i += BLOCK_THREADS) {
        const int row = i / (CHUNK / 4);
        const int64_t token = token_of(row), first = column + i % (CHUNK / 4) * 4;
        Quad<Stored> quad{};
        if (token >= 0 && first < dim) {
            const Stored* const from = static_cast<const Stored*>(heads.x.data) + start + token * heads.token + first;
            if (first + 4 <= dim && reinterpret_cast<uintptr_t>(from) % sizeof quad == 0) {
                quad = *reinterpret_cast<const Quad<Stored>*>(from);
            } else {
                for (int k = 0; k < 4; ++k) {
                    if (first + k < dim) quad.at[k] = from[k];
                }
            }
        }
        *reinterpret_cast<Quad<Stored>*>(to + row * S::STRIDE + i % (CHUNK / 4) * 4) = quad;
    }
}

template <class S>
__device__ inline void stage_mine(S& shared, const dsl_heads& heads, const Own& own, int64_t column, int64_t dim) {
    stage<S>(shared.mine, heads, start_of(heads, own), own.rows, column, dim, [&](int i) { return own.first + i; });
}

template <class S>
__device__ inline void stage_theirs(S& shared, const dsl_heads& heads, const Own& own, int64_t column, int64_t dim) {
    stage<S>(shared.theirs, heads, start_of(heads, own), S::OTHERS, column, dim,
             [&](int i) { return static_cast<int64_t>(shared.token[i]); });
}

// Calls work(number, row, column) for each fragment of sums of this wave, of (rows, columns) of them.
template <class S, int N, int COLUMNS, class Work>
__device__ inline void for_fragments(int rows, const Work& work) {
    constexpr int ACROSS = COLUMNS / S::F::COLUMNS;
    const int wave = threadIdx.x / S::F::LANES;
    DSL_UNROLL
    for (int i = 0; i < N; ++i) {
        const int unit = wave + i * S::WAVES;
        if (unit < rows / S::F::ROWS * ACROSS) work(i, unit / ACROSS * S::F::ROWS, unit % ACROSS * S::F::COLUMNS);
    }
}

// Calls work(number, row, column) for each number of a lane's sums.
template <class S, class Work>
__device__ inline void for_numbers(int row, int column, const Work& work) {
    DSL_UNROLL
    for (int i = 0; i < S::C::COUNT; ++i) {
        const MatrixPlace place = S::F::c_place(threadIdx.x % S::F::LANES, i);
        work(i, row + place.row, column + place.column);
    }
}

// to (own rows, others) = heads of the one times heads of the other; `staged`: the one's lie where they are to lie.
template <class S>
__device__ inline void multiply(S& shared, const dsl_sparse_attention& how, const Own& own, const dsl_heads& mine,
                                const dsl_heads& theirs, float* to, bool staged) {
    using F = typename S::F;
    const int lane = threadIdx.x % F::LANES;
    typename S::C sums[S::SCORES] = {};
    DSL_ROLLED
    for (int64_t column = 0; column < how.dim; column += CHUNK) {
        __syncthreads();  // the tile's tokens are there, and what lay where these go has been read
        if (!staged) stage_mine(shared, mine, own, column, how.dim);
        stage_theirs(shared, theirs, own, column, how.dim);
        __syncthreads();
        for_fragments<S, S::SCORES, S::OTHERS>(own.rows, [&](int i, int row, int other) {
            DSL_ROLLED
            for (int k = 0; k < CHUNK; k += F::DEPTH) {
                typename F::A a;
                typename F::B b;
                load_a<F>(a, lane, shared.mine + row * S::STRIDE + k, S::STRIDE);
                load_b_transposed<F>(b, lane, shared.theirs + other * S::STRIDE + k, S::STRIDE);
                add_product<F>(how, sums[i], a, b);
            }
        });
    }
    for_fragments<S, S::SCORES, S::OTHERS>(own.rows, [&](int i, int row, int other) {
        for_numbers<S>(row, other, [&](int k, int at, int theirs_at) {
            to[at * S::SCORES_STRIDE + theirs_at] = sums[i].values[k];
        });
    });
}

// sums (own rows, a head's numbers) += weights (own rows, others) times heads of the others.
template <class S>
__device__ inline void add_weighted(S& shared, const dsl_sparse_attention& how, const Own& own,
                                    const typename S::Stored* weights, const dsl_heads& theirs,
                                    typename S::C (&sums)[CHUNKS][S::SUMS]) {
    using F = typename S::F;
    const int lane = threadIdx.x % F::LANES;
    DSL_UNROLL
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        const int64_t first = own.column + chunk * CHUNK;
        if (first >= how.dim) continue;
        __syncthreads();  // the weights are written, and what lay there has been read
        stage_theirs(shared, theirs, own, first, how.dim);
        __syncthreads();
        for_fragments<S, S::SUMS, CHUNK>(own.rows, [&](int i, int row, int column) {
            DSL_ROLLED
            for (int k = 0; k < S::OTHERS; k += F::DEPTH) {
                typename F::A a;
                typename F::B b;
                load_a<F>(a, lane, weights + row * S::WEIGHTS_STRIDE + k, S::WEIGHTS_STRIDE);
                load_b<F>(b, lane, shared.theirs + k * S::STRIDE + column, S::STRIDE);
                add_product<F>(how, sums[chunk][i], a, b);
            }
        });
    }
}

// factor_of(row) times the sums.
template <class S, class Factor>
__device__ inline void write_sums(const dsl_sparse_attention& how, const dsl_heads& to, const Own& own,
                                  const typename S::C (&sums)[CHUNKS][S::SUMS], const Factor& factor_of) {
    auto* const data = static_cast<typename S::Stored*>(to.x.data) + start_of(to, own);
    DSL_UNROLL
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        for_fragments<S, S::SUMS, CHUNK>(own.rows, [&](int i, int row, int column) {
            for_numbers<S>(row, chunk * CHUNK + column, [&](int k, int mine, int number) {
                const int64_t at = own.column + number;
                if (at >= how.dim) return;
                data[(own.first + mine) * to.token + at] =
                    narrow_to<typename S::T>(how, sums[chunk][i].values[k] * factor_of(mine));
            });
        });
    }
}

// A product as a score: scaled, with biases, -infinity where it is hidden.
__device__ inline float score_of(const dsl_sparse_attention& how, const Own& own, int64_t query, int64_t key,
                                 int32_t partial, float product) {
    float score = product * how.scale;
    DSL_ROLLED
    for (int n = 0; n < DSL_BIASES; ++n) {
        const dsl_bias& bias = how.biases[n];
        if (bias.kind == DSL_NO_BIAS) continue;
        const int64_t at = own.batch * bias.batch + own.head * bias.head + query * bias.row + key * bias.column;
        const float number = bias.kind == DSL_SEEN ? static_cast<const uint8_t*>(bias.x.data)[at] : read(bias.x, at);
        if (bias.kind == DSL_ADDED) {
            score += number;
        } else if (number == 0) {
            score = -INFINITY;
        }
    }
    if (how.causal && key > query) return -INFINITY;
    const int64_t block = how.block;
    if (partial >= 0 && how.partial_masks[(partial * block + query % block) * block + key % block] == 0) {
        return -INFINITY;
    }
    return score;
}

__device__ inline int64_t row_index(const dsl_sparse_attention& how, const Own& own, int64_t query) {
    return (own.batch * how.heads + own.head) * how.queries + query;
}

// Scores of a tile become weights in view of the new maximum; some neighbours share a row.
template <class S>
__device__ inline void weigh(S& shared, const dsl_sparse_attention& how, const Own& own) {
    const int each = BLOCK_THREADS / own.rows, row = threadIdx.x / each, part = threadIdx.x % each;
    float* const scores = shared.scores + row * S::SCORES_STRIDE;
    float most = shared.most[row], total = 0;
    const float before = most;
    DSL_ROLLED
    for (int j = 4 * part; j < S::OTHERS; j += 4 * each) {  // what a thread takes again itself, below
        DSL_ROLLED
        for (int k = j; k < j + 4; ++k) {
            const int32_t key = shared.token[k];
            const float score =
                key < 0 ? -INFINITY : score_of(how, own, own.first + row, key, shared.partial[k], scores[k]);
            scores[k] = score;
            most = larger(most, score);
        }
    }
    most = most_over(most, each);
    const float seen = most == -INFINITY ? 0 : most, factor = expf(before - seen);
    DSL_ROLLED
    for (int j = 4 * part; j < S::OTHERS; j += 4 * each) {
        Four weight;
        for (int k = 0; k < 4; ++k) {
            weight.at[k] = expf(scores[j + k] - seen);
            total += weight.at[k];
        }
        // Four keys in a row begin at a multiple of 4; where there are none all weights are 0.
        drop_four(how.dropout, row_index(how, own, own.first + row) * how.keys + shared.token[j], weight);
        for (int k = 0; k < 4; ++k) {
            shared.weights[row * S::WEIGHTS_STRIDE + j + k] = narrow_to<typename S::T>(how, weight.at[k]);
        }
    }
    total = sum_over(total, each);
    if (part == 0) {
        shared.most[row] = most;
        shared.total[row] = shared.total[row] * factor + total;
        shared.factor[row] = factor;
    }
}

template <class Choice>
__global__ void __launch_bounds__(BLOCK_THREADS)
    sparse_forward_kernel(const __grid_constant__ dsl_sparse_attention how) {
    using S = Tile<typename Choice::Here>;
    __shared__ S shared;
    Own own = own_of(how, false, how.heads);
    take_list(how, own);
    typename S::C sums[CHUNKS][S::SUMS] = {};
    if (threadIdx.x < OWN) {
        shared.most[threadIdx.x] = -INFINITY;
        shared.total[threadIdx.x] = 0;
    }
    for (int64_t at = 0; at < (own.end - own.begin) * how.block; at += S::OTHERS) {
        gather(how, own, at, shared);
        multiply(shared, how, own, how.q, how.k, shared.scores, at > 0 && how.dim <= CHUNK);
        __syncthreads();
        weigh(shared, how, own);
        __syncthreads();
        DSL_UNROLL
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            for_fragments<S, S::SUMS, CHUNK>(own.rows, [&](int i, int row, int column) {
                for_numbers<S>(row, column,
                               [&](int k, int mine, int) { sums[chunk][i].values[k] *= shared.factor[mine]; });
            });
        }
        add_weighted<S>(shared, how, own, shared.weights, how.v, sums);
    }
    __syncthreads();
    write_sums<S>(how, how.out, own, sums, [&](int row) { return shared.total[row] == 0 ? 0 : 1 / shared.total[row]; });
    const int row = threadIdx.x;
    if (row < own.rows && own.column == 0) {
        const float total = shared.total[row];
        how.lse[row_index(how, own, own.first + row)] = total == 0 ? INFINITY : shared.most[row] + logf(total);
    }
}

// Sums of out * dout: a row is a wave's.
__global__ void __launch_bounds__(BLOCK_THREADS) sparse_delta_kernel(const dsl_sparse_attention how) {
    const int wave = wave_size(), lane = threadIdx.x % wave;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (BLOCK_THREADS / wave) + threadIdx.x / wave;
    if (row >= how.batch * how.heads * how.queries) return;  // whole waves
    const int64_t token = row % how.queries, head = row / how.queries % how.heads,
                  batch = row / how.queries / how.heads;
    const int64_t out = batch * how.out.batch + head * how.out.head + token * how.out.token;
    const int64_t dout = batch * how.dout.batch + head * how.dout.head + token * how.dout.token;
    float sum = 0;
    for (int64_t d = lane; d < how.dim; d += wave) sum += read(how.out.x, out + d) * read(how.dout.x, dout + d);
    sum = sum_over(sum, wave);
    if (lane == 0) how.delta[row] = sum;
}

// A tile's scores and dP become P, with what was dropped, and dS: four neighbours along the keys are a thread's.
template <class S>
__device__ inline void change(S& shared, const dsl_sparse_attention& how, const Own& own) {
    __syncthreads();  // the products are written
    const int row_step = own.keys ? 1 : 0, other_step = 1 - row_step;
    DSL_ROLLED
    for (int i = threadIdx.x; i < own.rows * S::OTHERS / 4; i += BLOCK_THREADS) {
        const int row = own.keys ? i % (own.rows / 4) * 4 : i / (S::OTHERS / 4);
        const int other = own.keys ? i / (own.rows / 4) : i % (S::OTHERS / 4) * 4;
        const int64_t token = shared.token[other];  // of four in a row all are there, or none
        const int64_t query = own.keys ? token : own.first + row, key = own.keys ? own.first + row : token;
        const int64_t index = row_index(how, own, query);
        float* positions = nullptr;  // their gradient, of these four
        if (how.dpositions != nullptr && !own.keys && own.column == 0 && token >= 0) {
            positions = how.dpositions + own.batch * how.dpositions_batch + own.head * how.dpositions_head +
                        query * how.keys + key;
        }
        Four kept{{1, 1, 1, 1}};
        float lse = 0, delta = 0;
        if (token >= 0) {
            drop_four(how.dropout, index * how.keys + key, kept);
            lse = how.lse[index], delta = how.delta[index];
        }
        for (int k = 0; k < 4; ++k) {
            const int mine = row + k * row_step, theirs = other + k * other_step, at = mine * S::SCORES_STRIDE + theirs;
            float weight = 0, changed = 0;
            if (token >= 0) {
                const float score = score_of(how, own, query, key + k, shared.partial[theirs], shared.scores[at]);
                weight = expf(score - lse);
                changed = weight * (shared.products[at] * kept.at[k] - delta);
                weight *= kept.at[k];
                if (positions != nullptr) positions[k] += changed;
            }
            shared.weights[mine * S::WEIGHTS_STRIDE + theirs] = narrow_to<typename S::T>(how, weight);
            shared.changes[mine * S::WEIGHTS_STRIDE + theirs] = narrow_to<typename S::T>(how, changed);
        }
    }
}

// Heads of batches whose relative positions are not the same; those that share some are one block's of threads, one after
// the other.
struct Sharing {
    int64_t batches, heads;
};

__host__ __device__ inline Sharing sharing_of(const dsl_sparse_attention& how) {
    if (how.dpositions == nullptr) return {how.batch, how.heads};
    return {how.dpositions_batch == 0 ? 1 : how.batch, how.dpositions_head == 0 ? 1 : how.heads};
}

template <class Choice>
__global__ void __launch_bounds__(BLOCK_THREADS) sparse_dq_kernel(const __grid_constant__ dsl_sparse_attention how) {
    using S = Tile<typename Choice::Here>;
    __shared__ S shared;
    const Sharing sharing = sharing_of(how);
    Own own = own_of(how, false, sharing.heads);
    for (const int64_t head = own.head; own.batch < how.batch; own.batch += sharing.batches, own.head = head) {
        for (; own.head < how.heads; own.head += sharing.heads) {
            take_list(how, own);
            typename S::C sums[CHUNKS][S::SUMS] = {};
            for (int64_t at = 0; at < (own.end - own.begin) * how.block; at += S::OTHERS) {
                gather(how, own, at, shared);
                multiply(shared, how, own, how.q, how.k, shared.scores, false);
                multiply(shared, how, own, how.dout, how.v, shared.products, false);
                change(shared, how, own);
                add_weighted<S>(shared, how, own, shared.changes, how.k, sums);
            }
            write_sums<S>(how, how.dq, own, sums, [&](int) { return how.scale; });
        }
    }
}

template <class Choice>
__global__ void __launch_bounds__(BLOCK_THREADS) sparse_dkv_kernel(const __grid_constant__ dsl_sparse_attention how) {
    using S = Tile<typename Choice::Here>;
    __shared__ S shared;
    Own own = own_of(how, true, how.heads);
    take_list(how, own);
    typename S::C dk[CHUNKS][S::SUMS] = {}, dv[CHUNKS][S::SUMS] = {};
    for (int64_t at = 0; at < (own.end - own.begin) * how.block; at += S::OTHERS) {
        gather(how, own, at, shared);
        multiply(shared, how, own, how.k, how.q, shared.scores, false);
        multiply(shared, how, own, how.v, how.dout, shared.products, false);
        change(shared, how, own);
        add_weighted<S>(shared, how, own, shared.weights, how.dout, dv);
        add_weighted<S>(shared, how, own, shared.changes, how.q, dk);
    }
    write_sums<S>(how, how.dk, own, dk, [&](int) { return how.scale; });
    write_sums<S>(how, how.dv, own, dv, [&](int) { return 1.0f; });
}

static uint32_t blocks_of(const dsl_sparse_attention& how, const Sharing& sharing, int64_t length) {
    const int64_t rows = how.block < OWN ? how.block : OWN;
    return static_cast<uint32_t>(sharing.batches * sharing.heads * (length / rows) * parts_of(how.dim));
}

template <class Choice>
int forward(const dsl_sparse_attention& how, void* stream) {
    const uint32_t blocks = blocks_of(how, {how.batch, how.heads}, how.queries);
    DSL_LAUNCH(sparse_forward_kernel<Choice>, blocks, BLOCK_THREADS, stream, how);
    return launch_error();
}

template <class Choice>
int backward(const dsl_sparse_attention& how, void* stream) {
    const uint32_t rows = blocks_for(how.batch * how.heads * how.queries, BLOCK_THREADS / 64);
    DSL_LAUNCH(sparse_delta_kernel, rows, BLOCK_THREADS, stream, how);
    if (const int error = launch_error()) return error;
    DSL_LAUNCH(sparse_dq_kernel<Choice>, blocks_of(how, sharing_of(how), how.queries), BLOCK_THREADS, stream, how);
    if (const int error = launch_error()) return error;
    const uint32_t blocks = blocks_of(how, {how.batch, how.heads}, how.keys);
    DSL_LAUNCH(sparse_dkv_kernel<Choice>, blocks, BLOCK_THREADS, stream, how);
    return launch_error();
}

template <class T>
int start(const dsl_sparse_attention& how, bool is_forward, void* stream) {
    int error = 0;
    with_products_of<T>([&](auto choice) {
        using Choice = decltype(choice);
        error = is_forward ? forward<Choice>(how, stream) : backward<Choice>(how, stream);
    });
    return error;
}

static int start_of_dtype(const dsl_sparse_attention& how, bool is_forward, void* stream) {
    if (how.batch * how.heads * how.queries * how.keys == 0) return 0;
    return how.q.x.dtype == DSL_FP32 ? start<Fp32>(how, is_forward, stream) : start<Bf16>(how, is_forward, stream);
}

}  // namespace dsl

extern "C" int dsl_gpu_sparse_forward(const dsl_sparse_attention* how, void* stream) {
    return dsl::start_of_dtype(*how, true, stream);
}

extern "C" int dsl_gpu_sparse_backward(const dsl_sparse_attention* how, void* stream) {
    return dsl::start_of_dtype(*how, false, stream);
}
