// The one matrix kernel, under linear layers and under both products of attention.
//
// Every element of the result is a single chain of fused multiply-adds over k in order, whatever the tile it falls
// in: a row's bits do not depend on the rows around it.

constexpr int kDepth = 256;            // rows of `a` are staged in pieces of at most this many elements
constexpr int kAStride = kDepth + 16;  // and lie this far apart: constant, so that addresses are immediates
constexpr int kColumns = 2 * W;        // of a column block
#if defined(PM_AVX512)
constexpr int kRows = 12;  // 32 vector registers: 24 sums
constexpr int blocks_of(int rows) { return rows <= 2 ? 4 : rows <= 5 ? 2 : 1; }
#else
constexpr int kRows = 6;   // 16 vector registers: 12 sums
constexpr int blocks_of(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
#endif

// How a step of the chain multiplies. Single: one k, floats. Pair: two k, bfloat16 pairs in the words of b; a holds
// the same pairs where the machine multiplies them, floats where it does not.
struct Single {
    typedef float A;
    typedef float B;
    static constexpr int kWide = 1;  // elements of a in a step
    static constexpr bool kStreamed = false;  // b is a stream of weights, fetched ahead
};
struct Pair {
#if defined(PM_AVX512BF16)
    typedef uint32_t A;
    static constexpr int kWide = 1;
#else
    typedef float A;
    static constexpr int kWide = 2;
#endif
    typedef uint32_t B;
    static constexpr bool kStreamed = true;
};

PM_INLINE V load_bits(const uint32_t* p) { return load(reinterpret_cast<const float*>(p)); }
PM_INLINE V load_bits(const float* p) { return load(p); }

// The factor of step part `half` out of the loaded bits of b.
template <class P>
PM_INLINE V factor(V bits, int half) {
    if constexpr (P::kWide == 1) return bits;
    else return reinterpret_cast<V>(half ? reinterpret_cast<U>(bits) & 0xffff0000u : reinterpret_cast<U>(bits) << 16);
}

// One column block's share of a step, kAhead bytes on: the machine's own prefetching does not keep up with the memory where
// the processor computes between its loads.
constexpr int kAhead = 4096;
PM_INLINE void prefetch_ahead(const uint32_t* p) {
    const char* at = reinterpret_cast<const char*>(p) + kAhead;
    __builtin_prefetch(at, 0, 2);
    if constexpr (kColumns * sizeof(*p) > 64) __builtin_prefetch(at + 64, 0, 2);
}
PM_INLINE void prefetch_ahead(const float*) {}

PM_INLINE V multiply_add(float x, V row, V acc) { return fma(splat(x), row, acc); }
#if defined(PM_AVX512BF16)
PM_INLINE V multiply_add(uint32_t x, V row, V acc) {
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32(static_cast<int>(x)), (__m512bh)row);
}
#endif

// c[R][B * kColumns] (+)= a[R][steps] b[steps][...]: column block j of b starts at b[j], its rows ldb apart.
template <class P, int R, int B>
static void tile(const typename P::A* a, const typename P::B* const* b, int64_t ldb, int64_t steps, float* c,
                 int64_t ldc, bool accumulate) {
    V acc[R][2 * B];
    const typename P::B* panel[B];
    for (int j = 0; j < B; ++j) panel[j] = b[j];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int j = 0; j < 2 * B; ++j) acc[r][j] = accumulate ? load(c + r * ldc + j * W) : V{};
    for (int64_t k = 0; k < steps; ++k) {
#pragma GCC unroll 2
        for (int half = 0; half < P::kWide; ++half) {
            V row[2 * B];
#pragma GCC unroll 16
            for (int j = 0; j < B; ++j) {
                row[2 * j] = factor<P>(load_bits(panel[j]), half);
                row[2 * j + 1] = factor<P>(load_bits(panel[j] + W), half);
            }
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
                for (int j = 0; j < 2 * B; ++j)
                    acc[r][j] = multiply_add(a[r * kAStride + half], row[j], acc[r][j]);
        }
#pragma GCC unroll 16
        for (int j = 0; j < B; ++j) {
            if constexpr (P::kStreamed) prefetch_ahead(panel[j]);
            panel[j] += ldb;
        }
        a += P::kWide;
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int j = 0; j < 2 * B; ++j) store(c + r * ldc + j * W, acc[r][j]);
}

// `blocks` column blocks for R rows, as many at a time as the registers hold.
template <class P, int R>
static void row_tile(const typename P::A* a, const typename P::B* const* b, int blocks, int64_t ldb, int64_t steps,
                     float* c, int64_t ldc, bool accumulate) {
    constexpr int B = blocks_of(R);
    int j = 0;
    for (; j + B <= blocks; j += B) tile<P, R, B>(a, b + j, ldb, steps, c + j * kColumns, ldc, accumulate);
    if constexpr (B > 1)
        for (; j < blocks; ++j) tile<P, R, 1>(a, b + j, ldb, steps, c + j * kColumns, ldc, accumulate);
}

// c[rows][blocks * kColumns] (+)= a b over `steps` steps. a: rows kAStride apart, at most kDepth elements each.
template <class P>
__attribute__((noinline)) static void gemm(int64_t rows, const typename P::A* a, const typename P::B* const* b,
                                           int blocks, int64_t ldb, int64_t steps, float* c, int64_t ldc,
                                           bool accumulate) {
    const int64_t tiles = (rows + kRows - 1) / kRows;
    for (int64_t t = 0; t < tiles; ++t) {
        const int64_t first = rows * t / tiles, count = rows * (t + 1) / tiles - first;  // 13 rows: 6 + 7, not 12 + 1
        const typename P::A* at = a + first * kAStride;
        float* ct = c + first * ldc;
#define PM_ROWS(n) \
    case n: if constexpr (n <= kRows) row_tile<P, n>(at, b, blocks, ldb, steps, ct, ldc, accumulate); break
        switch (count) {
            PM_ROWS(1); PM_ROWS(2); PM_ROWS(3); PM_ROWS(4); PM_ROWS(5); PM_ROWS(6);
            PM_ROWS(7); PM_ROWS(8); PM_ROWS(9); PM_ROWS(10); PM_ROWS(11); PM_ROWS(12);
        }
#undef PM_ROWS
    }
}
