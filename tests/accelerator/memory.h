// Memory of the accelerator: the host's, handed out as a caching allocator does it on a GPU.
//
// What is freed may be had again at once by the stream that it was made on, and by no other; streams that it was
// recorded on are waited for first. Whoever reads it later than that reads what the next owner writes: so every freed
// block is filled with 0xff (NaN, -1) by its own stream, in that stream's order, and fresh memory holds the same.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/DeviceGuard.h>

#include <cstdlib>
#include <cstring>
#include <set>
#include <unordered_map>

#include "scheduler.h"

namespace threads {

StreamKey current_stream(int device);
int current_device();

constexpr unsigned char POISON = 0xff;

class Memory final : public c10::Allocator {
 public:
    static Memory& instance() {
        static Memory* one = new Memory;
        return *one;
    }

    c10::DataPtr allocate(size_t nbytes) override {
        const int device = current_device();
        const c10::Device where(c10::DeviceType::PrivateUse1, static_cast<c10::DeviceIndex>(device));
        if (nbytes == 0) return {nullptr, nullptr, &release, where};
        const StreamKey stream = current_stream(device);
        const size_t rounded = (nbytes + 511) / 512 * 512;
        std::lock_guard<std::recursive_mutex> lock(Scheduler::instance().mutex());
        reclaim();
        void* data = nullptr;
        auto& waiting = free_[{stream, rounded}];
        if (!waiting.empty()) {
            data = waiting.back();
            waiting.pop_back();
        } else {
            data = std::aligned_alloc(512, rounded);
            std::memset(data, POISON, rounded);
            reserved_ += rounded;
        }
        blocks_[data] = {stream, rounded, {}};
        live_ += rounded;
        if (live_ > peak_) peak_ = live_;
        return {data, data, &release, where};
    }

    c10::DeleterFnPtr raw_deleter() const override { return &release; }

    void copy_data(void* to, const void* from, size_t nbytes) const override {
        Scheduler::instance().put(current_stream(current_device()),
                                  {"copy_data", [=] { std::memcpy(to, from, nbytes); }});
    }

    void record(void* data, StreamKey stream) {
        std::lock_guard<std::recursive_mutex> lock(Scheduler::instance().mutex());
        auto found = blocks_.find(data);
        if (found != blocks_.end() && found->second.stream != stream) found->second.users.insert(stream);
    }

    size_t live() const { return live_; }
    size_t peak() const { return peak_; }
    size_t reserved() const { return reserved_; }
    void reset_peak() { peak_ = live_; }

 private:
    struct Block {
        StreamKey stream;
        size_t nbytes = 0;
        std::set<StreamKey> users;
    };
    struct Pending {
        void* data;
        Block block;
        std::vector<Point> ends;
    };

    static void release(void* data) {
        if (data != nullptr) instance().free(data);
    }

    void free(void* data) {
        std::lock_guard<std::recursive_mutex> lock(Scheduler::instance().mutex());
        auto found = blocks_.find(data);
        Block block = std::move(found->second);
        blocks_.erase(found);
        live_ -= block.nbytes;
        std::vector<Point> ends;
        for (const StreamKey& user : block.users) ends.push_back(Scheduler::instance().point_of(user));
        if (ends.empty()) return give_back(data, block);
        pending_.push_back({data, std::move(block), std::move(ends)});
        reclaim();
    }

    void give_back(void* data, const Block& block) {
        const size_t nbytes = block.nbytes;
        Scheduler::instance().put_only(block.stream, {"", [=] { std::memset(data, POISON, nbytes); }});
        free_[{block.stream, nbytes}].push_back(data);
    }

    void reclaim() {
        for (size_t i = 0; i < pending_.size();) {
            bool passed = true;
            for (const Point& end : pending_[i].ends) passed = passed && Scheduler::instance().has_passed(end);
            if (!passed) {
                ++i;
                continue;
            }
            give_back(pending_[i].data, pending_[i].block);
            pending_.erase(pending_.begin() + static_cast<std::ptrdiff_t>(i));
        }
    }

    std::unordered_map<void*, Block> blocks_;
    std::map<std::pair<StreamKey, size_t>, std::vector<void*>> free_;
    std::vector<Pending> pending_;
    size_t live_ = 0, peak_ = 0, reserved_ = 0;
};

// Pinned memory of the host: what copies may read and write while the host goes on.
class Pinned final : public c10::Allocator {
 public:
    static Pinned& instance() {
        static Pinned* one = new Pinned;
        return *one;
    }

    c10::DataPtr allocate(size_t nbytes) override {
        void* data = nbytes == 0 ? nullptr : std::aligned_alloc(512, (nbytes + 511) / 512 * 512);
        if (data != nullptr) {
            std::memset(data, POISON, nbytes);
            std::lock_guard lock(mutex_);
            blocks_[data] = nbytes;
        }
        return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
    }

    c10::DeleterFnPtr raw_deleter() const override { return &release; }
    void copy_data(void* to, const void* from, size_t nbytes) const override { std::memcpy(to, from, nbytes); }

    bool holds(const void* data) {
        std::lock_guard lock(mutex_);
        auto after = blocks_.upper_bound(const_cast<void*>(data));
        if (after == blocks_.begin()) return false;
        --after;
        return data < static_cast<const char*>(after->first) + after->second;
    }

 private:
    static void release(void* data) {
        if (data == nullptr) return;
        Pinned& self = instance();
        std::lock_guard lock(self.mutex_);
        std::memset(data, POISON, self.blocks_[data]);
        self.blocks_.erase(data);
        std::free(data);
    }

    std::mutex mutex_;
    std::map<void*, size_t> blocks_;
};

}  // namespace threads
