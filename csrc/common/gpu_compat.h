// What differs between CUDA, HIP and the host, so that a kernel is written once.
//
//     DSL_LAUNCH(kernel, blocks, threads, stream, arguments...);    the one way to start a kernel
//     return dsl::launch_error();                                   0, or the runtime's error code
//     dsl::shuffle_xor(value, mask), dsl::wave_size()               a wave is 32 lanes (NVIDIA, RDNA) or 64 (CDNA)
//     dsl::from_bf16, to_bf16, from_fp16, to_fp16                   16-bit floats as uint16_t, rounded to nearest even
//
// Everything else that kernels use (threadIdx, __syncthreads, __shared__, ...) has CUDA's names on all three.
// HIP is held to what 5.2 has: no hip_bf16.h, no __shfl_*_sync. The host (any C++17 compiler, `g++ -x c++ kernel.cu`) is
// a device for tests: see gpu_on_host.h.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#elif defined(__HIP__) || defined(__HIPCC__)
#include <hip/hip_runtime.h>
#define DSL_GPU_HIP
#else
#include "common/gpu_on_host.h"
#include "common/tile.h"
#define DSL_GPU_HOST
#endif

#if defined(__CUDACC__)
// At least so many blocks on a multiprocessor: a bound on registers. (HIP's compiler counts otherwise, and needs none.)
#define DSL_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#else
#define DSL_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads)
#define __grid_constant__  // CUDA's: an argument that is indexed where it lies, not copied to each thread
#endif

#if !defined(DSL_GPU_HOST)
#define DSL_LAUNCH(kernel, blocks, threads, stream, ...)                                     \
    do {                                                                                     \
        auto* const launched = kernel;                                                       \
        launched<<<(blocks), (threads), 0, static_cast<dsl::Stream>(stream)>>>(__VA_ARGS__); \
    } while (false)
#endif

namespace dsl {

#if defined(__CUDACC__)

using Stream = cudaStream_t;
static inline int launch_error() { return static_cast<int>(cudaGetLastError()); }
__device__ inline int wave_size() { return 32; }
template <class T>
__device__ T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
__device__ inline float from_bf16(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
__device__ inline uint16_t to_bf16(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
__device__ inline float from_fp16(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ inline uint16_t to_fp16(float value) { return __half_as_ushort(__float2half_rn(value)); }
__device__ inline bool check_aligned(const void*, int) { return true; }

#elif defined(DSL_GPU_HIP)

using Stream = hipStream_t;
static inline int launch_error() { return static_cast<int>(hipGetLastError()); }
__device__ inline int wave_size() { return warpSize; }
template <class T>
__device__ T shuffle_xor(T value, int mask) {
    return __shfl_xor(value, mask);
}
__device__ inline float from_bf16(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
__device__ inline uint16_t to_bf16(float value) {
    const uint32_t bits = __float_as_uint(value);
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
__device__ inline float from_fp16(uint16_t bits) {
    _Float16 half;
    __builtin_memcpy(&half, &bits, sizeof half);
    return static_cast<float>(half);
}
__device__ inline uint16_t to_fp16(float value) {
    const _Float16 half = static_cast<_Float16>(value);
    uint16_t bits;
    __builtin_memcpy(&bits, &half, sizeof bits);
    return bits;
}
__device__ inline bool check_aligned(const void*, int) { return true; }

#else

static inline int launch_error() { return host::launch_error(); }
using host::check_aligned;
inline int wave_size() { return static_cast<int>(host::device().wave); }
#define shuffle_xor(value, mask) host::shuffle_xor(value, mask, __LINE__)  // the line tells one shuffle from another
inline float from_bf16(uint16_t bits) { return from_bits(static_cast<uint32_t>(bits) << 16); }
inline uint16_t to_bf16(float value) { return narrow_bf16(value); }
inline float from_fp16(uint16_t bits) { return widen_fp16(bits); }
inline uint16_t to_fp16(float value) { return narrow_fp16(value); }

#endif

}  // namespace dsl
