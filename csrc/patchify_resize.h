// Bicubic resize of 8-bit RGB rows, bit for bit as Pillow's Image.resize(BICUBIC): coefficients computed in
// double, rounded to 22-bit fixed point, two passes, rounded and clipped to 8 bits between them
// (Pillow 13, src/libImaging/Resample.c, the *_8bpc functions).
//
// The passes are templates over the number of int32 lanes: the caller instantiates them inside a function
// compiled for one instruction set, so they must be inlined there.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

// Vectors wider than the baseline's are passed between functions that are always inlined: no call, so no ABI.
#pragma GCC diagnostic ignored "-Wpsabi"

#define PAGEMILL_INLINE inline __attribute__((always_inline))

namespace pagemill {

constexpr int kPrecisionBits = 32 - 8 - 2;  // 8 bits of result, 2 of headroom for negative lobes
constexpr int kRowBlock = 16;               // rows resized side by side in the horizontal pass
constexpr int kRowAlign = 64;               // rows of working buffers are padded to this many bytes

// How one axis is resampled: output i is the sum over t < count[i] of input[first[i] + t] * weight[i * taps + t].
struct Axis {
    int in = 0, out = 0, taps = 0;
    std::vector<int> first, count;
    std::vector<int32_t> weight;
    bool identity() const { return in == out; }
};

inline double bicubic(double x) {
    constexpr double a = -0.5;
    x = std::fabs(x);
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
    return 0.0;
}

inline Axis plan_axis(int in, int out) {
    Axis axis;
    axis.in = in;
    axis.out = out;
    const double scale = static_cast<double>(in) / out;
    const double filter_scale = std::max(scale, 1.0);  // widens the filter when shrinking (antialias)
    const double support = 2.0 * filter_scale;
    axis.taps = static_cast<int>(std::ceil(support)) * 2 + 1;
    axis.first.resize(out);
    axis.count.resize(out);
    axis.weight.assign(static_cast<size_t>(out) * axis.taps, 0);
    std::vector<double> w(axis.taps);
    const double inverse = 1.0 / filter_scale;
    for (int i = 0; i < out; ++i) {
        const double center = (i + 0.5) * scale;
        const int lo = std::max(static_cast<int>(center - support + 0.5), 0);
        const int n = std::min(static_cast<int>(center + support + 0.5), in) - lo;
        double sum = 0.0;
        for (int t = 0; t < n; ++t) {
            w[t] = bicubic((t + lo - center + 0.5) * inverse);
            sum += w[t];
        }
        for (int t = 0; t < n; ++t) {
            const double v = (sum != 0.0 ? w[t] / sum : w[t]) * (1 << kPrecisionBits);
            axis.weight[static_cast<size_t>(i) * axis.taps + t] = static_cast<int>(v < 0 ? v - 0.5 : v + 0.5);
        }
        axis.first[i] = lo;
        axis.count[i] = n;
    }
    return axis;
}

// Because of the rounding in between, the order of the passes shows in the last bit. Pillow 13 begins with the
// vertical one where the height shrinks by more than twice the pixels that the width does.
inline bool vertical_goes_first(const Axis& x, const Axis& y) {
    return y.in > y.out && y.in - y.out > 2 * (x.in - x.out);
}

template <typename T, int N>
struct Vec {
    typedef T type __attribute__((vector_size(N * sizeof(T))));
};

typedef Vec<uint8_t, 16>::type u8x16;

// Transpose a 16 x 16 block of bytes: four rounds of interleaving the first half with the second.
PAGEMILL_INLINE void transpose16(u8x16 (&a)[16]) {
    const u8x16 low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    const u8x16 high = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    for (int round = 0; round < 4; ++round) {
        u8x16 b[16];
        for (int i = 0; i < 8; ++i) {
            b[2 * i] = __builtin_shuffle(a[i], a[i + 8], low);
            b[2 * i + 1] = __builtin_shuffle(a[i], a[i + 8], high);
        }
        std::memcpy(a, b, sizeof(b));
    }
}

// The loops below become single widening loads and narrowing stores; GCC 12 takes __builtin_convertvector
// between bytes and int32 apart, lane by lane.
template <int LANES>
PAGEMILL_INLINE typename Vec<int32_t, LANES>::type load_wide(const uint8_t* src) {
    int32_t wide[LANES];
    for (int i = 0; i < LANES; ++i) wide[i] = src[i];
    typename Vec<int32_t, LANES>::type v;
    std::memcpy(&v, wide, sizeof(v));
    return v;
}

// Accumulators to bytes: shift, clip, narrow.
template <int LANES>
PAGEMILL_INLINE void store_clipped(const typename Vec<int32_t, LANES>::type& sum, uint8_t* dst) {
    typedef typename Vec<int32_t, LANES>::type I;
    I acc = sum >> kPrecisionBits;
    acc = acc < 0 ? I{} : acc;
    acc = acc > 255 ? I{} + 255 : acc;
    int32_t wide[LANES];
    std::memcpy(wide, &acc, sizeof(acc));
    for (int i = 0; i < LANES; ++i) dst[i] = static_cast<uint8_t>(wide[i]);
}

// 16 interleaved RGB rows of `width` pixels to planar rows [3][width].
PAGEMILL_INLINE void split_channels(const uint8_t* const (&rows)[kRowBlock], int width, uint8_t* dst, ptrdiff_t stride) {
    for (int r = 0; r < kRowBlock; ++r)
        for (int x = 0; x < width; ++x)
            for (int c = 0; c < 3; ++c)
                dst[r * stride + static_cast<ptrdiff_t>(c) * width + x] = rows[r][static_cast<ptrdiff_t>(x) * 3 + c];
}

// Resize 16 interleaved RGB rows to planar rows [3][axis.out]. Turned on their side, so that one coefficient
// meets 16 rows at once. `tile` [axis.in * 3][16] and `turned` [stride][16] are scratch.
template <int LANES>
PAGEMILL_INLINE void resize_horizontal(const uint8_t* const (&rows)[kRowBlock], const Axis& axis, uint8_t* tile,
                                       uint8_t* turned, uint8_t* dst, ptrdiff_t stride) {
    typedef typename Vec<int32_t, LANES>::type I;
    const ptrdiff_t bytes = static_cast<ptrdiff_t>(axis.in) * 3;
    ptrdiff_t j = 0;
    u8x16 block[16];
    for (; j + 16 <= bytes; j += 16) {
        for (int r = 0; r < 16; ++r) std::memcpy(&block[r], rows[r] + j, 16);
        transpose16(block);
        std::memcpy(tile + j * 16, block, sizeof(block));
    }
    for (; j < bytes; ++j)
        for (int r = 0; r < 16; ++r) tile[j * 16 + r] = rows[r][j];

    const I half = I{} + (1 << (kPrecisionBits - 1));
    for (int x = 0; x < axis.out; ++x) {
        const int32_t* weight = &axis.weight[static_cast<size_t>(x) * axis.taps];
        const uint8_t* from = tile + static_cast<ptrdiff_t>(axis.first[x]) * 48;
        const int n = axis.count[x];
        for (int r = 0; r < kRowBlock; r += LANES) {
            const uint8_t* s = from + r;
            I red = half, green = half, blue = half;
            for (int t = 0; t < n; ++t, s += 48) {
                const int32_t w = weight[t];
                red += load_wide<LANES>(s) * w;
                green += load_wide<LANES>(s + 16) * w;
                blue += load_wide<LANES>(s + 32) * w;
            }
            store_clipped<LANES>(red, turned + static_cast<ptrdiff_t>(x) * 16 + r);
            store_clipped<LANES>(green, turned + (static_cast<ptrdiff_t>(axis.out) + x) * 16 + r);
            store_clipped<LANES>(blue, turned + (static_cast<ptrdiff_t>(axis.out) * 2 + x) * 16 + r);
        }
    }
    for (ptrdiff_t i = 0; i < stride; i += 16) {
        std::memcpy(block, turned + i * 16, sizeof(block));
        transpose16(block);
        for (int r = 0; r < 16; ++r) std::memcpy(dst + r * stride + i, &block[r], 16);
    }
}

// One row of `width` bytes from `count` rows at `src`, `stride` bytes apart.
template <int LANES>
PAGEMILL_INLINE void resize_vertical(const uint8_t* src, ptrdiff_t stride, ptrdiff_t width, const int32_t* weight,
                                     int count, uint8_t* dst) {
    typedef typename Vec<int32_t, LANES>::type I;
    const I half = I{} + (1 << (kPrecisionBits - 1));
    ptrdiff_t x = 0;
    for (; x + 4 * LANES <= width; x += 4 * LANES) {
        I a = half, b = half, c = half, d = half;
        const uint8_t* s = src + x;
        for (int t = 0; t < count; ++t, s += stride) {
            const int32_t w = weight[t];
            a += load_wide<LANES>(s) * w;
            b += load_wide<LANES>(s + LANES) * w;
            c += load_wide<LANES>(s + 2 * LANES) * w;
            d += load_wide<LANES>(s + 3 * LANES) * w;
        }
        store_clipped<LANES>(a, dst + x);
        store_clipped<LANES>(b, dst + x + LANES);
        store_clipped<LANES>(c, dst + x + 2 * LANES);
        store_clipped<LANES>(d, dst + x + 3 * LANES);
    }
    for (; x < width; ++x) {
        int32_t sum = 1 << (kPrecisionBits - 1);
        for (int t = 0; t < count; ++t) sum += src[t * stride + x] * weight[t];
        dst[x] = static_cast<uint8_t>(std::clamp(sum >> kPrecisionBits, 0, 255));
    }
}

}  // namespace pagemill
