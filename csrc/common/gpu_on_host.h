// A GPU made of fibers, for tests: gpu_compat.h's third target runs kernels in the calling thread, on any machine.
//
// Blocks run one after the other; the threads of a block are fibers that run until they wait. A wait ends when every
// thread of the block (__syncthreads) or of the wave (a shuffle, dsl::mma) has come to the same line. Where that
// cannot happen any more (some threads returned, or wait at another line) the launch fails, with a text that says which
// thread waits where. A misaligned vector access fails likewise. What it does not find: races between barriers, and
// accesses out of bounds. Compile with -U_FORTIFY_SOURCE.
//
// Tests set the wave's size, and can have only some blocks of a grid run, which makes huge tensors cheap.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#if defined(__USE_FORTIFY_LEVEL) && __USE_FORTIFY_LEVEL > 0
#error "compile with -U_FORTIFY_SOURCE: it takes a jump from one fiber to another for a mistake"
#endif

#define __global__
#define __device__
#define __host__
#define __shared__ static  // blocks run one at a time
#define __launch_bounds__(...)
#define __syncthreads() dsl::host::device().wait(dsl::host::Wait::block, __LINE__)
#define DSL_LAUNCH(kernel, blocks, threads, stream, ...)                              \
    do {                                                                              \
        (void)(stream);                                                               \
        dsl::host::device().run((blocks), (threads), [&] { (kernel)(__VA_ARGS__); }); \
    } while (false)

namespace dsl {
namespace host {

struct Index {
    unsigned x = 0, y = 0, z = 0;
};

}  // namespace host
}  // namespace dsl

inline dsl::host::Index threadIdx, blockIdx, blockDim, gridDim;

namespace dsl {
namespace host {

enum class Wait { nothing, wave, block, finished };

struct Fiber {
    ucontext_t start;
    std::unique_ptr<char[]> stack;
    jmp_buf place;  // where it goes on; jumps cost no system call, as swapcontext does
    bool started = false;
    Wait wait = Wait::finished;
    int line = 0;
    uint64_t given = 0, got = 0;  // through a shuffle
    unsigned source = 0;          // the lane that it takes from
};

class Device {
 public:
    unsigned wave = 32;
    bool plain_products = false;                 // of 16-bit numbers too, as on a GPU without tensor cores
    unsigned first_block = 0, last_block = ~0u;  // of every grid, these alone are run
    std::string failure;                         // of the first launch that failed since it was last taken

    void run(unsigned blocks, unsigned threads, std::function<void()> kernel) {
        if (!failure.empty()) return;
        if (blocks == 0 || threads == 0 || threads > 1024) return fail("a grid without blocks or threads, or too many");
        kernel_ = std::move(kernel);
        fibers_.resize(threads);
        gridDim.x = blocks;
        blockDim.x = threads;
        for (unsigned block = first_block; block < blocks && block <= last_block && failure.empty(); ++block) {
            blockIdx.x = block;
            run_block();
        }
        if (!failure.empty()) fibers_.clear();  // they stand in the middle of the kernel
    }

    void wait(Wait what, int line) {
        Fiber& self = fibers_[current_];
        self.wait = what;
        self.line = line;
        yield(self);
    }

    uint64_t exchange(uint64_t given, unsigned mask, int line) {
        Fiber& self = fibers_[current_];
        self.given = given;
        self.source = current_ ^ mask;
        wait(Wait::wave, line);
        return self.got;
    }

    // Has all lanes of a wave meet, each with an address; the first of them is then told of all, the others of none.
    std::vector<void*> meet(void* given, int line) {
        Fiber& self = fibers_[current_];
        self.given = reinterpret_cast<uintptr_t>(given);
        self.source = current_;
        const unsigned begin = current_ / wave * wave;
        wait(Wait::wave, line);
        std::vector<void*> all;
        for (unsigned i = begin; i < begin + wave && current_ == begin; ++i) {
            all.push_back(reinterpret_cast<void*>(fibers_[i].given));
        }
        return all;
    }

    void fail(const std::string& what) {
        if (failure.empty()) failure = what;
    }

 private:
    void run_block() {
        for (Fiber& fiber : fibers_) fiber.wait = Wait::nothing;
        while (true) {
            for (current_ = 0; current_ < fibers_.size(); ++current_) {
                if (fibers_[current_].wait != Wait::nothing) continue;
                threadIdx.x = current_;
                resume(fibers_[current_]);
                if (!failure.empty()) return;
            }
            const unsigned threads = fibers_.size();
            if (together(0, threads, Wait::finished)) return;
            bool released = release(0, threads, Wait::block);
            for (unsigned lane = 0; lane < threads; lane += wave) {
                released |= release(lane, std::min(lane + wave, threads), Wait::wave);
            }
            if (!released) return fail("block " + std::to_string(blockIdx.x) + " waits for ever: " + whereabouts());
        }
    }

    // Whether all of them wait for the same, at the same place.
    bool together(unsigned begin, unsigned end, Wait what) const {
        for (unsigned i = begin; i < end; ++i) {
            if (fibers_[i].wait != what) return false;
            if (what != Wait::finished && fibers_[i].line != fibers_[begin].line) return false;
        }
        return true;
    }

    bool release(unsigned begin, unsigned end, Wait what) {
        if (!together(begin, end, what)) return false;
        for (unsigned i = begin; i < end; ++i) {
            Fiber& fiber = fibers_[i];
            fiber.wait = Wait::nothing;
            if (what != Wait::wave) continue;
            if (fiber.source < begin || fiber.source >= end) {
                fail("a shuffle takes from a lane that is not there, line " + std::to_string(fiber.line));
                return true;
            }
            fiber.got = fibers_[fiber.source].given;
        }
        return true;
    }

