// A read or write of a file, and the blocks that it is cut into.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

namespace dsl {

// What O_DIRECT asks of places in a file, on every file system and disk known; of memory it may ask less.
constexpr int64_t PAGE = 4096;

struct Block;

class Request {
 public:
    Request(std::string path, bool write, char* memory, int64_t nbytes, int64_t offset);
    ~Request();
    Request(const Request&) = delete;
    Request& operator=(const Request&) = delete;

    // Opens the file: 0, or errno.
    int open();

    // Whether all of it has been cut into blocks, or need not be because it failed.
    bool is_cut() const { return next_ == end_ || !failure.empty(); }

    // The next block, of `most_bytes` (whole pages) at most: the pages of the file past the page cache where that is to
    // be had, what is left before and after them through it.
    Block cut(int64_t most_bytes);

    // Of several failures, the first in the file is told.
    void fail(int64_t offset, int error);

    const bool write;
    int64_t under_way = 0;  // blocks
    std::string failure;

 private:
    const std::string path_;
    char* const memory_;
    const int64_t begin_, end_;  // in the file
    int64_t next_, failed_at_ = 0;
    int plain_ = -1, direct_ = -1;     // direct: -1 where O_DIRECT cannot be had
    int64_t memory_alignment_ = PAGE;  // that O_DIRECT asks for
    friend struct Block;
};

struct Block {
    std::shared_ptr<Request> request;  // null: none
    char* memory = nullptr;            // the caller's
    int64_t nbytes = 0, offset = 0, done = 0;
    bool direct = false, bounced = false;  // bounced: through another buffer, since the caller's is not aligned

    int file() const { return direct ? request->direct_ : request->plain_; }
};

}  // namespace dsl
