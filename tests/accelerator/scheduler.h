// Streams as queues, and who runs what when: the time of an accelerator that is made of a host's threads.
//
// Work is put down in a stream's queue and done later, front first. What runs next of all streams is drawn from a seed,
// so that an order which a GPU takes once in a thousand steps is taken here, and taken again by the same seed. Work runs
// when the host waits for it, now and then when the host puts more down, and when the host makes no call for a while
// (it may wait for another process, which waits for a collective of this one's).
//
// [Note: locks] Two are wanted here, Python's and the scheduler's, by threads of all kinds. So that they cannot wait for
// each other: whoever has the scheduler's never waits for Python's. Hence work runs without it, one piece at a time
// (`is_running_`), what is done is destroyed without it (`bury`), since tensors may be Python's, and who may have to
// wait gives Python's back before he takes it (`WithoutPython`).
#pragma once

#include <Python.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <mutex>
#include <random>
#include <stdexcept>
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

// Gives Python's lock back, where this thread has it, for as long as this lives; made before the scheduler's is taken.
class WithoutPython {
 public:
    WithoutPython() : state_(Py_IsInitialized() && PyGILState_Check() ? PyEval_SaveThread() : nullptr) {}
    ~WithoutPython() {
        if (state_ != nullptr) PyEval_RestoreThread(state_);
    }
    WithoutPython(const WithoutPython&) = delete;
    WithoutPython& operator=(const WithoutPython&) = delete;

 private:
    PyThreadState* state_;
};

class Scheduler {
    using Mutex = std::recursive_mutex;
    using Lock = std::unique_lock<Mutex>;

 public:
    static Scheduler& instance() {
        static Scheduler* one = new Scheduler;  // never destroyed: tensors may outlive statics
        return *one;
    }

    // Seed 0 runs everything as it comes: what a device without streams would compute.
    void seed(uint64_t seed) {
        synchronize_all();
        Lock lock(mutex_);
        seed_ = seed;
        draw_.seed(seed);
        favours_.clear();
        constexpr double chances[] = {0.0, 0.1, 0.5, 0.9};
        chance_ = chances[draw_() % 4];
    }

    // Put work down; now and then, some is run. Who has the lock already says that none may be.
    Point put(StreamKey stream, Item item) {
        WithoutPython unlocked;
        Lock lock(mutex_);
        const Point point = put_only(stream, std::move(item));
        if (is_running_) return point;
        if (seed_ == 0) {
            run_until(lock, [&] { return is_reached(point); }, stream);
        } else if (draw() < chance_ || queues_[stream].items.size() > 4096) {
            step(lock, stream);
        }
        return point;
    }

    Point put_only(StreamKey stream, Item item) {
        Lock lock(mutex_);
        start_thread();
        ++calls_;
        Queue& queue = queues_[stream];
        queue.items.push_back(std::move(item));
        queue.put_at.push_back(++clock_);
        return {stream, ++queue.put};
    }

    Point point_of(StreamKey stream) {
        Lock lock(mutex_);
        return {stream, queues_[stream].put};
    }

    bool query(const Point& point) {
        WithoutPython unlocked;
        Lock lock(mutex_);
        ++calls_;
        if (!is_reached(point) && draw() < 0.5) step(lock, point.stream);  // who asks again and again gets an answer
        return is_reached(point);
    }

    // No call: what an allocator asks itself.
    bool has_passed(const Point& point) {
        Lock lock(mutex_);
        return is_reached(point);
    }

    void synchronize(const Point& point) {
        WithoutPython unlocked;
        Lock lock(mutex_);
        ++syncs_;
        run_until(lock, [&] { return is_reached(point); }, point.stream);
        rethrow();
    }

    void synchronize_device(int device) {
        WithoutPython unlocked;
        Lock lock(mutex_);
        std::vector<Point> ends;
        for (auto& [key, queue] : queues_)
            if (key.first == device || device < 0) ends.push_back({key, queue.put});
        ++syncs_;
        for (const Point& end : ends) run_until(lock, [&] { return is_reached(end); }, end.stream);
        rethrow();
    }

    void synchronize_all() { synchronize_device(-1); }

