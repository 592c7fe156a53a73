// Transfers through io_uring, by its system calls alone: nothing needs liburing. Linux 5.6 and newer have what it takes.
//
// The kernel and this thread share two rings. A submission is an entry written at the first ring's tail, and a call;
// what has ended is read from the second ring's head without one. See io_uring(7).
#include "aio/queue.h"

#if __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#endif
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace dsl {

#if defined(IORING_FEAT_RW_CUR_POS) && defined(__NR_io_uring_setup)

namespace {

// Linux 5.6 has this feature, and with it the plain read and write used here.
constexpr uint32_t NEEDED = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_RW_CUR_POS;

uint32_t load(const uint32_t* place) { return __atomic_load_n(place, __ATOMIC_ACQUIRE); }
void store(uint32_t* place, uint32_t value) { __atomic_store_n(place, value, __ATOMIC_RELEASE); }

class Uring final : public Queue {
 public:
    ~Uring() override {
        if (entries_ != MAP_FAILED) munmap(entries_, entries_bytes_);
        if (rings_ != MAP_FAILED) munmap(rings_, rings_bytes_);
        if (file_ >= 0) close(file_);
    }

    // Returns "" or what is refused. A filter of system calls may let one through and not the others: all are tried.
    std::string open(int32_t depth, int event) {
        io_uring_params params{};
        file_ = static_cast<int>(syscall(__NR_io_uring_setup, depth, &params));
        if (file_ < 0) return std::string("io_uring_setup: ") + std::strerror(errno);
        if ((params.features & NEEDED) != NEEDED) return "this kernel's io_uring is older than Linux 5.6's";
        if (!map(params)) return std::string("mapping its rings: ") + std::strerror(errno);
        entries_[0] = {};
        entries_[0].opcode = IORING_OP_NOP;
        store(submitted_tail_, 1);
        if (syscall(__NR_io_uring_enter, file_, 1, 1, IORING_ENTER_GETEVENTS, nullptr, 0) != 1)
            return std::string("io_uring_enter: ") + std::strerror(errno);
        store(ended_head_, load(ended_tail_));
        if (syscall(__NR_io_uring_register, file_, IORING_REGISTER_EVENTFD, &event, 1) != 0)
            return std::string("io_uring_register: ") + std::strerror(errno);
        return "";
    }

    int64_t start(const Transfer* transfers, int64_t count) override {
        const uint32_t tail = *submitted_tail_;
        for (int64_t i = 0; i < count; ++i) {
            io_uring_sqe& entry = entries_[(tail + i) & submitted_mask_];
            entry = {};
            entry.opcode = transfers[i].write ? IORING_OP_WRITE : IORING_OP_READ;
            entry.fd = transfers[i].file;
            entry.addr = reinterpret_cast<uint64_t>(transfers[i].memory);
            entry.len = static_cast<uint32_t>(transfers[i].nbytes);
            entry.off = static_cast<uint64_t>(transfers[i].offset);
            entry.user_data = transfers[i].slot;
        }
        store(submitted_tail_, tail + static_cast<uint32_t>(count));
        const int64_t taken = syscall(__NR_io_uring_enter, file_, count, 0, 0, nullptr, 0);
        const int error = errno;
        store(submitted_tail_, load(submitted_head_));  // what it did not take is taken back
        return taken < 0 ? -error : taken == 0 ? -EAGAIN : taken;
    }

    void collect(std::vector<Ended>& ended) override {
        uint32_t head = *ended_head_;
        for (const uint32_t tail = load(ended_tail_); head != tail; ++head) {
            const io_uring_cqe& entry = results_[head & ended_mask_];
            ended.push_back({entry.user_data, entry.res});
        }
        store(ended_head_, head);
    }

 private:
    bool map(const io_uring_params& params) {
        const auto shared = [&](uint64_t bytes, uint64_t at) {
            return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, file_,
                        static_cast<off_t>(at));
        };
        rings_bytes_ = std::max<uint64_t>(params.sq_off.array + params.sq_entries * sizeof(uint32_t),
                                          params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe));
        entries_bytes_ = params.sq_entries * sizeof(io_uring_sqe);
        rings_ = shared(rings_bytes_, IORING_OFF_SQ_RING);
        entries_ = static_cast<io_uring_sqe*>(shared(entries_bytes_, IORING_OFF_SQES));
        if (rings_ == MAP_FAILED || entries_ == MAP_FAILED) return false;
        const auto place = [&](uint32_t offset) {
            return reinterpret_cast<uint32_t*>(static_cast<char*>(rings_) + offset);
        };
        submitted_head_ = place(params.sq_off.head);
        submitted_tail_ = place(params.sq_off.tail);
        submitted_mask_ = *place(params.sq_off.ring_mask);
        ended_head_ = place(params.cq_off.head);
        ended_tail_ = place(params.cq_off.tail);
        ended_mask_ = *place(params.cq_off.ring_mask);
        results_ = reinterpret_cast<const io_uring_cqe*>(place(params.cq_off.cqes));
        for (uint32_t i = 0; i < params.sq_entries; ++i) place(params.sq_off.array)[i] = i;
        return true;
    }

    int file_ = -1;
    void* rings_ = MAP_FAILED;
    io_uring_sqe* entries_ = static_cast<io_uring_sqe*>(MAP_FAILED);
    uint64_t rings_bytes_ = 0, entries_bytes_ = 0;
    uint32_t *submitted_head_ = nullptr, *submitted_tail_ = nullptr, *ended_head_ = nullptr, *ended_tail_ = nullptr;
    uint32_t submitted_mask_ = 0, ended_mask_ = 0;
    const io_uring_cqe* results_ = nullptr;
};

}  // namespace

std::unique_ptr<Queue> open_uring(int32_t depth, int event, std::string& why) {
    auto queue = std::make_unique<Uring>();
    why = queue->open(depth, event);
    if (!why.empty()) return nullptr;
    return queue;
}

#else

std::unique_ptr<Queue> open_uring(int32_t, int, std::string& why) {
    why = "the headers that this was compiled with are older than Linux 5.6";
    return nullptr;
}

#endif

}  // namespace dsl
