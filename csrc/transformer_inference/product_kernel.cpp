// Products of rows with a weight matrix: of up to eight as fast as the weight can be read, which is done once, in the order
// in which it lies. More are taken eight at a time for a panel of outputs.
//
// A whole weight lies output by output: one is read at a time, and the lanes of its sums are added up at its end. A packed
// one lies in panels of 16 outputs, each a lane of its own. Rows beyond those asked for (there are 1, 2, 4 or 8) are 0.
#include "common/isa.h"
#include "common/vector.h"
#include "transformer_inference/product.h"

namespace {

constexpr int PANEL = DSL_PANEL;
[[maybe_unused]] constexpr int AHEAD_BYTES = 2048;  // how far memory is asked for before it is needed

// Products of bytes and of bfloat16 pairs: AVX-512 for some of its processors, which are asked when the op runs.
#if defined(__AVX512F__) && (defined(__clang__) || __GNUC__ >= 11)
#define DSL_EXTENSIONS
#if defined(__clang__)
#define DSL_EXTENSIONS_ON \
    _Pragma("clang attribute push(__attribute__((target(\"avx512vnni,avx512bf16\"))), apply_to = function)")
#define DSL_EXTENSIONS_OFF _Pragma("clang attribute pop")
#else
#define DSL_EXTENSIONS_ON _Pragma("GCC push_options") _Pragma("GCC target(\"avx512vnni,avx512bf16\")")
#define DSL_EXTENSIONS_OFF _Pragma("GCC pop_options")
#endif
#endif

// `OUTS` outputs from `first` on, beside each other, so that a row's numbers are loaded once for all of them.
template <int ROWS, int OUTS, class Element>
void whole(const dsl_product& p, const Element* weight, int64_t first, float (*y)[PANEL]) {
    constexpr int CHAINS = ROWS * OUTS >= 4 ? 1 : 4 / (ROWS * OUTS);  // enough sums to keep the adders busy
    constexpr int STEP = CHAINS * LANES;
    const Element* const w = weight + first * p.width;
    Vector sums[OUTS][ROWS][CHAINS] = {};
    int64_t k = 0;
    for (; k + STEP <= p.width; k += STEP) {
        for (int c = 0; c < CHAINS; ++c) {
            Vector wide[OUTS];
            for (int o = 0; o < OUTS; ++o) {
                const Element* const at = w + o * p.width + k + c * LANES;
                if (OUTS > 1) __builtin_prefetch(at + OUTS * p.width);  // one alone is found by the processor
                wide[o] = load(at);
            }
            for (int r = 0; r < ROWS; ++r) {
                const Vector row = load(p.x + r * p.x_stride + k + c * LANES);
                for (int o = 0; o < OUTS; ++o) sums[o][r][c] += wide[o] * row;
            }
        }
    }
    for (; k + LANES <= p.width; k += LANES) {
        for (int r = 0; r < ROWS; ++r) {
            const Vector row = load(p.x + r * p.x_stride + k);
            for (int o = 0; o < OUTS; ++o) sums[o][r][0] += load(w + o * p.width + k) * row;
        }
    }
    for (int o = 0; o < OUTS; ++o) {
        for (int r = 0; r < ROWS; ++r) {
            for (int c = 1; c < CHAINS; ++c) sums[o][r][0] += sums[o][r][c];
            float last = sum(sums[o][r][0]);
            for (int64_t i = k; i < p.width; ++i) last += one(w + o * p.width + i) * p.x[r * p.x_stride + i];
            y[r][o] = last;
        }
    }
}

// The integers of the LANES outputs from `lane` on, of 8 inputs, as floats.
struct Eight {
    static constexpr int BYTES = 8 * PANEL;
    static inline void read(const uint8_t* at, int lane, Vector* inputs) {
        for (int i = 0; i < 8; ++i) {
            const Bits words = load_as<Bits>(at + i / 4 * 4 * PANEL + 4 * lane);
            inputs[i] = __builtin_convertvector(reinterpret_cast<Ints>(words >> (8 * (i % 4)) & 255), Vector) - 128;
        }
    }
};

struct Four {
    static constexpr int BYTES = 4 * PANEL;
    static inline void read(const uint8_t* at, int lane, Vector* inputs) {
        const Bits words = load_as<Bits>(at + 4 * lane);
        for (int i = 0; i < 8; ++i) inputs[i] = nibble(words >> (8 * (i % 4) + i / 4 * 4));
    }

