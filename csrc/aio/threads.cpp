// Transfers by threads that call pread and pwrite: where the kernel has, or allows, no queue of its own.
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>

#include "aio/queue.h"

namespace dsl {

int64_t move_now(const Transfer& transfer) {
    const auto [file, write, memory, nbytes, offset, slot] = transfer;
    const ssize_t moved = write ? pwrite(file, memory, nbytes, offset) : pread(file, memory, nbytes, offset);
    return moved < 0 ? -errno : moved;
}

namespace {

constexpr int32_t MOST_THREADS = 64;

class Threads final : public Queue {
 public:
    explicit Threads(int event) : event_(event) {}
    ~Threads() override {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            ending_ = true;
        }
        something_to_do_.notify_all();
        for (std::thread& thread : threads_) thread.join();
    }

    // Returns "" or what is refused.
    std::string open(int32_t depth) {
        try {
            for (int32_t i = 0; i < std::min(depth, MOST_THREADS); ++i) threads_.emplace_back(&Threads::work, this);
        } catch (const std::system_error& error) {
            return std::string("starting a thread: ") + error.what();
        }
        return "";
    }

    int64_t start(const Transfer* transfers, int64_t count) override {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            waiting_.insert(waiting_.end(), transfers, transfers + count);
        }
        for (int64_t i = 0; i < count; ++i) something_to_do_.notify_one();
        return count;
    }

    void collect(std::vector<Ended>& ended) override {
        const std::lock_guard<std::mutex> lock(mutex_);
        ended.insert(ended.end(), ended_.begin(), ended_.end());
        ended_.clear();
    }

 private:
    void work() {
        std::unique_lock<std::mutex> lock(mutex_);
        while (true) {
            something_to_do_.wait(lock, [&] { return !waiting_.empty() || ending_; });
            if (waiting_.empty()) return;
            const Transfer transfer = waiting_.front();
            waiting_.pop_front();
            lock.unlock();
            const int64_t result = move_now(transfer);
            lock.lock();
            ended_.push_back({transfer.slot, result});
            const uint64_t one = 1;
            (void)!write(event_, &one, sizeof one);  // cannot fail: the counter is far from its end
        }
    }

    const int event_;
    std::mutex mutex_;
    std::condition_variable something_to_do_;
    std::deque<Transfer> waiting_;
    std::vector<Ended> ended_;
    std::vector<std::thread> threads_;
    bool ending_ = false;
};

}  // namespace

std::unique_ptr<Queue> open_threads(int32_t depth, int event, std::string& why) {
    auto queue = std::make_unique<Threads>(event);
    why = queue->open(depth);
    if (!why.empty()) return nullptr;
    return queue;
}

}  // namespace dsl
