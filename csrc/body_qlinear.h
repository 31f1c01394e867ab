// Linear layers over int8 and int4 weights: unsigned weights times signed activations, summed in integers, which is
// exact and so the same on every instruction set; then scaled and added in float, never fused, which is too.

// What a step of a tile multiplies: the weights of W features and the activations of one row, `kPerStep` of k.
// x times w fits in 16 bits, and so do two such products of a nibble w.
#if defined(PM_VNNI)
PM_INLINE I dot(I acc, U w, I x) {
    return reinterpret_cast<I>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(acc), reinterpret_cast<__m512i>(w),
                                                   reinterpret_cast<__m512i>(x)));
}
#endif

// The four bytes at p in every lane.
PM_INLINE I splat_bytes(const int8_t* p) {
    int32_t bits;
    memcpy(&bits, p, 4);
#if defined(PM_AVX512)
    return reinterpret_cast<I>(_mm512_set1_epi32(bits));
#elif defined(PM_AVX2)
    return reinterpret_cast<I>(_mm256_set1_epi32(bits));
#else
    return I{bits, bits, bits, bits};
#endif
}
PM_INLINE U load_bytes(const uint8_t* p) { return reinterpret_cast<U>(load(reinterpret_cast<const float*>(p))); }

typedef int16_t H __attribute__((vector_size(4 * PM_WIDTH)));

// acc[i] += the sum of both 16-bit products of lane i.
PM_INLINE I dot_pairs(I acc, H w, H x) {
#if defined(PM_AVX512)
    return acc + reinterpret_cast<I>(_mm512_madd_epi16(reinterpret_cast<__m512i>(w), reinterpret_cast<__m512i>(x)));
#elif defined(PM_AVX2)
    return acc + reinterpret_cast<I>(_mm256_madd_epi16(reinterpret_cast<__m256i>(w), reinterpret_cast<__m256i>(x)));
#else
    const I products = reinterpret_cast<I>(w * x);
    return acc + (products << 16 >> 16) + (products >> 16);
#endif
}
// The bytes of a lane that lie at even and at odd places, as 16 bits.
PM_INLINE H even_bytes(U w) { return reinterpret_cast<H>(w & 0x00ff00ffu); }
PM_INLINE H odd_bytes(U w) { return reinterpret_cast<H>(w >> 8 & 0x00ff00ffu); }
PM_INLINE H even_bytes(I x) { return reinterpret_cast<H>(x) << 8 >> 8; }
PM_INLINE H odd_bytes(I x) { return reinterpret_cast<H>(x) >> 8; }

struct ByteStep {
    static constexpr int kPerStep = 4;
#if defined(PM_VNNI)
    U w;
    struct X { I x; };
    PM_INLINE ByteStep at(const uint8_t* p) { return {load_bytes(p)}; }
    PM_INLINE X row(const int8_t* p) { return {splat_bytes(p)}; }
    PM_INLINE I add(I acc, const ByteStep& b, const X& x) { return dot(acc, b.w, x.x); }
#else
    H even, odd;
    struct X { H even, odd; };
    PM_INLINE ByteStep at(const uint8_t* p) {
        const U w = load_bytes(p);
        return {even_bytes(w), odd_bytes(w)};
    }
    PM_INLINE X row(const int8_t* p) {
        const I x = splat_bytes(p);
        return {even_bytes(x), odd_bytes(x)};
    }
    PM_INLINE I add(I acc, const ByteStep& b, const X& x) {
        return dot_pairs(dot_pairs(acc, b.even, x.even), b.odd, x.odd);
    }
#endif
};