    // The one lock, of memory too: two would be taken in two orders.
    Mutex& mutex() { return mutex_; }

    uint64_t syncs() const { return syncs_; }
    std::vector<Traced> take_trace() {
        Lock lock(mutex_);
        return std::exchange(trace_, {});
    }
    void keep_trace(bool keep) {
        Lock lock(mutex_);
        keeps_trace_ = keep;
    }

 private:
    struct Queue {
        std::deque<Item> items;
        std::deque<uint64_t> put_at;
        uint64_t put = 0, done = 0;
    };

    Scheduler() = default;

    // One in each process: a fork leaves it behind.
    void start_thread() {
        if (thread_of_ == getpid()) return;
        thread_of_ = getpid();
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

    // Run one item, mostly of a stream of the seed's choice; of `wanted` where that alone must go on. False: none could,
    // or one is run at this moment. The lock is let go meanwhile.
    bool step(Lock& lock, StreamKey wanted) {
        if (is_running_) return false;
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
        run_front(lock, chosen);
        return true;
    }

    void run_front(Lock& lock, StreamKey key) {
        Queue& queue = queues_[key];
        Item& front = queue.items.front();  // stays where it is: others only put down behind it
        if (!front.waits && !front.is_started) {
            front.is_started = true;
            if (keeps_trace_ && !front.name.empty())
                trace_.push_back({front.name, key.second, queue.put_at.front(), clock_});
            is_running_ = true;
            is_runner() = true;
            lock.unlock();
            std::exception_ptr failed;
            try {
                front.run();
            } catch (...) {
                failed = std::current_exception();
            }
            lock.lock();
            is_runner() = false;
            is_running_ = false;
            if (failed) {
                front.is_done = nullptr;
                if (!error_) error_ = failed;
                failed_.push_back(std::move(failed));
            }
            if (front.is_done && !front.is_done()) return;
        }
        over_.push_back(std::move(queue.items.front()));
        queue.items.pop_front();
        queue.put_at.pop_front();
        ++queue.done;
    }

    template <class Condition>
    void run_until(Lock& lock, Condition condition, StreamKey wanted) {
        if (is_runner()) throw std::logic_error("work of a stream waits for the device");
        while (!condition()) {
            if (step(lock, wanted)) continue;
            lock.unlock();  // another thread runs some, or collectives are under way: other processes', or gloo's threads'
            std::this_thread::sleep_for(std::chrono::microseconds(50));
            lock.lock();
        }
    }

    // Whether the calling thread is within work.
    static bool& is_runner() {
        thread_local bool is = false;
        return is;
    }

    void run_while_host_is_still() {
        uint64_t seen = 0;
        for (;;) {
            std::this_thread::sleep_for(std::chrono::milliseconds(3));
            bury();
            Lock lock(mutex_);
            if (calls_ + syncs_ == seen) {
                const auto start = std::chrono::steady_clock::now();
                while (step(lock, {0, 0}) && std::chrono::steady_clock::now() - start < std::chrono::milliseconds(1)) {
                }
            }
            seen = calls_ + syncs_;
        }
    }

    // Destroy what is done, without the lock.
    void bury() {
        std::vector<Item> over;
        std::vector<std::exception_ptr> failed;
        Lock lock(mutex_);
        over.swap(over_);
        failed.swap(failed_);
        lock.unlock();
    }

    void rethrow() {
        if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
    }

    Mutex mutex_;              // recursive: memory holds it, too, and puts down what fills what is freed
    bool is_running_ = false;  // work, by some thread that has let the lock go
    pid_t thread_of_ = 0;
    std::map<StreamKey, Queue> queues_;
    std::vector<Item> over_;  // done, to be destroyed
    std::vector<std::exception_ptr> failed_;
    std::map<StreamKey, double> favours_;
    std::mt19937_64 draw_{0};
    uint64_t seed_ = 0, clock_ = 0, calls_ = 0;
    double chance_ = 0.5;
    std::atomic<uint64_t> syncs_{0};
    std::exception_ptr error_;  // of the first work that failed, for the next who waits
    bool keeps_trace_ = false;
    std::vector<Traced> trace_;
};

}  // namespace threads
