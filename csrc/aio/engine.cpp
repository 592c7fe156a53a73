// Threads that read and write files in blocks, past the page cache where they can.
//
// A request is cut into blocks, which the threads take in order. A block whose memory, offset and length are multiples
// of a page goes through a descriptor with O_DIRECT; what is left at the ends, and everything on a file system without
// O_DIRECT, through an ordinary one. The first failure of a request ends the rest of it, not the other requests.
#include "aio/engine.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace {

constexpr int64_t PAGE = 4096;

struct Request {
    std::string path;
    bool write;
    int plain = -1, direct = -1;  // direct: -1 where O_DIRECT cannot be had
    int64_t blocks_left = 0;
    bool failed = false;

    ~Request() {
        if (plain >= 0) close(plain);
        if (direct >= 0) close(direct);
    }
};

struct Block {
    std::shared_ptr<Request> request;
    char* memory;
    int64_t nbytes, offset;
};

bool is_aligned(const Block& block) {
    return (reinterpret_cast<uintptr_t>(block.memory) | static_cast<uintptr_t>(block.nbytes) |
            static_cast<uintptr_t>(block.offset)) %
               PAGE ==
           0;
}

// Moves all of the block; returns "" or what went wrong.
std::string move(const Block& block) {
    const Request& request = *block.request;
    int file = request.direct >= 0 && is_aligned(block) ? request.direct : request.plain;
    int64_t done = 0;
    while (done < block.nbytes) {
        char* const memory = block.memory + done;
        const int64_t offset = block.offset + done, left = block.nbytes - done;
        const ssize_t moved = request.write ? pwrite(file, memory, left, offset) : pread(file, memory, left, offset);
        if (moved > 0) {
            done += moved;
            if (done % PAGE != 0) file = request.plain;  // a short one: what follows is not aligned any more
        } else if (moved == 0) {
            return (request.write ? "nothing could be written to " : "the end of the file was reached in ") +
                   request.path + " at byte " + std::to_string(offset) + ", " + std::to_string(left) + " bytes early";
        } else if (errno == EINVAL && file == request.direct) {
            file = request.plain;  // this file system wants another alignment
        } else if (errno != EINTR && errno != EAGAIN) {
            return std::string(request.write ? "writing " : "reading ") + request.path + " at byte " +
                   std::to_string(offset) + " failed: " + std::strerror(errno);
        }
    }
    return "";
}

}  // namespace

struct dsl_aio {
    explicit dsl_aio(int64_t block) : block_bytes(block) {}

    void work() {
        std::unique_lock<std::mutex> lock(mutex);
        while (true) {
            something_to_do.wait(lock, [&] { return !blocks.empty() || ending; });
            if (blocks.empty()) return;
            const Block block = std::move(blocks.front());
            blocks.pop_front();
            std::string failure;
            if (!block.request->failed) {
                lock.unlock();
                failure = move(block);
                lock.lock();
            }
            if (!failure.empty()) {
                block.request->failed = true;
                if (first_failure.empty()) first_failure = failure;
            }
            if (--block.request->blocks_left == 0 && --requests_left == 0) all_done.notify_all();
        }
    }

    void end() {
        {
            const std::lock_guard<std::mutex> lock(mutex);
            ending = true;
        }
        something_to_do.notify_all();
        for (std::thread& thread : threads) thread.join();
    }

    const int64_t block_bytes;
    std::mutex mutex;
    std::condition_variable something_to_do, all_done;
    std::deque<Block> blocks;
    std::vector<std::thread> threads;
    int64_t requests_left = 0, requests = 0;
    std::string first_failure, told_failure;
    bool ending = false;
};

dsl_aio* dsl_aio_open(int64_t block_bytes, int32_t threads) {
    auto aio = std::make_unique<dsl_aio>(block_bytes);
    try {
        for (int32_t i = 0; i < threads; ++i) aio->threads.emplace_back(&dsl_aio::work, aio.get());
    } catch (const std::system_error&) {
        aio->end();
        return nullptr;
    }
    return aio.release();
}

int dsl_aio_submit(dsl_aio* aio, void* memory, int64_t nbytes, const char* path, int64_t offset, bool write) {
    auto request = std::make_shared<Request>();
    request->path = path;
    request->write = write;
    const int flags = O_CLOEXEC | (write ? O_WRONLY | O_CREAT : O_RDONLY);
    request->plain = open(path, flags, 0600);
    if (request->plain < 0) return errno;
    request->direct = open(path, flags | O_DIRECT, 0600);  // where it fails, the plain one does everything
    const std::lock_guard<std::mutex> lock(aio->mutex);
    ++aio->requests;
    if (nbytes == 0) return 0;
    ++aio->requests_left;
    request->blocks_left = (nbytes + aio->block_bytes - 1) / aio->block_bytes;
    for (int64_t start = 0; start < nbytes; start += aio->block_bytes) {
        aio->blocks.push_back(
            {request, static_cast<char*>(memory) + start, std::min(aio->block_bytes, nbytes - start), offset + start});
    }
    aio->something_to_do.notify_all();
    return 0;
}

int64_t dsl_aio_wait(dsl_aio* aio) {
    std::unique_lock<std::mutex> lock(aio->mutex);
    aio->all_done.wait(lock, [&] { return aio->requests_left == 0; });
    const int64_t requests = std::exchange(aio->requests, 0);
    aio->told_failure = std::exchange(aio->first_failure, "");
    return aio->told_failure.empty() ? requests : -1;
}

const char* dsl_aio_failure(const dsl_aio* aio) { return aio->told_failure.c_str(); }

void dsl_aio_close(dsl_aio* aio) {
    aio->end();
    delete aio;
}
