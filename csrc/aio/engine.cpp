// Drivers: threads that take blocks of the requests and keep a queue filled with them.
//
// Which queue (io_uring, Linux's native AIO, threads) is chosen when the engine is opened. A driver sleeps on an event
// that is written to when transfers end and when there is a new request. The first failure of a request ends the rest of
// it, not the other requests.
#include "aio/engine.h"

#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "aio/queue.h"
#include "aio/request.h"

namespace {

using dsl::Block;
using dsl::PAGE;
using dsl::Request;
using dsl::Transfer;

constexpr int64_t MOST_BLOCK_BYTES = int64_t{1} << 30;  // a call to the kernel moves less than 2 GiB
constexpr struct {
    const char* name;
    dsl::OpenQueue open;
} ENGINES[] = {{"io_uring", dsl::open_uring}, {"aio", dsl::open_native}, {"threads", dsl::open_threads}};

struct Slot {
    Block block;
    char* bounce = nullptr;  // as long as the longest block; made when first needed
    Transfer transfer;       // what of the block is, or is to be, under way
};

}  // namespace

class Driver;

struct dsl_aio {
    explicit dsl_aio(const dsl_aio_config& config)
        : config(config),
          block_bytes((std::clamp<int64_t>(config.block_bytes, 1, MOST_BLOCK_BYTES) + PAGE - 1) / PAGE * PAGE) {}

    dsl_aio_config config;
    const int64_t block_bytes;
    const char* engine = "";
    std::string refused;

    std::mutex mutex;  // of all that follows
    std::condition_variable all_done;
    std::deque<std::shared_ptr<Request>> requests;  // those of which something is still to be cut
    int64_t requests_left = 0, requests_told = 0;
    std::string first_failure, told_failure;
    dsl_aio_counts counts{};
    bool ending = false;

    std::vector<std::unique_ptr<Driver>> drivers;
};

class Driver {
 public:
    explicit Driver(dsl_aio* aio) : aio_(aio), slots_(aio->config.queue_depth) {}

    ~Driver() {
        if (thread_.joinable()) thread_.join();
        queue_.reset();
        if (event_ >= 0) close(event_);
        for (Slot& slot : slots_)
            if (slot.bounce != nullptr) munmap(slot.bounce, aio_->block_bytes);
    }

    // Returns "" or why it cannot be had.
    std::string start(dsl::OpenQueue open) {
        std::string why;
        event_ = eventfd(0, EFD_CLOEXEC);
        if (event_ < 0) return std::string("eventfd: ") + std::strerror(errno);
        queue_ = open(aio_->config.queue_depth, event_, why);
        if (queue_ == nullptr) return why;
        for (size_t i = 0; i < slots_.size(); ++i) free_.push_back(slots_.size() - 1 - i);
        try {
            thread_ = std::thread(&Driver::run, this);
        } catch (const std::system_error& error) {
            return std::string("starting a thread: ") + error.what();
        }
        return "";
    }

    void wake() {
        const uint64_t one = 1;
        (void)!write(event_, &one, sizeof one);  // cannot fail: the counter is far from its end
    }

 private:
    void run() {
        while (take()) {
            bool room = true;
            while (room && !ready_.empty()) room = submit();
            peak_ = std::max(peak_, under_way_);
            if (under_way_ == 0 && !room) {
                usleep(1000);  // nothing of ours will end and make some
            } else if (under_way_ > 0 || finished_.empty()) {
                uint64_t times;
                while (read(event_, &times, sizeof times) < 0 && errno == EINTR) {
                }
            }
            ended_.clear();
            queue_->collect(ended_);
            under_way_ -= static_cast<int64_t>(ended_.size());
            for (const dsl::Ended& ended : ended_) went(ended.slot, ended.result);
        }
    }

