// The ops of async_io on libtorch's stable ABI: a handle is the address of an engine. See deepspeedlite/ops/aio.py.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <string>
#include <vector>

#include "aio/engine.h"
#include "common/binding.h"

namespace {

dsl_aio* engine(int64_t handle) { return reinterpret_cast<dsl_aio*>(handle); }

int64_t aio_open(std::string wanted, int64_t block_bytes, int64_t queue_depth, int64_t drivers, bool single_submit,
                 bool overlap_events) {
    const dsl_aio_config config{
        wanted.c_str(), block_bytes,   static_cast<int32_t>(queue_depth), static_cast<int32_t>(drivers),
        single_submit,  overlap_events};
    char why[500] = "";
    dsl_aio* const opened = dsl_aio_open(&config, why, sizeof why);
    STD_TORCH_CHECK(opened != nullptr, why);
    return reinterpret_cast<int64_t>(opened);
}

std::string aio_engine(int64_t handle) { return dsl_aio_engine(engine(handle)); }

std::string aio_refused(int64_t handle) { return dsl_aio_refused(engine(handle)); }

void submit(const char* op, int64_t handle, const torch::stable::Tensor& buffer, const std::string& path,
            int64_t offset, bool write) {
    STD_TORCH_CHECK(buffer.is_contiguous(), op, ": the buffer is not contiguous");
    const int64_t nbytes = buffer.numel() * static_cast<int64_t>(buffer.element_size());
    const int error = dsl_aio_submit(engine(handle), buffer.data_ptr(), nbytes, path.c_str(), offset, write);
    STD_TORCH_CHECK(error == 0, "opening ", path.c_str(), " failed: ", std::strerror(error));
}

void aio_read(int64_t handle, torch::stable::Tensor buffer, std::string path, int64_t offset) {
    submit("aio_read", handle, buffer, path, offset, false);
}

void aio_write(int64_t handle, torch::stable::Tensor buffer, std::string path, int64_t offset) {
    submit("aio_write", handle, buffer, path, offset, true);
}

int64_t aio_wait(int64_t handle) {
    const int64_t requests = dsl_aio_wait(engine(handle));
    STD_TORCH_CHECK(requests >= 0, dsl_aio_failure(engine(handle)));
    return requests;
}

std::vector<int64_t> aio_counts(int64_t handle) {
    const dsl_aio_counts counts = dsl_aio_count(engine(handle));
    return {counts.blocks, counts.direct, counts.bounced, counts.submissions, counts.peak_depth};
}

void aio_close(int64_t handle) { dsl_aio_close(engine(handle)); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(deepspeedlite, m) {
    m.def(
        "aio_open(str engine, int block_bytes, int queue_depth, int drivers, bool single_submit, bool overlap_events)"
        " -> int");
    m.def("aio_engine(int handle) -> str");
    m.def("aio_refused(int handle) -> str");
    m.def("aio_counts(int handle) -> int[]");
    m.def("aio_read(int handle, Tensor(a!) buffer, str path, int offset) -> ()");
    m.def("aio_write(int handle, Tensor buffer, str path, int offset) -> ()");
    m.def("aio_wait(int handle) -> int");
    m.def("aio_close(int handle) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(deepspeedlite, CPU, m) {
    m.impl("aio_read", TORCH_BOX(&aio_read));
    m.impl("aio_write", TORCH_BOX(&aio_write));
}

STABLE_TORCH_LIBRARY_IMPL(deepspeedlite, CompositeExplicitAutograd, m) {
    m.impl("aio_open", TORCH_BOX(&aio_open));
    m.impl("aio_engine", TORCH_BOX(&aio_engine));
    m.impl("aio_refused", TORCH_BOX(&aio_refused));
    m.impl("aio_counts", TORCH_BOX(&aio_counts));
    m.impl("aio_wait", TORCH_BOX(&aio_wait));
    m.impl("aio_close", TORCH_BOX(&aio_close));
}
