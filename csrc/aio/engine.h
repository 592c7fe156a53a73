// Reads and writes of files beside the program, as the C ABI between the engine (engine.cpp) and its binding
// (async_io.cpp).
#pragma once

#include <cstdint>

extern "C" {

struct dsl_aio;

struct dsl_aio_config {
    const char* engine;   // "io_uring", "aio" or "threads"; "" takes the first of them that there is
    int64_t block_bytes;  // a transfer's size; taken up to whole pages
    int32_t queue_depth;  // transfers under way at once, of each driver
    int32_t drivers;      // threads that fill and empty a queue, each its own
    bool single_submit;   // hand transfers to the kernel one by one
    bool overlap_events;  // refill the queue as transfers end; without it, when all of them have
};

// Null where the engine, or every one, cannot be had; then `why` (of `why_bytes`) says the reason.
dsl_aio* dsl_aio_open(const dsl_aio_config* config, char* why, int64_t why_bytes);

// The engine in use, and why those before it could not be had ("" where it is the first).
const char* dsl_aio_engine(const dsl_aio* aio);
const char* dsl_aio_refused(const dsl_aio* aio);

// Starts moving `nbytes` between memory and the file at `offset`. The memory must stay until `dsl_aio_wait` returns.
// Returns 0, or errno where the file cannot be opened.
int dsl_aio_submit(dsl_aio* aio, void* memory, int64_t nbytes, const char* path, int64_t offset, bool write);

// Waits for everything that was submitted. Returns how many requests there were, or -1; then `dsl_aio_failure` says what
// happened to the first that failed, until the next call.
int64_t dsl_aio_wait(dsl_aio* aio);
const char* dsl_aio_failure(const dsl_aio* aio);

// Since the engine was opened.
struct dsl_aio_counts {
    int64_t blocks;       // transfers that were started
    int64_t bounced;      // of them, those through another buffer because theirs is not aligned
    int64_t direct;       // of them, those past the page cache
    int64_t submissions;  // calls that started some
    int64_t peak_depth;   // most under way at once in one queue
};
dsl_aio_counts dsl_aio_count(dsl_aio* aio);

// Waits for everything, and ends the threads.
void dsl_aio_close(dsl_aio* aio);
}
