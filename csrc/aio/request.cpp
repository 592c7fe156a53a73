#include "aio/request.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

namespace dsl {

namespace {

// How O_DIRECT wants memory to be aligned: what the kernel says (Linux 6.1 and newer), or a page.
int64_t memory_alignment(int file) {
#if defined(STATX_DIOALIGN)
    struct statx about{};
    if (statx(file, "", AT_EMPTY_PATH, STATX_DIOALIGN, &about) == 0 && (about.stx_mask & STATX_DIOALIGN) != 0 &&
        about.stx_dio_mem_align != 0)
        return about.stx_dio_mem_align;
#endif
    (void)file;
    return PAGE;
}

}  // namespace

Request::Request(std::string path, bool write, char* memory, int64_t nbytes, int64_t offset)
    : write(write), path_(std::move(path)), memory_(memory), begin_(offset), end_(offset + nbytes), next_(offset) {}

Request::~Request() {
    if (plain_ >= 0) close(plain_);
    if (direct_ >= 0) close(direct_);
}

int Request::open() {
    const int flags = O_CLOEXEC | (write ? O_WRONLY | O_CREAT : O_RDONLY);
    plain_ = ::open(path_.c_str(), flags, 0600);
    if (plain_ < 0) return errno;
    direct_ = ::open(path_.c_str(), flags | O_DIRECT, 0600);  // where it fails, the plain one does everything
    if (direct_ >= 0) memory_alignment_ = memory_alignment(direct_);
    return 0;
}

Block Request::cut(int64_t most_bytes) {
    Block block;
    block.memory = memory_ + (next_ - begin_);
    block.offset = next_;
    const int64_t left = end_ - next_, past_page = next_ % PAGE;
    if (direct_ < 0) {
        block.nbytes = std::min(most_bytes, left);
    } else if (past_page != 0) {
        block.nbytes = std::min(PAGE - past_page, left);
    } else {
        block.direct = left >= PAGE;
        block.nbytes = block.direct ? std::min(most_bytes, left / PAGE * PAGE) : left;
        block.bounced = block.direct && reinterpret_cast<uintptr_t>(block.memory) % memory_alignment_ != 0;
    }
    next_ += block.nbytes;
    ++under_way;
    return block;
}

void Request::fail(int64_t offset, int error) {
    if (!failure.empty() && failed_at_ <= offset) return;
    failed_at_ = offset;
    const std::string where = path_ + " at byte " + std::to_string(offset);
    if (error == 0 && !write) {
        failure = "the end of the file was reached in " + where + ", " + std::to_string(end_ - offset) + " bytes early";
    } else {
        failure = (write ? "writing " : "reading ") + where +
                  " failed: " + (error == 0 ? "nothing could be written" : std::strerror(error));
    }
}

}  // namespace dsl
