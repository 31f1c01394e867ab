// The one matrix kernel, under linear layers and under both products of attention.
//
// Every element of the result is a single chain of fused multiply-adds over k in order, whatever the tile it falls
// in: a row's bits do not depend on the rows around it.

constexpr int kDepth = 256;             // rows of `a` are staged in pieces of at most this many columns
constexpr int kAStride = kDepth + 16;   // and lie this far apart: constant, so that addresses are immediates
constexpr int kColumns = 2 * W;         // of a column block
#if defined(PM_AVX512)
constexpr int kRows = 12;  // 32 vector registers: 24 sums
constexpr int blocks_of(int rows) { return rows <= 2 ? 4 : rows <= 5 ? 2 : 1; }
#else
constexpr int kRows = 6;   // 16 vector registers: 12 sums
constexpr int blocks_of(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
#endif

// c[R][B * kColumns] (+)= a[R][depth] b[depth][...]: column block j of b starts at b[j], its rows ldb apart.
template <int R, int B>
static void tile(const float* a, const float* const* b, int64_t ldb, int64_t depth, float* c, int64_t ldc,
                 bool accumulate, const float* bias) {
    V acc[R][2 * B];
    const float* panel[B];
    for (int j = 0; j < B; ++j) panel[j] = b[j];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int j = 0; j < 2 * B; ++j) acc[r][j] = accumulate ? load(c + r * ldc + j * W) : V{};
    for (int64_t k = 0; k < depth; ++k) {
        V row[2 * B];
#pragma GCC unroll 16
        for (int j = 0; j < B; ++j) {
            row[2 * j] = load(panel[j]);
            row[2 * j + 1] = load(panel[j] + W);
            panel[j] += ldb;
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const V x = splat(a[r * kAStride]);
#pragma GCC unroll 16
            for (int j = 0; j < 2 * B; ++j) acc[r][j] = fma(x, row[j], acc[r][j]);
        }
        ++a;
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int j = 0; j < 2 * B; ++j)
            store(c + r * ldc + j * W, bias ? acc[r][j] + load(bias + j * W) : acc[r][j]);
}

// `blocks` column blocks for R rows, as many at a time as the registers hold.
template <int R>
static void row_tile(const float* a, const float* const* b, int blocks, int64_t ldb, int64_t depth, float* c,
                     int64_t ldc, bool accumulate, const float* bias) {
    constexpr int B = blocks_of(R);
    int j = 0;
    for (; j + B <= blocks; j += B)
        tile<R, B>(a, b + j, ldb, depth, c + j * kColumns, ldc, accumulate, bias ? bias + j * kColumns : nullptr);
    if constexpr (B > 1)
        for (; j < blocks; ++j)
            tile<R, 1>(a, b + j, ldb, depth, c + j * kColumns, ldc, accumulate, bias ? bias + j * kColumns : nullptr);
}

// c[rows][blocks * kColumns] (+)= a[rows][depth] b. a: rows kAStride apart, depth <= kDepth.
__attribute__((noinline)) static void gemm(int64_t rows, const float* a, const float* const* b, int blocks, int64_t ldb, int64_t depth, float* c,
                 int64_t ldc, bool accumulate, const float* bias = nullptr) {
    const int64_t tiles = (rows + kRows - 1) / kRows;
    for (int64_t t = 0; t < tiles; ++t) {
        const int64_t first = rows * t / tiles, count = rows * (t + 1) / tiles - first;  // 13 rows: 6 + 7, not 12 + 1
        const float* at = a + first * kAStride;
        float* ct = c + first * ldc;
#define PM_ROWS(n) \
    case n: if constexpr (n <= kRows) row_tile<n>(at, b, blocks, ldb, depth, ct, ldc, accumulate, bias); break
        switch (count) {
            PM_ROWS(1); PM_ROWS(2); PM_ROWS(3); PM_ROWS(4); PM_ROWS(5); PM_ROWS(6);
            PM_ROWS(7); PM_ROWS(8); PM_ROWS(9); PM_ROWS(10); PM_ROWS(11); PM_ROWS(12);
        }
#undef PM_ROWS
    }
}

static void linear_item(const LinearArgs& p, int64_t item) {
    constexpr int kPerPanel = kPanel / kColumns;
    const int64_t first_row = item % p.row_blocks * p.row_block;
    const int64_t rows = p.m - first_row < p.row_block ? p.m - first_row : p.row_block;
    const int64_t first_panel = item / p.row_blocks * p.panel_group;
    const int64_t last_panel =
        first_panel + p.panel_group < p.panels_count ? first_panel + p.panel_group : p.panels_count;
    const int64_t whole = p.n / kPanel < last_panel ? p.n / kPanel : last_panel;  // panels without padding
    float* a = scratch(rows * (kAStride + kPanel));
    float* edge = a + rows * kAStride;  // [rows][kPanel] of the padded panel, summed across pieces of k
    float* out = p.out + first_row * p.n;
    for (int64_t k0 = 0; k0 < p.k; k0 += kDepth) {
        const int64_t depth = p.k - k0 < kDepth ? p.k - k0 : kDepth;
        for (int64_t r = 0; r < rows; ++r)
            memcpy(a + r * kAStride, p.x + (first_row + r) * p.ldx + k0, depth * sizeof(float));
        const bool last = k0 + depth == p.k;
        // Few rows: several panels at a time, so that enough independent chains are in flight.
        const int64_t step = rows <= 2 ? 4 : rows <= 5 ? 2 : 1;
        for (int64_t n = first_panel; n < last_panel;) {
            const bool padded = n >= whole;
            const int64_t panels = padded ? 1 : whole - n < step ? whole - n : step;
            const float* blocks[4 * kPerPanel];
            for (int64_t j = 0; j < panels * kPerPanel; ++j)
                blocks[j] = p.panels + ((n + j / kPerPanel) * p.k + k0) * kPanel + j % kPerPanel * kColumns;
            gemm(rows, a, blocks, static_cast<int>(panels * kPerPanel), kPanel, depth, padded ? edge : out + n * kPanel,
                 padded ? kPanel : p.n, k0 > 0, last && p.bias ? p.bias + n * kPanel : nullptr);
            n += panels;
        }
    }
    if (whole < last_panel)
        for (int64_t r = 0; r < rows; ++r)
            memcpy(out + r * p.n + whole * kPanel, edge + r * kPanel, (p.n - whole * kPanel) * sizeof(float));
}

static void linear(const LinearArgs& p, int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) linear_item(p, item);
}
