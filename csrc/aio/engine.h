// Reads and writes of files by threads, as the C ABI between the engine (engine.cpp) and its binding (async_io.cpp).
#pragma once

#include <cstdint>

extern "C" {

struct dsl_aio;

// A pool of `threads` that moves files in pieces of `block_bytes`. Null when the threads cannot be started.
dsl_aio* dsl_aio_open(int64_t block_bytes, int32_t threads);

// Starts moving `nbytes` between memory and the file at `offset`. The memory must stay until `dsl_aio_wait` returns.
// Returns 0, or errno where the file cannot be opened.
int dsl_aio_submit(dsl_aio* aio, void* memory, int64_t nbytes, const char* path, int64_t offset, bool write);

// Waits for everything that was submitted. Returns how many requests there were, or -1; then `dsl_aio_failure` says what
// happened to the first that failed, until the next call.
int64_t dsl_aio_wait(dsl_aio* aio);
const char* dsl_aio_failure(const dsl_aio* aio);

// Waits, and ends the threads.
void dsl_aio_close(dsl_aio* aio);
}
