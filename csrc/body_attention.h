// Attention of one item: tiles of keys, gathered in ranges of kAttentionRange keys at fixed absolute positions. A range begins
// afresh, and ranges are joined in their order (by log-sum-exp, as in FlashDecoding), whether one thread computed them
// or many: the bits are the same.

#if defined(PM_AVX512BF16)
template <class T, class C> struct TileOf { typedef FloatTile<T, C> Type; };
template <class C> struct TileOf<bf16, C> { typedef WordTile<C> Type; };
#else
template <class T, class C> struct TileOf { typedef FloatTile<T, C> Type; };
#endif

// Where a joined row keeps its maximum and its sum of weights; the outputs lie before them.
constexpr int kMaximum = -16, kTotal = -15;

// Joins a range into a row that has seen those before it; `unit` is that of the maxima.
PM_INLINE void join(float* row, int64_t stride, bool is_first, const float* out, int64_t d, float maximum, float total,
                    float unit) {
    float* end = row + stride;
    if (is_first) {
        memcpy(row, out, d * sizeof(float));
        end[kMaximum] = maximum, end[kTotal] = total;
        return;
    }
    const float top = maximum > end[kMaximum] ? maximum : end[kMaximum];
    const float keep = exp(splat((end[kMaximum] - top) * unit))[0], add = exp(splat((maximum - top) * unit))[0];
    sweep(d, [&](int64_t i, int64_t n) { put(row + i, fma(take(out + i, n), splat(add), take(row + i, n) * keep), n); });
    end[kMaximum] = top, end[kTotal] = end[kTotal] * keep + total * add;
}

template <class T, class C>
PM_INLINE void finish(const AttentionArgs<T, C>& p, int64_t row, const float* out, float total) {
    T* to = p.out + row / p.group * p.out_token + row % p.group * p.out_head;
    const V norm = splat(1.0f / total);
    sweep(p.d, [&](int64_t i, int64_t n) { put(to + i, take(out + i, n) * norm, n); });
}

template <class T, class C>
PM_KERNEL void attention(const AttentionArgs<T, C>& p, const AttentionArgs<T, C>* next) {
    typename TileOf<T, C>::Type t;
    const int64_t rows = p.tokens * p.group, stride = attention_partial(p.d);
    const bool alone = !p.partial && p.keys <= kAttentionRange;
    const int64_t working = (t.floats(p) + 15) / 16 * 16;
    float* memory = scratch(working + (alone || p.partial ? 0 : rows * stride));
    float* joined = p.partial ? p.partial : memory + working;
    t.begin(p, next, memory);
    for (int64_t start = p.first_key; start < p.keys; start += kAttentionRange) {
        const int64_t end = start + kAttentionRange < p.keys ? start + kAttentionRange : p.keys;
        clear(t.out, rows * t.ldv);
        clear(t.lanes, rows * W);
        for (int64_t r = 0; r < rows; ++r) t.maxima[r] = -std::numeric_limits<float>::infinity();
        for (int64_t first = start; first < end; first += kKeys) t.tile(p, first, end - first < kKeys ? end - first : kKeys);
        if (alone) break;
        for (int64_t r = first_row(p, start); r < rows; ++r)
            join(joined + r * stride, stride, p.partial || start == 0, t.out + r * t.ldv, p.d, t.maxima[r],
                 sum(load(t.lanes + r * W)), t.kUnit);
    }
    if (p.partial) return;
    for (int64_t r = 0; r < rows; ++r) {
        if (alone) finish(p, r, t.out + r * t.ldv, sum(load(t.lanes + r * W)));
        else finish(p, r, joined + r * stride, joined[(r + 1) * stride + kTotal]);
    }
}

// The rows of an item whose ranges were computed apart, [range][row] from p.partial on.
template <class T, class C>
PM_KERNEL void join_ranges(const AttentionArgs<T, C>& p) {
    const int64_t rows = p.tokens * p.group, stride = attention_partial(p.d);
    for (int64_t r = 0; r < rows; ++r) {
        float* row = p.partial + r * stride;
        const float* part = row;
        for (int64_t start = kAttentionRange; start < visible(p, r); start += kAttentionRange) {
            part += rows * stride;
            join(row, stride, false, part, p.d, part[stride + kMaximum], part[stride + kTotal],
                 TileOf<T, C>::Type::kUnit);
        }
        finish(p, r, row, row[stride + kTotal]);
    }
}
