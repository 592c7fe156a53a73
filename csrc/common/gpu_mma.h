// The operands of dsl::mma (gpu_compat.h), a product of small matrices by all lanes of a wave together: c += a b.
//
//     using F = MmaSync<Bf16>;                   or Mfma<Fp16>, or Plain<Fp32>
//     F::ROWS, F::COLUMNS, F::DEPTH              a is (ROWS, DEPTH), b (DEPTH, COLUMNS), c (ROWS, COLUMNS)
//     F::LANES                                   neighbours that hold them, each a part: F::A, F::B, F::C
//     F::With<Fp16>                              the same for another type, of the same operands where both have 16 bits
//     F::a_place(lane, i), b_place, c_place      the row and column of number i of a lane's part
//     fill_a<F>(a, lane, get), fill_b            number i of a lane's part becomes get(row, column), as it is stored
//     load_a<F>(a, lane, from, stride), load_b, load_b_transposed    the same from a matrix in memory
//
// Where a number lies is the instruction's to say: "Matrix Fragments for mma.m16n8k16 with floating point type" in
// NVIDIA's PTX ISA, and for v_mfma_f32_16x16x16 AMD's CDNA ISA and its matrix instruction calculator. The tables are here
// as functions, so that a kernel is written once.
#pragma once

#include <cstdint>

namespace dsl {

// Types of numbers, and what they are stored as.
struct Fp32 {
    using Stored = float;
};
struct Bf16 {
    using Stored = uint16_t;
};
struct Fp16 {
    using Stored = uint16_t;
};

struct MatrixPlace {
    int row, column;
};

// A lane's part of an operand of 16-bit numbers, two to a register, the first in its lower half.
template <int N>
struct Packed {
    static constexpr int COUNT = N;
    uint32_t registers[N / 2];

    __device__ void set(int i, uint16_t bits) {
        uint32_t& word = registers[i / 2];
        word = i % 2 == 0 ? bits : word | static_cast<uint32_t>(bits) << 16;  // the first of a pair comes first
    }
    // Numbers i and i + 1, i even, which lie side by side at a multiple of 4 bytes.
    __device__ void set_pair(int i, const uint16_t* pair) {
        memcpy(&registers[i / 2], __builtin_assume_aligned(pair, 4), 4);
    }
};

// The same of numbers as they are stored.
template <class Stored, int N>
struct Unpacked {
    static constexpr int COUNT = N;
    Stored values[N];

    __device__ void set(int i, Stored stored) { values[i] = stored; }
    __device__ void set_pair(int i, const Stored* pair) { values[i] = pair[0], values[i + 1] = pair[1]; }
};

// A lane's part of a sum.
struct Sums {
    static constexpr int COUNT = 4;
    float values[4];
};

// mma.sync.aligned.m16n8k16: NVIDIA's, from sm_80 on.
template <class T>
struct MmaSync {
    using Type = T;
    template <class Other>
    using With = MmaSync<Other>;
    static constexpr int LANES = 32, ROWS = 16, COLUMNS = 8, DEPTH = 16;
    using A = Packed<8>;
    using B = Packed<4>;
    using C = Sums;

    __device__ static constexpr MatrixPlace a_place(int lane, int i) {
        return {lane / 4 + (i / 2 % 2) * 8, lane % 4 * 2 + i % 2 + i / 4 * 8};
    }
    __device__ static constexpr MatrixPlace b_place(int lane, int i) {
        return {lane % 4 * 2 + i % 2 + i / 2 * 8, lane / 4};
    }
    __device__ static constexpr MatrixPlace c_place(int lane, int i) {
        return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2};
    }
};

// v_mfma_f32_16x16x16: AMD's CDNA 2 and 3.
template <class T>
struct Mfma {
    using Type = T;
    template <class Other>
    using With = Mfma<Other>;
    static constexpr int LANES = 64, ROWS = 16, COLUMNS = 16, DEPTH = 16;
    using A = Packed<4>;
    using B = Packed<4>;
    using C = Sums;

    __device__ static constexpr MatrixPlace a_place(int lane, int i) { return {lane % 16, lane / 16 * 4 + i}; }
    __device__ static constexpr MatrixPlace b_place(int lane, int i) { return {lane / 16 * 4 + i, lane % 16}; }
    __device__ static constexpr MatrixPlace c_place(int lane, int i) { return {lane / 16 * 4 + i, lane % 16}; }
};

// Multiplications and additions of each lane by itself: any GPU's, in fp32 for all types. Sums lie as MmaSync's do, and a
// lane holds all rows of a and columns of b that its own sums take, so several lanes hold the same.
template <class T>
struct Plain {
    using Type = T;
    template <class Other>
    using With = Plain<Other>;
    static constexpr int LANES = 32, ROWS = 16, COLUMNS = 8, DEPTH = 4;
    using A = Unpacked<typename T::Stored, 2 * DEPTH>;
    using B = A;
    using C = Sums;

    __device__ static constexpr MatrixPlace a_place(int lane, int i) {
        return {lane % 32 / 4 + i / DEPTH * 8, i % DEPTH};
    }
    __device__ static constexpr MatrixPlace b_place(int lane, int i) { return {i % DEPTH, lane % 4 * 2 + i / DEPTH}; }
    __device__ static constexpr MatrixPlace c_place(int lane, int i) {
        return {lane % 32 / 4 + i / 2 * 8, lane % 4 * 2 + i % 2};
    }
};

// Number i of a lane's part of a becomes get(row, column), as it is stored.
template <class F, class Get>
__device__ inline void fill_a(typename F::A& part, int lane, const Get& get) {
    DSL_UNROLL
    for (int i = 0; i < F::A::COUNT; ++i) {
        const MatrixPlace place = F::a_place(lane, i);
        part.set(i, get(place.row, place.column));
    }
}

template <class F, class Get>
__device__ inline void fill_b(typename F::B& part, int lane, const Get& get) {
    DSL_UNROLL
    for (int i = 0; i < F::B::COUNT; ++i) {
        const MatrixPlace place = F::b_place(lane, i);
        part.set(i, get(place.row, place.column));
    }
}

// The same of matrices that lie in rows of `stride` numbers, an even number of them: of a, of b's transpose, and of b.
template <class F>
__device__ inline void load_a(typename F::A& part, int lane, const typename F::Type::Stored* from, int stride) {
    DSL_UNROLL
    for (int i = 0; i < F::A::COUNT; i += 2) {  // two numbers of a lane are neighbours along the depth
        const MatrixPlace place = F::a_place(lane, i);
        part.set_pair(i, from + place.row * stride + place.column);
    }
}

template <class F>
__device__ inline void load_b_transposed(typename F::B& part, int lane, const typename F::Type::Stored* from,
                                         int stride) {
    DSL_UNROLL
    for (int i = 0; i < F::B::COUNT; i += 2) {
        const MatrixPlace place = F::b_place(lane, i);
        part.set_pair(i, from + place.column * stride + place.row);
    }
}

template <class F>
__device__ inline void load_b(typename F::B& part, int lane, const typename F::Type::Stored* from, int stride) {
    fill_b<F>(part, lane, [&](int row, int column) { return from[row * stride + column]; });
}

}  // namespace dsl