 private:
    static inline Vector nibble(Bits words) {
#if defined(__AVX512F__)
        const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
        return reinterpret_cast<Vector>(_mm512_permutexvar_ps(reinterpret_cast<__m512i>(words), values));
#else
        return __builtin_convertvector(reinterpret_cast<Ints>(words & 15), Vector) - 8;
#endif
    }
};

template <int ROWS, class Packed>
void packed(const dsl_product& p, int64_t panel, float (*y)[PANEL]) {
    constexpr int CHAINS = ROWS >= 4 ? 1 : 4 / ROWS;
    const int64_t steps = p.group / 8, groups = p.width / p.group;
    for (int lane = 0; lane < PANEL; lane += LANES) {
        const uint8_t* at = static_cast<const uint8_t*>(p.weight.data) + panel * (p.width / 8) * Packed::BYTES;
        const auto* scales = reinterpret_cast<const BFloat16*>(p.scales) + panel * groups * PANEL + lane;
        const float* x = p.x;
        Vector sums[ROWS] = {};
        for (int64_t group = 0; group < groups; ++group, scales += PANEL) {
            Vector part[ROWS][CHAINS] = {};
            for (int64_t step = 0; step < steps; ++step, at += Packed::BYTES, x += 8) {
                Vector inputs[8];
                Packed::read(at, lane, inputs);
                for (int i = 0; i < 8; ++i) {
                    for (int r = 0; r < ROWS; ++r) part[r][i % CHAINS] += inputs[i] * spread(x[r * p.x_stride + i]);
                }
            }
            const Vector scale = load(scales);
            for (int r = 0; r < ROWS; ++r) {
                for (int c = 1; c < CHAINS; ++c) part[r][0] += part[r][c];
                sums[r] += part[r][0] * scale;
            }
        }
        for (int r = 0; r < ROWS; ++r) store(&y[r][lane], sums[r]);
    }
}

#if defined(DSL_EXTENSIONS)
DSL_EXTENSIONS_ON

inline __m512i dot(__m512i sums, __m512i integers, const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, sizeof four);
    return _mm512_dpbusd_epi32(sums, integers, _mm512_set1_epi32(four));
}

// As `packed`, with x as integers of 16 bits by groups, in two bytes: 64 products an instruction.
template <int ROWS, int BITS>
void packed_vnni(const dsl_product& p, int64_t panel, float (*y)[PANEL]) {
    constexpr int BYTES = BITS * PANEL;  // of 8 inputs
    const int64_t steps = p.group / 8, groups = p.width / p.group;
    const __m512i low_half = _mm512_set1_epi8(15), offset = _mm512_set1_epi32(BITS == 8 ? 128 : 8);
    const auto* at = static_cast<const uint8_t*>(p.weight.data) + panel * (p.width / 8) * BYTES;
    const auto* scales = reinterpret_cast<const BFloat16*>(p.scales) + panel * groups * PANEL;
    Vector sums[ROWS] = {};
    for (int64_t group = 0; group < groups; ++group, scales += PANEL) {
        __m512i high[ROWS], low[ROWS];
        for (int r = 0; r < ROWS; ++r) high[r] = low[r] = _mm512_setzero_si512();
        const dsl_integers& x = p.integers;
        for (int64_t k = group * p.group, end = k + steps * 8; k < end; k += 8, at += BYTES) {
            if (ROWS > 2) __builtin_prefetch(at + AHEAD_BYTES);
            if (ROWS > 2 && BITS == 8) __builtin_prefetch(at + AHEAD_BYTES + 64);
            const __m512i bytes = _mm512_loadu_si512(at);
            const __m512i first = BITS == 8 ? bytes : _mm512_and_si512(bytes, low_half);
            const __m512i second =
                BITS == 8 ? _mm512_loadu_si512(at + 64) : _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low_half);
            for (int r = 0; r < ROWS; ++r) {
                const int64_t row = r * p.x_stride + k;
                high[r] = dot(dot(high[r], first, x.high + row), second, x.high + row + 4);
                low[r] = dot(dot(low[r], first, x.low + row), second, x.low + row + 4);
            }
        }
        const Vector scale = load(scales);
        for (int r = 0; r < ROWS; ++r) {
            const int64_t of = r * groups + group;
            const __m512i beside = _mm512_mullo_epi32(offset, _mm512_set1_epi32(x.sums[of]));
            const __m512i both = _mm512_add_epi32(_mm512_slli_epi32(high[r], 8), _mm512_sub_epi32(low[r], beside));
            sums[r] += reinterpret_cast<Vector>(_mm512_cvtepi32_ps(both)) * (scale * spread(x.scales[of]));
        }
    }
    for (int r = 0; r < ROWS; ++r) store(y[r], sums[r]);
}

