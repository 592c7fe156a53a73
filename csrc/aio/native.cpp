// Transfers through Linux's native AIO, by its system calls alone: nothing needs libaio.
//
// It is asynchronous for O_DIRECT; what goes through the page cache is done while it is submitted. See io_submit(2).
#include <linux/aio_abi.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <ctime>

#include "aio/queue.h"

namespace dsl {

namespace {

class Native final : public Queue {
 public:
    explicit Native(int event) : event_(event) {}
    ~Native() override {
        if (context_ != 0) syscall(__NR_io_destroy, context_);
    }

    // Returns "" or what is refused. A filter of system calls may let one through and not the others: all are tried.
    std::string open(int32_t depth) {
        timespec no_time{};
        if (syscall(__NR_io_setup, depth, &context_) != 0) return std::string("io_setup: ") + std::strerror(errno);
        if (syscall(__NR_io_submit, context_, 0, nullptr) != 0)
            return std::string("io_submit: ") + std::strerror(errno);
        if (syscall(__NR_io_getevents, context_, 0, 0, nullptr, &no_time) != 0)
            return std::string("io_getevents: ") + std::strerror(errno);
        return "";
    }

    int64_t start(const Transfer* transfers, int64_t count) override {
        blocks_.assign(count, iocb{});
        pointers_.resize(count);
        for (int64_t i = 0; i < count; ++i) {
            iocb& block = blocks_[i];
            block.aio_data = transfers[i].slot;
            block.aio_lio_opcode = transfers[i].write ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
            block.aio_fildes = static_cast<uint32_t>(transfers[i].file);
            block.aio_buf = reinterpret_cast<uint64_t>(transfers[i].memory);
            block.aio_nbytes = static_cast<uint64_t>(transfers[i].nbytes);
            block.aio_offset = transfers[i].offset;
            block.aio_flags = IOCB_FLAG_RESFD;
            block.aio_resfd = static_cast<uint32_t>(event_);
            pointers_[i] = &block;
        }
        const int64_t taken = syscall(__NR_io_submit, context_, count, pointers_.data());
        return taken < 0 ? -errno : taken == 0 ? -EAGAIN : taken;
    }

    void collect(std::vector<Ended>& ended) override {
        std::array<io_event, 64> events;
        timespec no_time{};
        int64_t count;
        do {
            count = syscall(__NR_io_getevents, context_, 0, events.size(), events.data(), &no_time);
            for (int64_t i = 0; i < count; ++i) ended.push_back({events[i].data, events[i].res});
        } while (count == static_cast<int64_t>(events.size()) || (count < 0 && errno == EINTR));
    }

 private:
    const int event_;
    aio_context_t context_ = 0;
    std::vector<iocb> blocks_;
    std::vector<iocb*> pointers_;
};

}  // namespace

std::unique_ptr<Queue> open_native(int32_t depth, int event, std::string& why) {
    auto queue = std::make_unique<Native>(event);
    why = queue->open(depth);
    if (!why.empty()) return nullptr;
    return queue;
}

}  // namespace dsl
