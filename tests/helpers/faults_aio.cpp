// Preloaded into a test's process: makes the kernel's answers to async_io's engines what they seldom are.
//
// faults_every(n, how, where): from then on, at every n-th of
//   CALLS      the calls that move bytes, or hand transfers to the kernel,
//   TRANSFERS  the transfers, those that the kernel makes by itself (io_uring, native AIO) too,
// it happens that
//   SHORT      half of the bytes are moved, or one of the transfers handed over is taken,
//   an errno   it fails with that. (A transfer of io_uring's fails with EIO, whatever is asked for.)
// faults_hit() is how often that happened.

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/io_uring.h>
#include <stdarg.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/types.h>

#include <array>
#include <atomic>

namespace {

enum { SHORT = -1 };
enum Where { CALLS, TRANSFERS };
std::atomic<int> period{0}, fault{0}, where{CALLS};
std::atomic<long> seen{0}, hits{0};

bool is_hit(Where here) {
    const int every = period;
    if (every == 0 || here != where || ++seen % every != 0) return false;
    ++hits;
    return true;
}

template <class Call>
Call next(const char* name) {
    return reinterpret_cast<Call>(dlsym(RTLD_NEXT, name));
}

template <class Call, class Memory>
ssize_t move(Call call, int file, Memory memory, size_t nbytes, off_t offset) {
    if (!is_hit(CALLS) && !is_hit(TRANSFERS)) return call(file, memory, nbytes, offset);
    if (fault == SHORT) return call(file, memory, (nbytes + 1) / 2, offset);
    errno = fault;
    return -1;
}

// --- transfers that the kernel makes ---------------------------------------------------------------------------------

struct Submissions {
    io_sqring_offsets places;
    char* ring;
    io_uring_sqe* entries;
};
std::array<Submissions, 1024> rings;  // by file descriptor; one that is used again is set up again

int failing_file() {  // the first page of an address space belongs to nobody: reading and writing it is EIO
    static const int file = open("/proc/self/mem", O_RDWR | O_CLOEXEC);
    return file;
}

void spoil_entries(const Submissions& submissions, long count) {
    const auto at = [&](uint32_t place) { return *reinterpret_cast<uint32_t*>(submissions.ring + place); };
    const uint32_t head = at(submissions.places.head), mask = at(submissions.places.ring_mask);
    for (long i = 0; i < count; ++i) {
        io_uring_sqe& entry = submissions.entries[(head + i) & mask];
        if (!is_hit(TRANSFERS)) continue;
        if (fault == SHORT) {
            entry.len = (entry.len + 1) / 2;
        } else {
            entry.fd = failing_file();
            entry.off = 4096;
        }
    }
}

void shorten(iocb** blocks, long count) {
    for (long i = 0; i < count; ++i)
        if (is_hit(TRANSFERS)) blocks[i]->aio_nbytes = (blocks[i]->aio_nbytes + 1) / 2;
}

void fail(io_event* events, long count) {
    for (long i = 0; i < count; ++i)
        if (is_hit(TRANSFERS)) events[i].res = -fault;
}

}  // namespace

extern "C" {

void faults_every(int n, int how, int what) {
    fault = how;
    where = what;
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

void* mmap(void* wanted, size_t nbytes, int protection, int flags, int file, off_t offset) {
    const auto call = next<void* (*)(void*, size_t, int, int, int, off_t)>("mmap");
    void* const memory = call(wanted, nbytes, protection, flags, file, offset);
    if (file >= 0 && offset == IORING_OFF_SQ_RING) rings.at(file).ring = static_cast<char*>(memory);
    if (file >= 0 && offset == IORING_OFF_SQES) rings.at(file).entries = static_cast<io_uring_sqe*>(memory);
    return memory;
}

long syscall(long number, ...) {
    va_list list;
    va_start(list, number);
    long words[6];
    for (long& word : words) word = va_arg(list, long);
    va_end(list);
    const bool submits = (number == SYS_io_submit || number == SYS_io_uring_enter) && words[1] > 0;
    if (submits && is_hit(CALLS)) {
        if (fault != SHORT) {
            errno = fault;
            return -1;
        }
        words[1] = 1;  // how many are submitted, for both
    }
    if (submits && number == SYS_io_submit && fault == SHORT) shorten(reinterpret_cast<iocb**>(words[2]), words[1]);
    if (submits && number == SYS_io_uring_enter) spoil_entries(rings.at(words[0]), words[1]);
    const long result =
        next<long (*)(long, ...)>("syscall")(number, words[0], words[1], words[2], words[3], words[4], words[5]);
    if (number == SYS_io_getevents && fault > 0) fail(reinterpret_cast<io_event*>(words[3]), result);
    if (number == SYS_io_uring_setup && result >= 0)
        rings.at(result) = {reinterpret_cast<io_uring_params*>(words[1])->sq_off, nullptr, nullptr};
    return result;
}
}