template <int ROWS>
void packed_vnni(const dsl_product& p, int64_t panel, float (*y)[PANEL]) {
    p.bits == 8 ? packed_vnni<ROWS, 8>(p, panel, y) : packed_vnni<ROWS, 4>(p, panel, y);
}

// As `whole`, of bfloat16 rows: pairs of products, whose sums are float32; subnormal numbers count as 0. Rows are those of
// x as it was given, of which the last stands in for those beyond it.
template <int ROWS, int OUTS>
void whole_bf16(const dsl_product& p, int64_t first, float (*y)[PANEL]) {
    constexpr int CHAINS = ROWS * OUTS >= 4 ? 1 : 4 / (ROWS * OUTS), PAIRS = 32;
    const auto* const w = static_cast<const uint16_t*>(p.weight.data) + first * p.width;
    const uint16_t* x[ROWS];
    for (int r = 0; r < ROWS; ++r) {
        x[r] = static_cast<const uint16_t*>(p.input.data) + (r < p.rows ? r : p.rows - 1) * p.columns;
    }
    __m512 sums[OUTS][ROWS][CHAINS];
    for (int o = 0; o < OUTS; ++o) {
        for (int r = 0; r < ROWS; ++r) {
            for (int c = 0; c < CHAINS; ++c) sums[o][r][c] = _mm512_setzero_ps();
        }
    }
    int64_t k = 0;
    for (; k + CHAINS * PAIRS <= p.width; k += CHAINS * PAIRS) {
        for (int c = 0; c < CHAINS; ++c) {
            __m512bh wide[OUTS];
            for (int o = 0; o < OUTS; ++o) {
                const uint16_t* const at = w + o * p.width + k + c * PAIRS;
                if (OUTS > 1) __builtin_prefetch(at + OUTS * p.width);  // one alone is found by the processor
                wide[o] = (__m512bh)_mm512_loadu_si512(at);
            }
            for (int r = 0; r < ROWS; ++r) {
                const auto row = (__m512bh)_mm512_loadu_si512(x[r] + k + c * PAIRS);
                for (int o = 0; o < OUTS; ++o) sums[o][r][c] = _mm512_dpbf16_ps(sums[o][r][c], wide[o], row);
            }
        }
    }
    for (; k < p.width; k += PAIRS) {
        const __mmask32 there = p.width - k >= PAIRS ? ~__mmask32{0} : (__mmask32{1} << (p.width - k)) - 1;
        for (int r = 0; r < ROWS; ++r) {
            const auto row = (__m512bh)_mm512_maskz_loadu_epi16(there, x[r] + k);
            for (int o = 0; o < OUTS; ++o) {
                const auto wide = (__m512bh)_mm512_maskz_loadu_epi16(there, w + o * p.width + k);
                sums[o][r][0] = _mm512_dpbf16_ps(sums[o][r][0], wide, row);
            }
        }
    }
    for (int o = 0; o < OUTS; ++o) {
        for (int r = 0; r < ROWS; ++r) {
            for (int c = 1; c < CHAINS; ++c) sums[o][r][0] = _mm512_add_ps(sums[o][r][0], sums[o][r][c]);
            y[r][o] = _mm512_reduce_add_ps(sums[o][r][0]);
        }
    }
}

