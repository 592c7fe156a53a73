// Preloaded into a test's process: makes the kernel's answers to async_io's engines what they seldom are.
//
// faults_every(n, how): every n-th call that moves bytes, or submits such calls, from then on
//   SHORT           moves half of the bytes, or takes one of the submitted calls,
//   another value   fails with that errno.
// faults_hit() is how often that happened. Bytes that move inside the kernel (io_uring, native AIO) are out of reach.

#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <sys/syscall.h>
#include <sys/types.h>

#include <atomic>

namespace {

enum { SHORT = -1 };
std::atomic<int> period{0}, fault{0};
std::atomic<long> seen{0}, hits{0};

bool is_hit() {
    const int every = period;
    if (every == 0 || ++seen % every != 0) return false;
    ++hits;
    return true;
}

template <class Call>
Call next(const char* name) {
    return reinterpret_cast<Call>(dlsym(RTLD_NEXT, name));
}

template <class Call, class Memory>
ssize_t move(Call call, int file, Memory memory, size_t nbytes, off_t offset) {
    if (!is_hit()) return call(file, memory, nbytes, offset);
    if (fault == SHORT) return call(file, memory, (nbytes + 1) / 2, offset);
    errno = fault;
    return -1;
}

}  // namespace

extern "C" {

void faults_every(int n, int how) {
    fault = how;
    seen = hits = 0;
    period = n;
}

long faults_hit() { return hits; }

ssize_t pread(int file, void* memory, size_t nbytes, off_t offset) {
    return move(next<ssize_t (*)(int, void*, size_t, off_t)>("pread"), file, memory, nbytes, offset);
}

ssize_t pwrite(int file, const void* memory, size_t nbytes, off_t offset) {
    return move(next<ssize_t (*)(int, const void*, size_t, off_t)>("pwrite"), file, memory, nbytes, offset);
}

long syscall(long number, ...) {
    va_list list;
    va_start(list, number);
    long words[6];
    for (long& word : words) word = va_arg(list, long);
    va_end(list);
    if ((number == SYS_io_submit || number == SYS_io_uring_enter) && words[1] > 0 && is_hit()) {
        if (fault != SHORT) {
            errno = fault;
            return -1;
        }
        words[1] = 1;  // how many are submitted, for both
    }
    return next<long (*)(long, ...)>("syscall")(number, words[0], words[1], words[2], words[3], words[4], words[5]);
}
}
