// One launch for many tensors: a list of them travels as a kernel argument, so nothing is allocated or copied for it.
//
// A tensor is cut into blocks of BLOCK_NUMEL elements; the grid has one block of threads for each, over all the list's
// tensors. What the list says about its tensors every block reads from the constant bank (argument memory), and every
// element is read and written once, in packs: the widest tensor moves 16 bytes per thread at a time, so a pack is
// 4 elements, or 8 where all tensors are 16-bit. A tensor whose data do not begin at a multiple of its pack, and the
// last elements of any, go one by one.
#pragma once

#include <type_traits>

#include "common/gpu_compat.h"
#include "common/tensor.h"
#include "gpu_optim/gpu_optim.h"

namespace dsl {

constexpr int THREADS = 256;
constexpr int64_t BLOCK_NUMEL = DSL_GPU_BLOCK_NUMEL;
constexpr int ARGUMENT_BYTES = 4096;  // what every CUDA and HIP device takes
constexpr int NUMBER_BYTES = 128;     // of them left for an op's other arguments

// What an op does to a tensor's elements it does to those of its other roles (gradient, moments, ...) too.
template <int ROLES>
struct TensorList {
    static constexpr int MOST = (ARGUMENT_BYTES - NUMBER_BYTES - 16) / (9 * ROLES + 8 + 4 + 1);

    void* data[ROLES][MOST];
    int64_t numel[MOST];
    uint32_t first_block[MOST + 1];  // of the grid
    uint8_t dtype[ROLES][MOST];
    bool aligned[MOST];
    int32_t count;
};

// A tensor in the hands of a thread.
struct View {
    void* data;
    uint8_t dtype;
};

// What a block of threads works on: elements [begin, end) of tensor number `index`; the first `packed_end - begin` of
// them in packs.
struct Place {
    int index;
    int64_t begin, packed_end, end;
};

template <int N>
struct Floats {
    float at[N];
};

// N elements as they lie in memory. They are widened only after all the loads of a pack have been issued.
template <int N>
struct Raw {
    uint32_t words[N == 1 ? 1 : 4];
};

template <int BYTES>
struct alignas(BYTES) Bytes {
    uint32_t words[BYTES / 4];
};

template <int N>
using Pack = std::integral_constant<int, N>;

template <int ROLES>
__device__ View view(const TensorList<ROLES>& list, int role, int index) {
    return {list.data[role][index], list.dtype[role][index]};
}

template <int PACK, int ROLES>
__device__ Place find_place(const TensorList<ROLES>& list) {
    int low = 0, high = list.count;  // the tensor is the last one that begins at or before this block
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (list.first_block[middle] <= blockIdx.x ? low : high) = middle;
    }
    const int64_t begin = static_cast<int64_t>(blockIdx.x - list.first_block[low]) * BLOCK_NUMEL;
    const int64_t end = begin + BLOCK_NUMEL < list.numel[low] ? begin + BLOCK_NUMEL : list.numel[low];
    return {low, begin, list.aligned[low] ? end - end % PACK : begin, end};
}

// Calls `work(Pack<N>, i)` for elements [i, i + N), which over all threads make up the place.
template <int PACK, class Work>
__device__ void for_elements(const Place& place, const Work& work) {
    for (int64_t i = place.begin + threadIdx.x * PACK; i < place.packed_end; i += THREADS * PACK) work(Pack<PACK>(), i);
    for (int64_t i = place.packed_end + threadIdx.x; i < place.end; i += THREADS) work(Pack<1>(), i);
}

template <int BYTES, int N>
__device__ void move_in(Raw<N>* raw, const void* from) {
    Bytes<BYTES> bytes{};
    if (check_aligned(from, BYTES)) bytes = *static_cast<const Bytes<BYTES>*>(from);  // one load
    memcpy(raw->words, &bytes, BYTES);
}

template <int BYTES, int N>
__device__ void move_out(const Raw<N>& raw, void* to) {
    Bytes<BYTES> bytes;
    memcpy(&bytes, raw.words, BYTES);
    if (check_aligned(to, BYTES)) *static_cast<Bytes<BYTES>*>(to) = bytes;  // one store
}

// Elements [i, i + N); zeros where there is no tensor. The branches are the same for all threads of a block.
template <int N>
__device__ Raw<N> fetch(const View& from, int64_t i) {
    Raw<N> raw{};
    if (from.data == nullptr) return raw;
    if (from.dtype == DSL_FP32) {
        if constexpr (N == 1) raw.words[0] = static_cast<const uint32_t*>(from.data)[i];
        if constexpr (N == 4) move_in<16>(&raw, static_cast<const uint32_t*>(from.data) + i);
    } else {
        const uint16_t* const halves = static_cast<const uint16_t*>(from.data) + i;
        if constexpr (N == 1) raw.words[0] = *halves;
        if constexpr (N > 1) move_in<2 * N>(&raw, halves);
    }
    return raw;
}

template <int N>
__device__ uint16_t half_of(const Raw<N>& raw, int k) {
    return static_cast<uint16_t>(raw.words[k / 2] >> (16 * (k % 2)));
}