DSL_EXTENSIONS_OFF
#endif

template <int ROWS>
void panel_of(const dsl_product& p, int64_t panel, int64_t count, float (*y)[PANEL]) {
    constexpr int OUTS = ROWS >= 4 ? 2 : 1;
    int64_t o = 0;
    if (p.x == nullptr) {
#if defined(DSL_EXTENSIONS)
        for (; o + OUTS <= count; o += OUTS) whole_bf16<ROWS, OUTS>(p, panel * PANEL + o, (float(*)[PANEL]) & y[0][o]);
        for (; o < count; ++o) whole_bf16<ROWS, 1>(p, panel * PANEL + o, (float(*)[PANEL]) & y[0][o]);
#endif
    } else if (p.bits == 0) {
        with_elements(p.weight, [&](const auto* weight) {
            for (; o + OUTS <= count; o += OUTS)
                whole<ROWS, OUTS>(p, weight, panel * PANEL + o, (float(*)[PANEL]) & y[0][o]);
            for (; o < count; ++o) whole<ROWS, 1>(p, weight, panel * PANEL + o, (float(*)[PANEL]) & y[0][o]);
        });
#if defined(DSL_EXTENSIONS)
    } else if (p.integers.high != nullptr) {
        packed_vnni<ROWS>(p, panel, y);
#endif
    } else {
        p.bits == 8 ? packed<ROWS, Eight>(p, panel, y) : packed<ROWS, Four>(p, panel, y);
    }
}

// `count` of x's rows from `first_row` on.
template <int ROWS>
void rows_of_panel(const dsl_product& all, int64_t first_row, int64_t count, int64_t panel) {
    dsl_product p = all;
    if (p.x != nullptr) p.x += first_row * p.x_stride;
    if (p.integers.high != nullptr) {
        const int64_t groups = p.width / p.group;
        p.integers.high += first_row * p.x_stride, p.integers.low += first_row * p.x_stride;
        p.integers.sums += first_row * groups, p.integers.scales += first_row * groups;
    }
    const int64_t first = panel * PANEL, outputs = p.out - first < PANEL ? p.out - first : PANEL;
    alignas(64) float y[ROWS][PANEL];
    panel_of<ROWS>(p, panel, outputs, y);
    const Tile bias(p.bias, first, outputs);
    for (int64_t r = 0; r < count; ++r) {
        if (p.bias.data != nullptr) {
            for (int64_t o = 0; o < outputs; ++o) y[r][o] += bias.floats[o];
        }
        write(y[r], p.y, (first_row + r) * p.out + first, outputs);
    }
}

}  // namespace

extern "C" void DSL_NAMED(dsl_product)(const dsl_product* product, int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
        for (int64_t row = 0; row < product->rows; row += DSL_FEW_ROWS) {  // the panel stays in the cache
            const int64_t count = product->rows - row < DSL_FEW_ROWS ? product->rows - row : DSL_FEW_ROWS;
            if (count == 1) {
                rows_of_panel<1>(*product, row, count, panel);
            } else if (count == 2) {
                rows_of_panel<2>(*product, row, count, panel);
            } else if (count <= 4) {
                rows_of_panel<4>(*product, row, count, panel);
            } else {
                rows_of_panel<8>(*product, row, count, panel);
            }
        }
    }
}