struct NibbleStep {
    static constexpr int kPerStep = 8;
    U low, high;
    PM_INLINE NibbleStep at(const uint8_t* p) {
        const U w = load_bytes(p);
        return {w & 0x0f0f0f0fu, w >> 4 & 0x0f0f0f0fu};
    }
    struct X { I low, high; };
    PM_INLINE X row(const int8_t* p) { return {splat_bytes(p), splat_bytes(p + 4)}; }
    PM_INLINE I add(I acc, const NibbleStep& b, const X& x) {
#if defined(PM_VNNI)
        return dot(dot(acc, b.low, x.low), b.high, x.high);
#elif defined(PM_AVX512)
        const __m512i low = _mm512_maddubs_epi16(reinterpret_cast<__m512i>(b.low), reinterpret_cast<__m512i>(x.low));
        const __m512i high = _mm512_maddubs_epi16(reinterpret_cast<__m512i>(b.high), reinterpret_cast<__m512i>(x.high));
        return dot_pairs(acc, reinterpret_cast<H>(low) + reinterpret_cast<H>(high), H{} + 1);
#elif defined(PM_AVX2)
        const __m256i low = _mm256_maddubs_epi16(reinterpret_cast<__m256i>(b.low), reinterpret_cast<__m256i>(x.low));
        const __m256i high = _mm256_maddubs_epi16(reinterpret_cast<__m256i>(b.high), reinterpret_cast<__m256i>(x.high));
        return dot_pairs(acc, reinterpret_cast<H>(low) + reinterpret_cast<H>(high), H{} + 1);
#else
        const H sum = even_bytes(b.low) * even_bytes(x.low) + odd_bytes(b.low) * odd_bytes(x.low) +
                      even_bytes(b.high) * even_bytes(x.high) + odd_bytes(b.high) * odd_bytes(x.high);
        const I sums = reinterpret_cast<I>(sum);
        return acc + (sums << 16 >> 16) + (sums >> 16);
#endif
    }
};

#if defined(PM_VNNI)
constexpr int kQRows = 12;  // 32 vector registers: 24 sums
#elif defined(PM_AVX512)
constexpr int kQRows = 8;
#elif defined(PM_AVX2)
constexpr int kQRows = 4;
#else
constexpr int kQRows = 2;
#endif

// A column block (kColumns features): its weights at the first k, its scales and zeros of the first group.
struct QBlock {
    const uint8_t* w;
    const float* scales;
    const uint8_t* zeros;
};
constexpr int64_t kStepBytes = kPanel * 4;  // of a panel, to the next step

// What the zero points take off the products' sum: zeros[i] * sum, of a sum of at most kMaxGroup int8.
PM_INLINE I zero_terms(const uint8_t* zeros, int32_t sum) {
#if defined(PM_AVX512)
    const __m512i z = _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros)));
    return reinterpret_cast<I>(_mm512_madd_epi16(z, _mm512_set1_epi32(sum)));
#elif defined(PM_AVX2)
    const __m256i z = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros)));
    return reinterpret_cast<I>(_mm256_madd_epi16(z, _mm256_set1_epi32(sum)));
#else
    I z;
    for (int i = 0; i < W; ++i) z[i] = zeros[i] * sum;
    return z;
#endif
}

