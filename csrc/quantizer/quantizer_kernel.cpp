// Numbers to integers of 8 or 4 bits by groups, and back: twice, and once, over a group that stays in the cache.
#include <cmath>

#include "common/isa.h"
#include "common/tile.h"
#include "quantizer/quantizer.h"

namespace {

struct Place {
    Place(const dsl_groups& how, int64_t i)
        : row(i / how.groups),
          first(i % how.groups * how.group),
          n(how.width - first < how.group ? how.width - first : how.group) {}

    int64_t row, first, n;  // in its row; numbers
};

template <class Work>
void for_tiles(const dsl_groups& how, const Place& place, const Work& work) {
    for (int64_t i = 0; i < place.n; i += TILE) {
        const int64_t n = place.n - i < TILE ? place.n - i : TILE;
        work(place.row * how.width + place.first + i, place.first + i, n);
    }
}

struct Extremes {
    float low, high, beyond;  // beyond: NaN where a number is not finite
};

Extremes extremes(const dsl_groups& how, const Place& place) {
    float low[16], high[16], beyond[16] = {};
    for (int k = 0; k < 16; ++k) low[k] = INFINITY, high[k] = -INFINITY;
    for_tiles(how, place, [&](int64_t start, int64_t, int64_t n) {
        const Tile x(how.x, start, n);
        auto see = [&](int64_t i, int k) {
            const float value = x.floats[i];
            low[k] = value < low[k] ? value : low[k];
            high[k] = value > high[k] ? value : high[k];
            beyond[k] += value - value;
        };
        int64_t i = 0;
        for (; i + 16 <= n; i += 16) {
            for (int k = 0; k < 16; ++k) see(i + k, k);
        }
        for (; i < n; ++i) see(i, 0);
    });
    Extremes all{low[0], high[0], beyond[0]};
    for (int k = 1; k < 16; ++k) {
        all.low = low[k] < all.low ? low[k] : all.low;
        all.high = high[k] > all.high ? high[k] : all.high;
        all.beyond += beyond[k];
    }
    return all;
}

float number(const dsl_tensor& tensor, int64_t i) { return *Tile(tensor, i, 1).floats; }

// The number in the tensor's dtype that is not below `value`, which is not negative.
float put_rounded_up(const dsl_tensor& tensor, int64_t i, float value) {
    write(&value, tensor, i, 1);
    const float near = number(tensor, i);
    if (near < value) static_cast<uint16_t*>(tensor.data)[i] += 1;  // float32 is not rounded
    return near < value ? number(tensor, i) : near;
}

void quantize_group(const dsl_groups& how, int64_t index) {
    const Place place(how, index);
    const bool symmetric = how.minima.data == nullptr;
    const int32_t half = 1 << (how.bits - 1), low = symmetric ? -half : 0, high = symmetric ? half - 1 : 2 * half - 1;
    const Extremes found = extremes(how, place);
    float minimum = 0, scale;
    if (symmetric) {
        scale = (found.high > -found.low ? found.high : -found.low) / (static_cast<float>(high) + 0.5f);
    } else {
        minimum = found.low + found.beyond;
        write(&minimum, how.minima, index, 1);
        minimum = number(how.minima, index);
        scale = found.high - minimum;
        scale = (scale < 0 ? 0 : scale) / static_cast<float>(high);
    }
    scale += found.beyond;
    const float step = put_rounded_up(how.scales, index, scale - scale == 0 ? scale : NAN);
    const float inverse = step > 0 ? 1 / step : 0;
    uint8_t* const values = how.values + place.row * how.value_bytes;
    for_tiles(how, place, [&](int64_t start, int64_t at, int64_t n) {
        const Tile x(how.x, start, n);
        alignas(64) int32_t whole[TILE + 1];
        for (int64_t i = 0; i < n; ++i) {
            float value = (x.floats[i] - minimum) * inverse;
            value = value == value ? value : 0;
            value = value < static_cast<float>(low) ? static_cast<float>(low) : value;
            value = value > static_cast<float>(high) ? static_cast<float>(high) : value;
            whole[i] = static_cast<int32_t>(std::nearbyint(value));
        }
        if (how.bits == 8) {
            for (int64_t i = 0; i < n; ++i) values[at + i] = static_cast<uint8_t>(whole[i]);
            return;
        }
        whole[n] = 0;
        for (int64_t i = 0; i < n; i += 2) {
            values[(at + i) / 2] = static_cast<uint8_t>((whole[i] & 15) | (whole[i + 1] & 15) << 4);
        }
    });
}

void dequantize_group(const dsl_groups& how, int64_t index) {
    const Place place(how, index);
    const bool symmetric = how.minima.data == nullptr;
    const float scale = number(how.scales, index), minimum = symmetric ? 0 : number(how.minima, index);
    const uint8_t* const values = how.values + place.row * how.value_bytes;
    const int32_t sign = symmetric ? 1 << (how.bits - 1) : 0;  // two's complement by (v ^ sign) - sign
    for_tiles(how, place, [&](int64_t start, int64_t at, int64_t n) {
        alignas(64) float wide[TILE + 1];
        if (how.bits == 8) {
            for (int64_t i = 0; i < n; ++i) wide[i] = static_cast<float>((values[at + i] ^ sign) - sign);
        } else {
            for (int64_t i = 0; i < n; i += 2) {
                const int32_t both = values[(at + i) / 2];
                wide[i] = static_cast<float>(((both & 15) ^ sign) - sign);
                wide[i + 1] = static_cast<float>(((both >> 4) ^ sign) - sign);
            }
        }
        for (int64_t i = 0; i < n; ++i) {
            const float scaled = wide[i] * scale;
            wide[i] = symmetric ? scaled : scaled + minimum;
        }
        write(wide, how.x, start, n);
    });
}

}  // namespace

extern "C" void DSL_NAMED(dsl_quantize)(const dsl_groups* groups, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) quantize_group(*groups, i);
}

extern "C" void DSL_NAMED(dsl_dequantize)(const dsl_groups* groups, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) dequantize_group(*groups, i);
}