extern "C" void DSL_NAMED(dsl_spread_rows)(const dsl_tensor* x, int64_t rows, int64_t width, float* to,
                                           int64_t to_stride, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
        const int64_t there = r < rows ? width : 0;
        float* const row = to + r * to_stride;
        if (x->dtype == DSL_FP32) {
            std::memcpy(row, static_cast<const float*>(x->data) + r * width, there * sizeof(float));
        } else {
            widen(row, static_cast<const uint16_t*>(x->data) + r * width, x->dtype, there);
        }
        std::memset(row + there, 0, (to_stride - there) * sizeof(float));
    }
}

extern "C" void DSL_NAMED(dsl_unpack)(const dsl_product* product, const dsl_tensor* to, int64_t begin, int64_t end) {
    const dsl_product& p = *product;
    const int64_t columns = p.columns, groups = p.width / p.group, bytes = p.bits == 8 ? Eight::BYTES : Four::BYTES;
    alignas(64) float rows[PANEL][64];  // 64 columns of a panel at a time
    for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t first = panel * PANEL, count = p.out - first < PANEL ? p.out - first : PANEL;
        const uint8_t* const weight = static_cast<const uint8_t*>(p.weight.data) + panel * (p.width / 8) * bytes;
        const auto* const scales = reinterpret_cast<const BFloat16*>(p.scales) + panel * groups * PANEL;
        for (int64_t k = 0; k < columns; k += 64) {
            const int64_t n = columns - k < 64 ? columns - k : 64;
            for (int64_t i = 0; i < n; i += 8) {
                alignas(64) float inputs[8][PANEL];
                for (int lane = 0; lane < PANEL; lane += LANES) {
                    Vector wide[8];
                    const uint8_t* const at = weight + (k + i) / 8 * bytes;
                    p.bits == 8 ? Eight::read(at, lane, wide) : Four::read(at, lane, wide);
                    const Vector scale = load(scales + (k + i) / p.group * PANEL + lane);
                    for (int j = 0; j < 8; ++j) store(&inputs[j][lane], wide[j] * scale);
                }
                for (int o = 0; o < PANEL; ++o) {
                    for (int j = 0; j < 8; ++j) rows[o][i + j] = inputs[j][o];
                }
            }
            for (int64_t o = 0; o < count; ++o) write(rows[o], *to, (first + o) * columns + k, n);
        }
    }
}

extern "C" int32_t DSL_NAMED(dsl_extensions)() {
#if defined(DSL_EXTENSIONS)
    const bool bytes = __builtin_cpu_supports("avx512vnni"), pairs = __builtin_cpu_supports("avx512bf16");
    return bytes && pairs ? DSL_BYTES | DSL_BF16_PAIRS : bytes ? DSL_BYTES : 0;
#else
    return 0;
#endif
}

// Whole numbers of 16 bits by groups, as 256 * high + low. A group with a NaN or an infinity gets NaN as its scale.
extern "C" void DSL_NAMED(dsl_integers)(const float* x, int64_t width, int64_t group, const dsl_integers* to,
                                        int64_t begin, int64_t end) {
    for (int64_t at = begin * width, of = begin * (width / group); at < end * width; at += group, ++of) {
        float most = 0, beyond = 0;
        for (int64_t i = at; i < at + group; ++i) {
            const float size = std::fabs(x[i]);
            most = size > most ? size : most;
            beyond += x[i] - x[i];  // NaN where it is not finite
        }
        const float inverse = most > 0 ? DSL_INTEGER_STEPS / most : 0;
        const bool bad = beyond != 0 || !(inverse <= 3.4e38f);
        int32_t sum = 0;
        for (int64_t i = at; i < at + group; ++i) {
            const int32_t whole = bad ? 0 : static_cast<int32_t>(std::nearbyintf(x[i] * inverse));
            const int32_t high = (whole + 128) >> 8;
            to->high[i] = static_cast<int8_t>(high);
            to->low[i] = static_cast<int8_t>(whole - 256 * high);
            sum += whole;
        }
        to->sums[of] = sum;
        to->scales[of] = beyond != 0 ? beyond : most / DSL_INTEGER_STEPS;
    }
}