// y[R][kColumns] of the R rows from `row` on.
template <class Q, int R>
static void q_tile(const QuantizedRows& x, int64_t row, const QBlock& block, float* y, int64_t ldy) {
    constexpr bool kBytes = Q::kPerStep == 4;
    // Four rows of nibbles take longer to multiply than to load, and the loads come too late by themselves. Bytes, and
    // fewer rows, are best left to the machine's own prefetching.
    constexpr int64_t kAhead = !kBytes && R >= 4 ? 4096 : 0;
    V total[R][2];  // in memory: the sums of a group need the registers
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) total[r][0] = total[r][1] = V{};
    const uint8_t* w = block.w;
    for (int64_t g = 0; g < x.groups; ++g) {
        const float* scales = x.scales + g * x.m + row;
        const int32_t* sums = x.sums + g * x.m + row;
        const uint8_t* zeros = block.zeros + g * kPanel;
        I acc[R][2];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
            for (int j = 0; j < 2; ++j) acc[r][j] = kBytes ? I{} - 128 * sums[r] : -zero_terms(zeros + j * W, sums[r]);
        const int64_t end = x.k < (g + 1) * x.group ? x.k : (g + 1) * x.group;
        for (int64_t k = g * x.group, next; k < end; k = next) {
            next = (k / kChunk + 1) * kChunk < end ? (k / kChunk + 1) * kChunk : end;
            const int8_t* a = x.x + (k / kChunk * x.m + row) * kChunkStride + k % kChunk;
            const int64_t steps = (next - k + Q::kPerStep - 1) / Q::kPerStep;
            for (int64_t s = 0; s < steps; ++s) {
                const Q first = Q::at(w), second = Q::at(w + 4 * W);
                if constexpr (kAhead > 0) {
                    __builtin_prefetch(w + kAhead);
                    if constexpr (W == 16) __builtin_prefetch(w + kAhead + 64);
                }
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r) {
                    const typename Q::X v = Q::row(a + r * kChunkStride);
                    acc[r][0] = Q::add(acc[r][0], first, v);
                    acc[r][1] = Q::add(acc[r][1], second, v);
                }
                w += kStepBytes;
                a += Q::kPerStep;
            }
        }
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            const V scale = load(block.scales + g * kPanel + j * W);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r)
                total[r][j] += __builtin_convertvector(acc[r][j], V) * (scale * splat(scales[r]));
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) store(y + r * ldy + j * W, total[r][j]);
}

// y[rows][kColumns]
template <class Q>
__attribute__((noinline)) static void q_gemm(const QuantizedRows& x, int64_t first_row, int64_t rows, const QBlock& block,
                                             float* y, int64_t ldy) {
    const int64_t tiles = (rows + kQRows - 1) / kQRows;
    for (int64_t t = 0; t < tiles; ++t) {
        const int64_t first = rows * t / tiles, n = rows * (t + 1) / tiles - first;
#define PM_ROWS(R) \
    case R: if constexpr (R <= kQRows) q_tile<Q, R>(x, first_row + first, block, y + first * ldy, ldy); break
        switch (n) {
            PM_ROWS(1); PM_ROWS(2); PM_ROWS(3); PM_ROWS(4); PM_ROWS(5); PM_ROWS(6);
            PM_ROWS(7); PM_ROWS(8); PM_ROWS(9); PM_ROWS(10); PM_ROWS(11); PM_ROWS(12);
        }
#undef PM_ROWS
    }
}

template <class T>
PM_KERNEL void qlinear(const QLinearArgs<T>& p, int64_t begin, int64_t end) {
    const int64_t size = (p.zeros ? (p.k + 7) / 8 : (p.k + 3) / 4) * kStepBytes;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t first_row = item % p.row_blocks * p.row_block;
        const int64_t rows = p.m - first_row < p.row_block ? p.m - first_row : p.row_block;
        const int64_t first_panel = item / p.row_blocks * p.panel_group;
        const int64_t left = p.panels_count - first_panel, panels = left < p.panel_group ? left : p.panel_group;
        const int64_t width = panels * kPanel;
        float* sums = scratch(rows * width);
        for (int64_t column = 0; column < width; column += kColumns) {
            const int64_t panel = first_panel + column / kPanel, inside = column % kPanel;
            const int64_t at = panel * p.rows.groups * kPanel + inside;
            const QBlock block{p.panels + panel * size + inside * 4, p.scales + at, p.zeros ? p.zeros + at : nullptr};
            if (p.zeros) q_gemm<NibbleStep>(p.rows, first_row, rows, block, sums + column, width);
            else q_gemm<ByteStep>(p.rows, first_row, rows, block, sums + column, width);
        }
        finish(p, sums, width, first_row, rows, first_panel * kPanel);
    }
}

