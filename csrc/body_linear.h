// Linear layers over packed panels.

constexpr int64_t kFewRows = 32;  // up to so many the weights are a stream, of which nothing has to stay in cache

PM_INLINE Single step_of(float) { return {}; }
PM_INLINE Pair step_of(bf16) { return {}; }

// dst[0..steps * P::kWide) = the elements of a row piece, an odd last one paired with zero.
PM_INLINE void stage_row(float* dst, const float* x, int64_t n) { memcpy(dst, x, n * sizeof(float)); }
PM_INLINE void stage_row(uint32_t* dst, const bf16* x, int64_t n) {
    if (n % 2) dst[n / 2] = 0;
    memcpy(dst, x, n * sizeof(bf16));
}
PM_INLINE void stage_row(float* dst, const bf16* x, int64_t n) {
    sweep(n, [&](int64_t i, int64_t count) { put(dst + i, take(x + i, count), count); });
    if (n % 2) dst[n] = 0;
}

// Where rows of sums go: y, `width` columns of it from a panel's first one on, for rows first_row, first_row + 1, ...
template <class T>
PM_INLINE void finish(const LinearOut<T>& p, const float* sums, int64_t width, int64_t first_row, int64_t rows,
                      int64_t column) {
    for (int64_t r = 0; r < rows; ++r, sums += width) {
        const int64_t row = first_row + r;
        const auto emit = [&](int64_t i, V y, int64_t count) {
            if (p.out) put(p.out + row * p.n + i, y, count);
            else if (p.out_wide) put(p.out_wide + row * p.n + i, y, count);
            else put(p.residual + row * p.ldr + i, take(p.residual + row * p.ldr + i, count) + y, count);
        };
        if (!p.gated) {
            sweep(p.n - column < width ? p.n - column : width, [&](int64_t i, int64_t count) {
                V y = load(sums + i);
                if (p.bias) y += load(p.bias + column + i);
                emit(column + i, y, count);
            });
            continue;
        }
        constexpr int64_t kHalf = kPanel / 2;
        for (int64_t from = 0; from < width; from += kPanel) {
            const int64_t to = (column + from) / 2, left = p.n - to;
            sweep(left < kHalf ? left : kHalf, [&](int64_t i, int64_t count) {
                V gate = load(sums + from + i), up = load(sums + from + kHalf + i);
                if (p.bias) gate += load(p.bias + column + from + i), up += load(p.bias + column + from + kHalf + i);
                emit(to + i, gate / (1.0f + exp(-gate)) * up, count);
            });
        }
    }
}

template <class T>
PM_KERNEL void linear_item(const LinearArgs<T>& p, int64_t item) {
    typedef decltype(step_of(T{})) P;
    constexpr int kPerPanel = kPanel / kColumns;
    constexpr int kPerStep = sizeof(T) == 2 ? 2 : 1;                    // of k
    constexpr int64_t kPiece = int64_t(kDepth) / P::kWide * kPerStep;  // of k
    const int64_t first_row = item % p.row_blocks * p.row_block;
    const int64_t rows = p.m - first_row < p.row_block ? p.m - first_row : p.row_block;
    const int64_t first_panel = item / p.row_blocks * p.panel_group;
    const int64_t left = p.panels_count - first_panel, panels = left < p.panel_group ? left : p.panel_group;
    const int64_t width = panels * kPanel, steps_all = (p.k + kPerStep - 1) / kPerStep;

    // A piece of k's for all panels, so that what is staged of x stays in cache; few rows are staged whole, and the panels
    // are read as they lie, from first to last.
    const int64_t pieces = (p.k + kPiece - 1) / kPiece, staged = rows <= kFewRows ? pieces : 1;
    float* sums = scratch(rows * (staged * kAStride + width));
    auto* a = reinterpret_cast<typename P::A*>(sums + rows * width);
    const auto* w = reinterpret_cast<const typename P::B*>(p.panels) + first_panel * steps_all * kPanel;
    // Few rows: several panels at a time, so that enough independent chains are in flight.
    const int64_t together = rows <= 2 ? 4 : rows <= 5 ? 2 : 1;
    for (int64_t piece = 0; piece < pieces; piece += staged) {
        for (int64_t i = piece; i < piece + staged; ++i)
            for (int64_t r = 0; r < rows; ++r)
                stage_row(a + ((i - piece) * rows + r) * kAStride, p.x + (first_row + r) * p.ldx + i * kPiece,
                          p.k - i * kPiece < kPiece ? p.k - i * kPiece : kPiece);
        for (int64_t n = 0; n < panels; n += together) {
            const int64_t count = (panels - n < together ? panels - n : together) * kPerPanel;
            for (int64_t i = piece; i < piece + staged; ++i) {
                const int64_t first = i * (kPiece / kPerStep);
                const int64_t steps = steps_all - first < kPiece / kPerStep ? steps_all - first : kPiece / kPerStep;
                const typename P::B* blocks[4 * kPerPanel];
                for (int64_t j = 0; j < count; ++j)
                    blocks[j] = w + ((n + j / kPerPanel) * steps_all + first) * kPanel + j % kPerPanel * kColumns;
                gemm<P>(rows, a + (i - piece) * rows * kAStride, blocks, static_cast<int>(count), kPanel, steps,
                        sums + n * kPanel, width, i > 0);
            }
        }
    }

    finish(p, sums, width, first_row, rows, first_panel * kPanel);
}

template <class T>
static void linear(const LinearArgs<T>& p, int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) linear_item(p, item);
}
