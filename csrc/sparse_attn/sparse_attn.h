// Block-sparse attention: the C ABI between the kernels, on the CPU and on GPUs, and the binding.
//
//   S = scale * q k^T + biases      where a layout keeps the block and nothing hides the position, else -infinity
//   P = softmax of S's rows         0 in rows where nothing is seen
//   out = dropout(P) v              P's numbers are dropped, or divided by 1 - p
//
// Neither S nor P is ever kept: `lse`, the logarithm of the sum of a row's exponentials, is what backward makes P from
// anew (Dao et al. 2022, arXiv:2205.14135). Layouts are lists of blocks in compressed rows, one list a row of blocks for
// out and dq, one a column for dk and dv, so that each result has one writer and no kernel needs atomics.
#pragma once

#include "common/philox.h"
#include "common/tensor.h"

// (batch, heads, tokens, dim): the numbers of a token lie side by side, all else by these steps, in elements. A step may
// be 0 in what is read: a head of keys that serves several heads of queries.
struct dsl_heads {
    dsl_tensor x;
    int64_t batch, head, token;
};

// Blocks that are kept. List l of batch b and head h is b * list_batch + h * list_head; its row r has the blocks
// blocks[starts[l * rows + r]] to blocks[starts[l * rows + r + 1]], ascending. By columns the same, of columns.
struct dsl_blocks {
    const int32_t* starts;
    const int32_t* blocks;   // the block's column, or by columns its row
    const int32_t* partial;  // beside each block the number of its mask in `partial_masks`, or -1; null: none has one
};

enum dsl_bias_kind : int32_t {
    DSL_NO_BIAS,
    DSL_ADDED,        // its number is added to the score; -infinity hides
    DSL_HIDES_ZEROS,  // where its number is 0 the position is hidden; others change nothing
    DSL_SEEN          // the same, of bytes (torch.bool)
};

// What is added to scores or hides them, seen as (batch, heads, queries, keys): steps are in elements, 0 where it is the
// same for all. The mask has any of them, key padding row 0 and head 0, a relative position bias mostly batch 0.
struct dsl_bias {
    dsl_tensor x;  // its dtype means nothing where the kind is DSL_SEEN
    dsl_bias_kind kind;
    int64_t batch, head, row, column;
};

enum { DSL_MASK, DSL_PADDING, DSL_POSITIONS, DSL_BIASES };

struct dsl_sparse_attention {
    dsl_heads q, k, v;     // of one dtype
    dsl_heads out;         // q's dtype; all of it is written
    float* lse;            // (batch, heads, queries); +infinity where a row sees nothing
    dsl_heads dout;        // q's dtype, as all that follows in this struct's dsl_heads
    float* delta;          // (batch, heads, queries), written by backward: sums of out * dout
    dsl_heads dq, dk, dv;  // all of them are written
    // The gradient of biases[DSL_POSITIONS], with 0 in it before, or null; its steps are 0 where that one's are.
    float* dpositions;
    int64_t dpositions_batch, dpositions_head;  // rows lie `keys` apart

    dsl_blocks by_row, by_column;
    int64_t list_batch, list_head;
    const uint8_t* partial_masks;  // (some, block, block) by the query's and the key's place in the block; 0 hides
    dsl_bias biases[DSL_BIASES];

    int64_t batch, heads, queries, keys, dim;  // block divides queries and keys; dim is 1 to DSL_MOST_HEAD
    int64_t block;                             // 16, 32, 64 or 128
    float scale;
    int32_t causal;  // query i sees keys 0 to i

    // Of element ((b * heads + h) * queries + i) * keys + j; keys are a multiple of 16, so a block of four words is of four
    // keys that begin at a multiple of 4. The scale applies to what is kept; with a threshold of 0 nothing is drawn.
    dsl_dropout dropout;
};

constexpr int64_t DSL_MOST_HEAD = 256;

extern "C" {
// On a GPU; 0, or the error code of the runtime. All pointers are the device's, those to lists and masks too.
int dsl_gpu_sparse_forward(const dsl_sparse_attention* how, void* stream);
int dsl_gpu_sparse_backward(const dsl_sparse_attention* how, void* stream);
}