// Rounding to int8, one scale for n elements: 127 is their largest magnitude. A NaN or an infinity among them makes
// the scale NaN, and what is computed with it; zeros have scale 0.
struct Rounding {
    float scale, inverse;
};
template <class T>
PM_INLINE Rounding rounding_of(const T* x, int64_t n) {
    U most{};
    sweep(n, [&](int64_t i, int64_t count) {
        const U magnitude = reinterpret_cast<U>(take(x + i, count)) & 0x7fffffffu;  // ordered as the floats are
        most = magnitude > most ? magnitude : most;
    });
    uint32_t bits = 0;
    for (int i = 0; i < W; ++i) bits = most[i] > bits ? most[i] : bits;
    if (bits >= 0x7f800000u) return {std::numeric_limits<float>::quiet_NaN(), 0};
    float highest;
    memcpy(&highest, &bits, 4);
    if (highest < 1e-30f) return {0, 0};  // its inverse would overflow
    return {highest / 127.0f, 127.0f / highest};
}

// The integers nearest to v, halves to even, of |v| < 2^22.
PM_INLINE I nearest(V v) { return reinterpret_cast<I>(v + splat(12582912.0f)) - 0x4b400000; }

// to[i] = x[i] in int8, up to W - 1 bytes past n are overwritten; returns their sum.
template <class T>
PM_INLINE int32_t round_to_int8(const T* x, int64_t n, const Rounding& rounding, int8_t* to) {
    typedef int8_t Signed __attribute__((vector_size(PM_WIDTH)));
    I total{};
    sweep(n, [&](int64_t i, int64_t count) {
        V v = take(x + i, count) * rounding.inverse;
        v = v == v ? v : V{};
        const I q = nearest(v);
        total += q;
        const Signed bytes = __builtin_convertvector(q, Signed);
        memcpy(to + i, &bytes, W);
    });
    int32_t sum = 0;
    for (int i = 0; i < W; ++i) sum += total[i];
    return sum;
}

template <class T>
PM_KERNEL void quantize_rows(const T* x, int64_t ldx, const QuantizedRows& out, int64_t begin, int64_t end) {
    const int64_t chunks = (out.k + kChunk - 1) / kChunk;
    for (int64_t row = begin; row < end; ++row) {
        const T* from = x + row * ldx;
        for (int64_t g = 0; g < out.groups; ++g) {
            const int64_t first = g * out.group, last = out.k < first + out.group ? out.k : first + out.group;
            const Rounding rounding = rounding_of(from + first, last - first);
            int32_t sum = 0;
            for (int64_t k = first, next; k < last; k = next) {
                next = (k / kChunk + 1) * kChunk < last ? (k / kChunk + 1) * kChunk : last;
                sum += round_to_int8(from + k, next - k, rounding,
                                     out.x + (k / kChunk * out.m + row) * kChunkStride + k % kChunk);
            }
            out.scales[g * out.m + row] = rounding.scale;
            out.sums[g * out.m + row] = sum;
        }
        const int64_t used = out.k - (chunks - 1) * kChunk;
        memset(out.x + ((chunks - 1) * out.m + row) * kChunkStride + used, 0, (used + 63) / 64 * 64 - used);
    }
}

template <class T>
PM_KERNEL void pack_int8(const T* w, int64_t ldw, int64_t rows, int64_t k, uint8_t* panel, float* scales) {
    const int64_t steps = (k + 3) / 4;
    if (rows < kPanel) {
        memset(panel, 128, steps * kStepBytes);
        memset(scales + rows, 0, (kPanel - rows) * sizeof(float));
    }
    int8_t* line = reinterpret_cast<int8_t*>(scratch((k + 64) / 4 + 1));
    for (int64_t r = 0; r < rows; ++r) {
        const Rounding rounding = rounding_of(w + r * ldw, k);
        scales[r] = rounding.scale;
        round_to_int8(w + r * ldw, k, rounding, line);
        memset(line + k, 0, 4);
        for (int64_t s = 0; s < steps; ++s) {
            uint32_t bits;
            memcpy(&bits, line + 4 * s, 4);
            bits ^= 0x80808080u;  // + 128
            memcpy(panel + s * kStepBytes + r * 4, &bits, 4);
        }
    }
}

