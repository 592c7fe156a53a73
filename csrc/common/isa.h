// Which instruction set a kernel is compiled for, and which of them this processor has.
//
// A CPU kernel is compiled once for each: the same plain loops, which the compiler turns into instructions of that set.
// What it defines has the set in its name (DSL_NAMED), and all else in it is static, so that the linker cannot put one
// set's code in another's place. The binding, compiled without any such flags, chooses when the op is called.
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__AVX512F__)
#define DSL_ISA avx512
#elif defined(__AVX2__)
#define DSL_ISA avx2
#else
#define DSL_ISA baseline  // every x86-64 has SSE2, every aarch64 NEON
#endif
#define DSL_JOIN_(name, isa) name##_##isa
#define DSL_JOIN(name, isa) DSL_JOIN_(name, isa)
#define DSL_NAMED(name) DSL_JOIN(name, DSL_ISA)

namespace dsl {

enum class Isa { baseline, avx2, avx512 };

// The best that there is, or the one that DEEPSPEEDLITE_ISA=baseline|avx2|avx512 names if it is no better.
static inline Isa best_isa() {
#if defined(__x86_64__)
    const char* named = std::getenv("DEEPSPEEDLITE_ISA");
    const bool any = named == nullptr || std::strcmp(named, "avx512") == 0;
    const bool up_to_avx2 = any || std::strcmp(named, "avx2") == 0;
    if (any && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return Isa::avx512;
    if (up_to_avx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
    return Isa::baseline;
}

}  // namespace dsl

// What DSL_NAMED(name) defined for the best of them.
#if defined(__x86_64__)
#define DSL_BEST(name)                                   \
    (dsl::best_isa() == dsl::Isa::avx512 ? name##_avx512 \
     : dsl::best_isa() == dsl::Isa::avx2 ? name##_avx2   \
                                         : name##_baseline)
#else
#define DSL_BEST(name) name##_baseline
#endif