    // Gives back what is finished and fills free slots. Returns false when all is done and nothing will come.
    bool take() {
        const std::lock_guard<std::mutex> lock(aio_->mutex);
        dsl_aio_counts& counts = aio_->counts;
        counts.submissions += std::exchange(submissions_, 0);
        counts.peak_depth = std::max(counts.peak_depth, peak_);
        for (const uint64_t slot : finished_) finish(slots_[slot]);
        free_.insert(free_.end(), finished_.begin(), finished_.end());
        finished_.clear();
        std::deque<std::shared_ptr<Request>>& requests = aio_->requests;
        bool filling = aio_->config.overlap_events || free_.size() == slots_.size();
        while (filling && !free_.empty() && !requests.empty()) {
            const std::shared_ptr<Request> request = requests.front();
            if (!request->is_cut()) {
                Block& block = slots_[free_.back()].block;
                block = request->cut(aio_->block_bytes);
                block.request = request;
                ready_.push_back(free_.back());
                free_.pop_back();
                ++counts.blocks;
                counts.direct += block.direct;
                counts.bounced += block.bounced;
            }
            if (request->is_cut()) requests.pop_front();
        }
        return !aio_->ending || free_.size() < slots_.size() || !requests.empty();
    }

    // The lock is held.
    void finish(Slot& slot) {
        const std::shared_ptr<Request> request = std::exchange(slot.block.request, nullptr);
        if (--request->under_way > 0 || !request->is_cut()) return;
        if (aio_->first_failure.empty()) aio_->first_failure = request->failure;
        if (--aio_->requests_left == 0) aio_->all_done.notify_all();
    }

    // Hands what is ready to the queue. Returns false when that has no room now for all of it.
    bool submit() {
        batch_.clear();
        for (const uint64_t slot : std::exchange(ready_, {})) prepare(slot);
        for (size_t from = 0; from < batch_.size();) {
            const int64_t count = aio_->config.single_submit ? 1 : static_cast<int64_t>(batch_.size() - from);
            const int64_t taken = queue_->start(&batch_[from], count);
            ++submissions_;
            if (taken > 0) {
                under_way_ += taken;
                from += taken;
            } else if (taken == -EAGAIN || taken == -EBUSY || taken == -EINTR) {
                for (; from < batch_.size(); ++from) ready_.push_back(batch_[from].slot);
                return false;
            } else {
                went(batch_[from++].slot, taken);
            }
        }
        return true;
    }

    // Appends to the batch what is left of a block.
    void prepare(uint64_t index) {
        Slot& slot = slots_[index];
        const Block& block = slot.block;
        const bool write = block.request->write;
        const int64_t done = block.done, left = block.nbytes - done;
        if (block.bounced && slot.bounce == nullptr && !make_bounce(slot)) return went(index, -ENOMEM);
        if (block.bounced && write) std::memcpy(slot.bounce + done, block.memory + done, left);
        slot.transfer = {block.file(),        write, (block.bounced ? slot.bounce : block.memory) + done, left,
                         block.offset + done, index};
        batch_.push_back(slot.transfer);
    }

    bool make_bounce(Slot& slot) {
        void* const memory =
            mmap(nullptr, aio_->block_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) return false;
        madvise(memory, aio_->block_bytes, MADV_DONTFORK);  // a child has no use for it
        slot.bounce = static_cast<char*>(memory);
        return true;
    }

    // What became of a transfer: the block is done, goes on, is tried another way, or has failed.
    void went(uint64_t index, int64_t result) {
        Slot& slot = slots_[index];
        Block& block = slot.block;
        if (result == -EINVAL || result == -EOPNOTSUPP) {
            if (block.direct) {  // this file system wants another alignment
                block.direct = false;
                return ready_.push_back(index);
            }
            result = dsl::move_now(slot.transfer);  // a file that this queue does not take
        }
        if (result > 0) {
            if (block.bounced && !block.request->write)
                std::memcpy(block.memory + block.done, slot.bounce + block.done, result);
            block.done += result;
            if (block.done == block.nbytes) return finished_.push_back(index);
            if (block.done % PAGE != 0) block.direct = false;  // a short one: what follows is not aligned any more
            return ready_.push_back(index);
        }
        if (result == -EINTR || result == -EAGAIN) return ready_.push_back(index);
        const std::lock_guard<std::mutex> lock(aio_->mutex);
        block.request->fail(block.offset + block.done, static_cast<int>(-result));
        finished_.push_back(index);
    }