    // Runs of threads that are at one place, as "threads 0-31 returned, 32-63 at __syncthreads in line 12".
    std::string whereabouts() const {
        std::string text;
        for (unsigned i = 0, begin = 0; i < fibers_.size(); ++i) {
            const Fiber& fiber = fibers_[i];
            const bool last = i + 1 == fibers_.size();
            if (!last && fibers_[i + 1].wait == fiber.wait && fibers_[i + 1].line == fiber.line) continue;
            const std::string line = " in line " + std::to_string(fiber.line);
            text += (begin ? ", " : "threads ") + std::to_string(begin) + "-" + std::to_string(i) +
                    (fiber.wait == Wait::finished ? " returned"
                     : fiber.wait == Wait::block  ? " at __syncthreads" + line
                                                  : " at a shuffle or product" + line);
            begin = i + 1;
        }
        return text;
    }

    __attribute__((noinline)) void resume(Fiber& fiber) {
        if (_setjmp(scheduler_) != 0) return;
        if (fiber.started) _longjmp(fiber.place, 1);
        fiber.started = true;
        fiber.stack.reset(new char[STACK_BYTES]);
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.get();
        fiber.start.uc_stack.ss_size = STACK_BYTES;
        makecontext(&fiber.start, &Device::body, 0);
        setcontext(&fiber.start);
    }

    __attribute__((noinline)) void yield(Fiber& fiber) {
        if (_setjmp(fiber.place) == 0) _longjmp(scheduler_, 1);
    }

    static void body();  // a fiber's: kernels of one block after the other

    static constexpr size_t STACK_BYTES = 1 << 16;
    std::vector<Fiber> fibers_;
    unsigned current_ = 0;
    jmp_buf scheduler_;
    std::function<void()> kernel_;
};

inline Device& device() {
    static Device only;
    return only;
}

inline void Device::body() {
    Device& self = device();
    while (true) {
        Fiber& fiber = self.fibers_[self.current_];
        self.kernel_();
        fiber.wait = Wait::finished;
        self.yield(fiber);
    }
}

template <class T>
T shuffle_xor(T value, unsigned mask, int line) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves 8 bytes at most");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = device().exchange(bits, mask, line);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// dsl::mma as tensor cores do it: a lane's registers are of the matrices' parts what F's tables say, in pairs of 16 bits.
// The first lane that goes on does it for all, in the others' places.
template <class F, class Widen>
void product_of_wave(typename F::C& c, const typename F::A& a, const typename F::B& b, const Widen& widen, int line) {
    struct Lane {
        typename F::C* c;
        const typename F::A* a;
        const typename F::B* b;
    } mine{&c, &a, &b};
    if (device().wave != F::LANES) {
        return device().fail("a product of " + std::to_string(F::LANES) + " lanes by a wave of " +
                             std::to_string(device().wave));
    }
    const std::vector<void*> lanes = device().meet(&mine, line);
    if (lanes.empty()) return;
    double left[F::ROWS][F::DEPTH], right[F::DEPTH][F::COLUMNS];
    auto number = [&](const uint32_t* registers, int i) {
        return widen(static_cast<uint16_t>(registers[i / 2] >> (i % 2 * 16)));
    };
    for (int lane = 0; lane < F::LANES; ++lane) {
        const Lane& from = *static_cast<const Lane*>(lanes[lane]);
        for (int i = 0; i < F::A::COUNT; ++i) {
            const auto place = F::a_place(lane, i);
            left[place.row][place.column] = number(from.a->registers, i);
        }
        for (int i = 0; i < F::B::COUNT; ++i) {
            const auto place = F::b_place(lane, i);
            right[place.row][place.column] = number(from.b->registers, i);
        }
    }
    for (int lane = 0; lane < F::LANES; ++lane) {
        const Lane& to = *static_cast<const Lane*>(lanes[lane]);
        for (int i = 0; i < F::C::COUNT; ++i) {
            const auto place = F::c_place(lane, i);
            double sum = 0;
            for (int k = 0; k < F::DEPTH; ++k) sum += left[place.row][k] * right[k][place.column];
            to.c->values[i] += static_cast<float>(sum);
        }
    }
}

// Stops a kernel that reads or writes `bytes` at once at a place that is no multiple of it, as a GPU does.
inline bool check_aligned(const void* place, int bytes) {
    const bool aligned = reinterpret_cast<uintptr_t>(place) % bytes == 0;
    if (!aligned) device().fail("a vector access of " + std::to_string(bytes) + " bytes is misaligned");
    return aligned;
}

inline int launch_error() { return device().failure.empty() ? 0 : 1; }

}  // namespace host
}  // namespace dsl

// What tests call.
extern "C" __attribute__((used)) inline void dsl_host_plain_products(int plain) {
    dsl::host::device().plain_products = plain != 0;
}

extern "C" __attribute__((used)) inline void dsl_host_configure(unsigned wave, unsigned first_block,
                                                                unsigned last_block) {
    dsl::host::device().wave = wave;
    dsl::host::device().first_block = first_block;
    dsl::host::device().last_block = last_block;
}

// Takes the text of the failure, which may be empty; it is valid until the next call.
extern "C" __attribute__((used)) inline const char* dsl_host_failure() {
    static std::string taken;
    taken.swap(dsl::host::device().failure);
    dsl::host::device().failure.clear();
    return taken.c_str();
}