// Each group's range is cut by the factor that makes the squared error least, as clipping the few largest weights
// gives the others finer steps. The zero point stays where the whole range wants it.
constexpr int kCuts = 9;
constexpr float kCutStep = 0.035f;  // factors 1, 0.965, ... 0.72
constexpr int64_t kMaxGroup = 128;
typedef uint8_t Small __attribute__((vector_size(PM_WIDTH)));

template <class T>
PM_KERNEL void pack_int4(const T* w, int64_t ldw, int64_t rows, int64_t k, int64_t group, uint8_t* panel, float* scales,
                         uint8_t* zeros) {
    alignas(64) float staged[kMaxGroup * kPanel];  // [k][kPanel]: a lane is a feature, so that sums are over k in order
    const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
    for (int64_t first = 0; first < k; first += group) {
        const int64_t depth = k - first < group ? k - first : group, padded = (depth + 7) / 8 * 8;
        for (int64_t c = 0; c < kPanel; c += W) {
            for (int64_t i = 0; i < padded; i += W) {
                const int64_t count = depth - i < W ? depth - i : W;
                V lines[W];
                for (int r = 0; r < W; ++r)
                    lines[r] = count > 0 && c + r < rows ? take(w + (c + r) * ldw + first + i, count) : V{};
                transpose(lines);
                for (int r = 0; r < W && i + r < padded; ++r) store(staged + (i + r) * kPanel + c, lines[r]);
            }
            V low{}, high{};
            for (int64_t i = 0; i < depth; ++i) {
                const V v = load(staged + i * kPanel + c);
                low = v < low ? v : low;
                high = v > high ? v : high;
            }
            const V step = (high - low) / 15.0f;
            const I usable = step > 1e-30f;
            const V zero = usable ? __builtin_convertvector(nearest(usable ? -low / step : V{}), V) : V{};
            V best = splat(inf), scale = splat(nan);
            for (int cut = 0; cut < kCuts; ++cut) {
                const V s = step * (1.0f - kCutStep * static_cast<float>(cut));
                const V inverse = usable ? 1.0f / s : V{};
                V error{};
                for (int64_t i = 0; i < depth; ++i) {
                    const V v = load(staged + i * kPanel + c);
                    V q = v * inverse + 12582912.0f - 12582912.0f + zero;
                    q = q < 0.0f ? V{} : q;
                    q = q > 15.0f ? splat(15.0f) : q;
                    const V off = v - (q - zero) * s;
                    error += off * off;
                }
                const I better = error < best;
                best = better ? error : best;
                scale = better ? s : scale;
            }
            const V inverse = usable && scale == scale ? 1.0f / scale : V{};
            for (int64_t i = 0; i < padded; i += 8) {
                U bits{};
                for (int j = 0; j < 8; ++j) {
                    V q = load(staged + (i + j) * kPanel + c) * inverse + 12582912.0f - 12582912.0f + zero;
                    q = q > 0.0f ? q : V{};
                    q = q > 15.0f ? splat(15.0f) : q;
                    bits |= reinterpret_cast<U>(__builtin_convertvector(q, I)) << (j % 4 * 8 + j / 4 * 4);
                }
                memcpy(panel + (first + i) / 8 * kStepBytes + c * 4, &bits, sizeof bits);
            }
            store(scales + first / group * kPanel + c, usable ? scale : scale == scale ? V{} : scale);
            const Small small = __builtin_convertvector(zero, Small);
            memcpy(zeros + first / group * kPanel + c, &small, W);
        }
    }
}

template <class T>
PM_KERNEL void dequantize(const uint8_t* w, float scale, int64_t k, T* out) {
    for (int64_t i = 0; i < k; i += W) {
        alignas(64) float line[W];
        for (int j = 0; j < W; j += 4)
            for (int b = 0; b < 4; ++b)
                line[j + b] = i + j < k ? static_cast<float>(w[(i + j) / 4 * kStepBytes + b] - 128) * scale : 0;
        put(out + i, load(line), k - i < W ? k - i : W);
    }
}
