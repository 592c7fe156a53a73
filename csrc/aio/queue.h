// A queue of transfers, some of which are under way at once: the one part in which the engines differ.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace dsl {

struct Transfer {
    int file;
    bool write;
    char* memory;
    int64_t nbytes, offset;
    uint64_t slot;  // comes back with the result
};

struct Ended {
    uint64_t slot;
    int64_t result;  // bytes moved, or -errno
};

// Is used by one thread. Whenever transfers end, the event (an eventfd) is written to.
class Queue {
 public:
    virtual ~Queue() = default;

    // Starts the first ones: returns how many, or -errno of the first if it could not even be started.
    virtual int64_t start(const Transfer* transfers, int64_t count) = 0;

    // Appends those that have ended; waits for nothing.
    virtual void collect(std::vector<Ended>& ended) = 0;
};

// A queue for up to `depth` transfers, or null, and why.
using OpenQueue = std::unique_ptr<Queue> (*)(int32_t depth, int event, std::string& why);
std::unique_ptr<Queue> open_uring(int32_t depth, int event, std::string& why);
std::unique_ptr<Queue> open_native(int32_t depth, int event, std::string& why);
std::unique_ptr<Queue> open_threads(int32_t depth, int event, std::string& why);

// pread or pwrite: bytes moved, or -errno.
int64_t move_now(const Transfer& transfer);

}  // namespace dsl
