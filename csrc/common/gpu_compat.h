// What differs between CUDA, HIP and the host, so that a kernel is written once.
//
//     DSL_LAUNCH(kernel, blocks, threads, stream, arguments...);    the one way to start a kernel
//     return dsl::launch_error();                                   0, or the runtime's error code
//     dsl::shuffle_xor(value, mask), dsl::wave_size()               a wave is 32 lanes (NVIDIA, RDNA) or 64 (CDNA)
//     dsl::from_bf16, to_bf16, from_fp16, to_fp16                   16-bit floats as uint16_t, rounded to nearest even
//     dsl::mma<F>(c, a, b)                                          c += a b by a whole wave; its operands: gpu_mma.h
//
// Everything else that kernels use (threadIdx, __syncthreads, __shared__, ...) has CUDA's names on all three.
// HIP is held to what 5.2 has: no hip_bf16.h, no __shfl_*_sync. The host (any C++17 compiler, `g++ -x c++ kernel.cu`) is
// a device for tests: see gpu_on_host.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#elif defined(__HIP__) || defined(__HIPCC__)
#include <hip/hip_runtime.h>
#define DSL_GPU_HIP
#else
#include "common/gpu_on_host.h"
#include "common/tile.h"
#define DSL_GPU_HOST
#endif

#if defined(DSL_GPU_HOST)
#define DSL_UNROLL
#define DSL_ROLLED
#define DSL_CALLERS_LINE , int line = __builtin_LINE()  // it tells one meeting of a wave from another
#else
#define DSL_UNROLL _Pragma("unroll")
#define DSL_ROLLED _Pragma("unroll 1")  // a loop that is long enough, and whose body is
#define DSL_CALLERS_LINE
#endif

#include "common/gpu_mma.h"

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
// PTX for what cuda_bf16.h and cuda_fp16.h have: reading those takes a third of the time of compiling a small kernel.
__device__ inline uint16_t to_bf16(float value) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#else
    const uint32_t bits = __float_as_uint(value);
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fff : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
#endif
}
__device__ inline float from_fp16(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
__device__ inline uint16_t to_fp16(float value) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
__device__ inline bool check_aligned(const void*, int) { return true; }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define DSL_TENSOR_CORES MmaSync
#define DSL_MMA_SYNC(type)                                                                             \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                \
                 : "+f"(c.values[0]), "+f"(c.values[1]), "+f"(c.values[2]), "+f"(c.values[3])          \
                 : "r"(a.registers[0]), "r"(a.registers[1]), "r"(a.registers[2]), "r"(a.registers[3]), \
                   "r"(b.registers[0]), "r"(b.registers[1]))
__device__ inline void tensor_cores(Bf16, Sums& c, const Packed<8>& a, const Packed<4>& b) { DSL_MMA_SYNC("bf16"); }
__device__ inline void tensor_cores(Fp16, Sums& c, const Packed<8>& a, const Packed<4>& b) { DSL_MMA_SYNC("f16"); }
#undef DSL_MMA_SYNC
#endif

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

#if defined(__gfx90a__) || defined(__gfx940__) || defined(__gfx941__) || defined(__gfx942__) || defined(__gfx950__)
#define DSL_TENSOR_CORES Mfma
using FourFloats = __attribute__((ext_vector_type(4))) float;
using FourHalves = __attribute__((ext_vector_type(4))) _Float16;
using FourShorts = __attribute__((ext_vector_type(4))) short;
__device__ inline void tensor_cores(Bf16, Sums& c, const Packed<4>& a, const Packed<4>& b) {
    const auto sums =
        __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(__builtin_bit_cast(FourShorts, a), __builtin_bit_cast(FourShorts, b),
                                                  __builtin_bit_cast(FourFloats, c), 0, 0, 0);
    c = __builtin_bit_cast(Sums, sums);
}
__device__ inline void tensor_cores(Fp16, Sums& c, const Packed<4>& a, const Packed<4>& b) {
    const auto sums =
        __builtin_amdgcn_mfma_f32_16x16x16f16(__builtin_bit_cast(FourHalves, a), __builtin_bit_cast(FourHalves, b),
                                              __builtin_bit_cast(FourFloats, c), 0, 0, 0);
    c = __builtin_bit_cast(Sums, sums);
}
#endif

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

// Numbers as they are stored, and back.
template <class T>
__device__ inline float widen(typename T::Stored stored) {
    if constexpr (std::is_same_v<T, Bf16>) {
        return from_bf16(stored);
    } else if constexpr (std::is_same_v<T, Fp16>) {
        return from_fp16(stored);
    } else {
        return stored;
    }
}

template <class T>
__device__ inline typename T::Stored narrow(float value) {
    if constexpr (std::is_same_v<T, Bf16>) {
        return to_bf16(value);
    } else if constexpr (std::is_same_v<T, Fp16>) {
        return to_fp16(value);
    } else {
        return value;
    }
}

// c += a b. All lanes of a wave must call it.
template <class F>
__device__ inline void mma(typename F::C& c, const typename F::A& a, const typename F::B& b DSL_CALLERS_LINE) {
    using T = typename F::Type;
    if constexpr (std::is_same_v<F, Plain<T>>) {
        DSL_UNROLL
        for (int i = 0; i < F::C::COUNT; ++i) {
            DSL_UNROLL
            for (int k = 0; k < F::DEPTH; ++k) {
                c.values[i] += widen<T>(a.values[i / 2 * F::DEPTH + k]) * widen<T>(b.values[i % 2 * F::DEPTH + k]);
            }
        }
    } else {
#if defined(DSL_GPU_HOST)
        host::product_of_wave<F>(c, a, b, [](uint16_t bits) { return widen<T>(bits); }, line);
#elif defined(DSL_TENSOR_CORES)
        tensor_cores(T{}, c, a, b);
#endif
    }
}

// A kernel that multiplies numbers of type T is a template of one of these, and takes its Here.
template <class T>
struct ByArchitecture {
#if defined(DSL_TENSOR_CORES)
    using Here = std::conditional_t<std::is_same_v<T, Fp32>, Plain<T>, DSL_TENSOR_CORES<T>>;
#else
    using Here = Plain<T>;
#endif
};
template <class F>
struct Always {
    using Here = F;
};

// Calls launch(choice), with the choice a kernel for numbers of type T is to be a template of.
template <class T, class Launch>
void with_products_of(const Launch& launch) {
    if constexpr (std::is_same_v<T, Fp32>) {
        launch(Always<Plain<T>>{});
    } else {
#if !defined(DSL_GPU_HOST)
        launch(ByArchitecture<T>{});
#else
        if (host::device().plain_products) return launch(Always<Plain<T>>{});
        if (host::device().wave == 64) return launch(Always<Mfma<T>>{});
        launch(Always<MmaSync<T>>{});
#endif
    }
}

}  // namespace dsl
