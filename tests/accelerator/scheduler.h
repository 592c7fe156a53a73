// Streams as queues, and who runs what when: the time of an accelerator that is made of a host's threads.
//
// Work is put down in a stream's queue and done later, front first. What runs next of all streams is drawn from a seed,
// so that an order which a GPU takes once in a thousand steps is taken here, and taken again by the same seed. Work runs
// when the host waits for it, now and then when the host puts more down, and when the host makes no call for a while
// (it may wait for another process, which waits for a collective of this one's).
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace threads {

using StreamKey = std::pair<int, int64_t>;  // device, stream

// A point of a stream: reached when the first `count` items of it are done.
struct Point {
    StreamKey stream{0, 0};
    uint64_t count = 0;
};

struct Item {
    std::string name;
    std::function<void()> run;                // does the work, or starts it
    std::function<bool()> is_done = nullptr;  // of what is only started
    bool waits = false;                       // whether it is a wait for `until`
    Point until{};
    bool is_started = false;
};

// What happened: for tests that look at the order.
struct Traced {
    std::string name;
    int64_t stream;
    uint64_t queued_at, run_at;  // both count all items of all streams
};

class Scheduler {
 public:
    static Scheduler& instance() {
        static Scheduler* one = new Scheduler;  // never destroyed: tensors may outlive statics
        return *one;
    }

    // Seed 0 runs everything as it comes: what a device without streams would compute.
    void seed(uint64_t seed) {
        synchronize_all();
        std::lock_guard<std::recursive_mutex> lock(mutex_);
        seed_ = seed;
        draw_.seed(seed);
        favours_.clear();
        constexpr double chances[] = {0.0, 0.1, 0.5, 0.9};
        chance_ = chances[draw_() % 4];
    }

    Point put(StreamKey stream, Item item) {
        std::unique_lock<std::recursive_mutex> lock(mutex_);
        ++calls_;
        Queue& queue = queues_[stream];
        queue.items.push_back(std::move(item));
        queue.put_at.push_back(++clock_);
        const Point point{stream, ++queue.put};
        if (is_running_) return point;
        if (seed_ == 0) {
            run_until(lock, [&] { return is_reached(point); }, stream);
        } else if (draw() < chance_ || queue.items.size() > 4096) {
            step(stream);
        }
        return point;
    }

    Point point_of(StreamKey stream) {
        std::lock_guard<std::recursive_mutex> lock(mutex_);
        return {stream, queues_[stream].put};
    }

    bool query(const Point& point) {
        std::lock_guard<std::recursive_mutex> lock(mutex_);
        ++calls_;
        if (!is_reached(point) && draw() < 0.5) step(point.stream);  // who asks again and again gets an answer
        return is_reached(point);
    }

    // No call: what an allocator asks itself.
    bool has_passed(const Point& point) {
        std::lock_guard<std::recursive_mutex> lock(mutex_);
        return is_reached(point);
    }

    void synchronize(const Point& point) {
        std::unique_lock<std::recursive_mutex> lock(mutex_);
        ++syncs_;
        run_until(lock, [&] { return is_reached(point); }, point.stream);
        rethrow();
    }

    void synchronize_device(int device) {
        std::vector<Point> ends;
        {
            std::lock_guard<std::recursive_mutex> lock(mutex_);
            for (auto& [key, queue] : queues_)
                if (key.first == device || device < 0) ends.push_back({key, queue.put});
        }
        std::unique_lock<std::recursive_mutex> lock(mutex_);
        ++syncs_;
        for (const Point& end : ends) run_until(lock, [&] { return is_reached(end); }, end.stream);
        rethrow();
    }

    void synchronize_all() { synchronize_device(-1); }

    // The one lock, of memory too: two would be taken in two orders.
    std::recursive_mutex& mutex() { return mutex_; }

    uint64_t syncs() const { return syncs_; }
    std::vector<Traced> take_trace() {
        std::lock_guard<std::recursive_mutex> lock(mutex_);
        return std::exchange(trace_, {});
    }
    void keep_trace(bool keep) {
        std::lock_guard<std::recursive_mutex> lock(mutex_);
        keeps_trace_ = keep;
    }

 private:
    struct Queue {
        std::deque<Item> items;
        std::deque<uint64_t> put_at;
        uint64_t put = 0, done = 0;
    };

    Scheduler() {
        std::thread([this] { run_while_host_is_still(); }).detach();
    }

    double draw() { return std::uniform_real_distribution<double>(0, 1)(draw_); }

    bool is_reached(const Point& point) { return queues_[point.stream].done >= point.count; }

    bool is_runnable(const Queue& queue) {
        if (queue.items.empty()) return false;
        const Item& front = queue.items.front();
        if (front.waits) return is_reached(front.until);
        return !front.is_started || front.is_done();
    }

    // The stream that `wanted` waits for in the end.
    StreamKey root_of(StreamKey wanted) {
        for (int i = 0; i < 64; ++i) {
            const Queue& queue = queues_[wanted];
            if (queue.items.empty() || !queue.items.front().waits || is_reached(queue.items.front().until)) break;
            wanted = queue.items.front().until.stream;
        }
        return wanted;
    }

    // How much a stream is favoured, by the seed: some always come last.
    double favour(StreamKey stream) {
        auto found = favours_.find(stream);
        if (found == favours_.end()) {
            constexpr double weights[] = {0.001, 1.0, 1000.0};
            found = favours_.emplace(stream, weights[draw_() % 3]).first;
        }
        return found->second;
    }

    // Run one item, mostly of a stream of the seed's choice; of `wanted` where that alone must go on. False: none could.
    bool step(StreamKey wanted) {
        std::vector<std::pair<StreamKey, double>> runnable;
        double sum = 0;
        for (auto& [key, queue] : queues_) {
            if (!is_runnable(queue)) continue;
            sum += seed_ == 0 ? 1.0 : favour(key);
            runnable.emplace_back(key, sum);
        }
        if (runnable.empty()) return false;
        StreamKey chosen = root_of(wanted);
        const bool can_serve = is_runnable(queues_[chosen]);
        if (!can_serve || (seed_ != 0 && draw() < 0.3)) {
            const double at = draw() * sum;
            chosen = runnable.back().first;
            for (auto& [key, upto] : runnable) {
                if (at < upto) {
                    chosen = key;
                    break;
                }
            }
        }
        run_front(chosen);
        return true;
    }

    void run_front(StreamKey key) {
        Queue& queue = queues_[key];
        Item& front = queue.items.front();
        if (!front.waits && !front.is_started) {
            front.is_started = true;
            if (keeps_trace_ && !front.name.empty())
                trace_.push_back({front.name, key.second, queue.put_at.front(), clock_});
            is_running_ = true;
            try {
                front.run();
            } catch (...) {
                if (!error_) error_ = std::current_exception();
                front.is_done = nullptr;
            }
            is_running_ = false;
            if (front.is_done && !front.is_done()) return;
        }
        // What it holds may be Python's, whose lock must not be waited for here: see `bury`.
        over_.push_back(std::move(queue.items.front()));
        queue.items.pop_front();
        queue.put_at.pop_front();
        ++queue.done;
        ++progress_;
    }

    template <class Condition>
    void run_until(std::unique_lock<std::recursive_mutex>& lock, Condition condition, StreamKey wanted) {
        while (!condition()) {
            if (step(wanted)) continue;
            lock.unlock();  // collectives are under way: other processes', or gloo's threads'
            std::this_thread::sleep_for(std::chrono::microseconds(50));
            lock.lock();
        }
    }

    void run_while_host_is_still() {
        uint64_t seen = 0;
        for (;;) {
            std::this_thread::sleep_for(std::chrono::milliseconds(3));
            bury();
            std::lock_guard<std::recursive_mutex> lock(mutex_);
            if (calls_ + syncs_ == seen) {
                const auto start = std::chrono::steady_clock::now();
                while (step({0, 0}) && std::chrono::steady_clock::now() - start < std::chrono::milliseconds(1)) {
                }
            }
            seen = calls_ + syncs_;
        }
    }

    // Destroy what is done, without the lock.
    void bury() {
        std::vector<Item> over;
        {
            std::lock_guard<std::recursive_mutex> lock(mutex_);
            over.swap(over_);
        }
    }

    void rethrow() {
        if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
    }

    // Recursive: work that fails has Python's frames looked at, which may collect garbage, which frees memory here.
    std::recursive_mutex mutex_;
    bool is_running_ = false;
    std::map<StreamKey, Queue> queues_;
    std::vector<Item> over_;
    std::map<StreamKey, double> favours_;
    std::mt19937_64 draw_{0};
    uint64_t seed_ = 0, clock_ = 0, calls_ = 0, progress_ = 0;
    double chance_ = 0.5;
    std::atomic<uint64_t> syncs_{0};
    std::exception_ptr error_;  // of the first work that failed, for the next who waits
    bool keeps_trace_ = false;
    std::vector<Traced> trace_;
};

}  // namespace threads
