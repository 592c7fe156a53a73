// What the bindings of optimizers' GPU ops share.
#pragma once

#include "common/on_gpu.h"
#include "gpu_optim/gpu_optim.h"

#if defined(DSL_GPU)

namespace dsl {

// As common/on_gpu.h, on the tensors' device.
template <class Launch>
void on_gpu(const char* op, const Table& table, const Launch& launch) {
    on_gpu(op, table.device_index, launch);
}

// As many floats for each block of the kernels' grids.
inline torch::stable::Tensor scratch_per_block(const Table& table, int64_t floats) {
    int64_t blocks = 0;
    for (const int64_t numel : table.numels) blocks += (numel + DSL_GPU_BLOCK_NUMEL - 1) / DSL_GPU_BLOCK_NUMEL;
    return scratch(table.device_index, floats * blocks);
}

}  // namespace dsl

#endif