template <int N>
__device__ Floats<N> widen(const Raw<N>& raw, const View& from) {
    Floats<N> floats{};
    if (from.dtype == DSL_FP32) {
        if constexpr (N < 8) memcpy(&floats, &raw, sizeof floats);
    } else if (from.dtype == DSL_BF16) {
        for (int k = 0; k < N; ++k) floats.at[k] = from_bf16(half_of(raw, k));
    } else {
        for (int k = 0; k < N; ++k) floats.at[k] = from_fp16(half_of(raw, k));
    }
    return floats;
}

template <int N>
__device__ Raw<N> narrow(const Floats<N>& floats, const View& to) {
    Raw<N> raw{};
    if (to.dtype == DSL_FP32) {
        if constexpr (N < 8) memcpy(&raw, &floats, sizeof floats);
    } else if (to.dtype == DSL_BF16) {
        for (int k = 0; k < N; ++k) raw.words[k / 2] |= uint32_t{to_bf16(floats.at[k])} << (16 * (k % 2));
    } else {
        for (int k = 0; k < N; ++k) raw.words[k / 2] |= uint32_t{to_fp16(floats.at[k])} << (16 * (k % 2));
    }
    return raw;
}

template <int N>
__device__ void store(const Raw<N>& raw, const View& to, int64_t i) {
    if (to.dtype == DSL_FP32) {
        if constexpr (N == 1) static_cast<uint32_t*>(to.data)[i] = raw.words[0];
        if constexpr (N == 4) move_out<16>(raw, static_cast<uint32_t*>(to.data) + i);
    } else {
        uint16_t* const halves = static_cast<uint16_t*>(to.data) + i;
        if constexpr (N == 1) *halves = static_cast<uint16_t>(raw.words[0]);
        if constexpr (N > 1) move_out<2 * N>(raw, halves);
    }
}

// Does nothing where the tensor is not there.
template <int N>
__device__ void put(const Floats<N>& floats, const View& to, int64_t i) {
    if (to.data != nullptr) store(narrow(floats, to), to, i);
}

// A number that the host knows, or the device alone.
__device__ inline float either(const float* on_device, float on_host) {
    return on_device != nullptr ? *on_device : on_host;
}

// The sum over the block's threads, in every thread and in an order that is always the same. All threads must call it.
template <class Number>
__device__ Number sum_over_block(Number value) {
    __shared__ Number of_waves[THREADS / 32];  // one per wave; there are at most that many
    const int wave = wave_size(), waves = THREADS / wave;
    for (int mask = wave / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    __syncthreads();  // the last call's sums have been read
    if (threadIdx.x % wave == 0) of_waves[threadIdx.x / wave] = value;
    __syncthreads();
    Number sum = 0;
    for (int i = 0; i < waves; ++i) sum += of_waves[i];
    return sum;
}

// --- on the host ------------------------------------------------------------------------------------------------------

static inline int64_t blocks_of(int64_t numel) { return (numel + BLOCK_NUMEL - 1) / BLOCK_NUMEL; }

// Calls `launch(pack, list, blocks, first)` for each list that `count` tensors fill, from number `first` on. `tensors` is
// (count, ROLES); of each tensor the first `elementwise` roles have its `numel` elements, the others one. Returns the
// first error.
template <int ROLES, class Launch>
static int for_each_list(const dsl_tensor* tensors, const int64_t* numel, int64_t count, int elementwise,
                         const Launch& launch) {
    static_assert(sizeof(TensorList<ROLES>) <= ARGUMENT_BYTES - NUMBER_BYTES, "a list must fit with the numbers");
    bool wide = false;
    for (int64_t i = 0; i < count * ROLES; ++i) {
        wide |= i % ROLES < elementwise && tensors[i].data != nullptr && tensors[i].dtype == DSL_FP32;
    }
    for (int64_t first = 0; first < count; first += TensorList<ROLES>::MOST) {
        TensorList<ROLES> list{};
        for (int64_t i = first; i < count && list.count < list.MOST; ++i, ++list.count) {
            list.numel[list.count] = numel[i];
            list.first_block[list.count + 1] =
                static_cast<uint32_t>(list.first_block[list.count] + blocks_of(numel[i]));
            list.aligned[list.count] = true;
            for (int role = 0; role < ROLES; ++role) {
                const dsl_tensor& tensor = tensors[i * ROLES + role];
                list.data[role][list.count] = tensor.data;
                list.dtype[role][list.count] = static_cast<uint8_t>(tensor.dtype);
                const uintptr_t pack_bytes = (wide ? 4 : 8) * (tensor.dtype == DSL_FP32 ? 4 : 2);
                if (role < elementwise && reinterpret_cast<uintptr_t>(tensor.data) % pack_bytes != 0) {
                    list.aligned[list.count] = false;
                }
            }
        }
        const uint32_t blocks = list.first_block[list.count];
        if (blocks > 0) {
            if (wide) {
                launch(Pack<4>(), list, blocks, first);
            } else {
                launch(Pack<8>(), list, blocks, first);
            }
            if (const int error = launch_error()) return error;
        }
    }
    return 0;
}

}  // namespace dsl