    dsl_aio* const aio_;
    int event_ = -1;
    std::unique_ptr<dsl::Queue> queue_;
    std::vector<Slot> slots_;
    std::vector<uint64_t> free_, ready_, finished_;  // slots: every other one is under way
    std::vector<Transfer> batch_;
    std::vector<dsl::Ended> ended_;
    int64_t under_way_ = 0, peak_ = 0, submissions_ = 0;
    std::thread thread_;
};

namespace {

// Waits for everything and ends the drivers.
void end(dsl_aio* aio) {
    {
        const std::lock_guard<std::mutex> lock(aio->mutex);
        aio->ending = true;
    }
    for (const std::unique_ptr<Driver>& driver : aio->drivers) driver->wake();
    aio->drivers.clear();
    aio->ending = false;
}

// Returns "" or why this engine cannot be had.
std::string start(dsl_aio* aio, dsl::OpenQueue open) {
    for (int32_t i = 0; i < aio->config.drivers; ++i) {
        aio->drivers.push_back(std::make_unique<Driver>(aio));
        const std::string why = aio->drivers.back()->start(open);
        if (!why.empty()) {
            end(aio);
            return why;
        }
    }
    return "";
}

}  // namespace

dsl_aio* dsl_aio_open(const dsl_aio_config* config, char* why, int64_t why_bytes) {
    auto aio = std::make_unique<dsl_aio>(*config);
    const std::string wanted = config->engine;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // the program's signals are for its own threads
    for (const auto& [name, open] : ENGINES) {
        if (!wanted.empty() && wanted != name) continue;
        const std::string refused = start(aio.get(), open);
        if (refused.empty()) {
            aio->engine = name;
            break;
        }
        aio->refused += (aio->refused.empty() ? "" : "; ") + std::string(name) + ": " + refused;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    aio->config.engine = nullptr;  // the caller's, and no longer needed
    if (!aio->drivers.empty()) return aio.release();
    std::snprintf(why, why_bytes, "%s", aio->refused.empty() ? "there is no such engine" : aio->refused.c_str());
    return nullptr;
}

const char* dsl_aio_engine(const dsl_aio* aio) { return aio->engine; }

const char* dsl_aio_refused(const dsl_aio* aio) { return aio->refused.c_str(); }

int dsl_aio_submit(dsl_aio* aio, void* memory, int64_t nbytes, const char* path, int64_t offset, bool write) {
    auto request = std::make_shared<Request>(path, write, static_cast<char*>(memory), nbytes, offset);
    if (const int error = request->open()) return error;
    {
        const std::lock_guard<std::mutex> lock(aio->mutex);
        ++aio->requests_told;
        if (nbytes == 0) return 0;
        ++aio->requests_left;
        aio->requests.push_back(std::move(request));
    }
    for (const std::unique_ptr<Driver>& driver : aio->drivers) driver->wake();
    return 0;
}

int64_t dsl_aio_wait(dsl_aio* aio) {
    std::unique_lock<std::mutex> lock(aio->mutex);
    aio->all_done.wait(lock, [&] { return aio->requests_left == 0; });
    const int64_t requests = std::exchange(aio->requests_told, 0);
    aio->told_failure = std::exchange(aio->first_failure, "");
    return aio->told_failure.empty() ? requests : -1;
}

const char* dsl_aio_failure(const dsl_aio* aio) { return aio->told_failure.c_str(); }

dsl_aio_counts dsl_aio_count(dsl_aio* aio) {
    const std::lock_guard<std::mutex> lock(aio->mutex);
    return aio->counts;
}

void dsl_aio_close(dsl_aio* aio) {
    end(aio);
    delete aio;
}
