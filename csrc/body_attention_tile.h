// Softmax attention of one kv head, a tile of keys at a time (online softmax, Milakov & Gimelshein 2018; tiles as in
// FlashAttention, Dao et al. 2022): what the tiles of all arithmetics share, and the tile in float32. Keys are taken in
// tiles at fixed absolute positions and a masked key adds exactly nothing, so that a query's bits depend neither on the
// other queries of its tile, nor on chunking, nor on where blocks lie.

constexpr int kKeys = 64;                  // of a tile
static_assert(kAttentionRange % kKeys == 0);
constexpr int kMaxBlocks = 256 / kColumns;  // column blocks of a tile of scores, or of head_dim <= 256
static_assert(kKeys / kColumns <= kMaxBlocks);

// Keys that the query of a row sees.
template <class T, class C>
PM_INLINE int64_t visible(const AttentionArgs<T, C>& p, int64_t row) {
    return p.causal ? p.causal_first + row / p.group : p.keys;
}

// The first row that sees any of the keys from `first` on.
template <class T, class C>
PM_INLINE int64_t first_row(const AttentionArgs<T, C>& p, int64_t first) {
    return p.causal && first >= p.causal_first ? (first - p.causal_first + 1) * p.group : 0;
}

// A key: of the cache, elements block_size apart; packed, a dense row.
template <class T, class C>
PM_INLINE const C* keys_at(const AttentionArgs<T, C>& p, int64_t key) {
    return p.blocks ? p.k + p.blocks[key / p.block_size] * p.block_stride + key % p.block_size : p.k + key * p.k_key;
}
template <class T, class C>
PM_INLINE const C* values_at(const AttentionArgs<T, C>& p, int64_t key) {
    return p.blocks ? p.v + p.blocks[key / p.block_size] * p.block_stride + key % p.block_size * p.d : p.v + key * p.v_key;
}

// dst[i] = float(src[i])
template <class T>
PM_INLINE void copy(float* dst, const T* src, int64_t n) {
    sweep(n, [&](int64_t i, int64_t count) { put(dst + i, take(src + i, count), count); });
}

PM_INLINE void clear(float* dst, int64_t n) {
    if (n > 0) memset(dst, 0, n * sizeof(float));
}

// kt[d][kKeys] and vt[count][ldv] of keys first..first+count-1; lanes of kt past count are zero, columns of vt past d too.
template <class T, class C>
PM_KERNEL void stage(const AttentionArgs<T, C>& p, int64_t first, int64_t count, float* kt, float* vt, int64_t ldv) {
    if (p.blocks) {
        for (int64_t j = 0, run; j < count; j += run) {
            const int64_t rest = p.block_size - (first + j) % p.block_size;
            run = rest < count - j ? rest : count - j;
            const C* k = keys_at(p, first + j);
            for (int64_t i = 0; i < p.d; ++i) copy(kt + i * kKeys + j, k + i * p.block_size, run);
        }
        if (count < kKeys)
            for (int64_t i = 0; i < p.d; ++i) clear(kt + i * kKeys + count, kKeys - count);
    } else {
        for (int64_t j = 0; j < kKeys; j += W) {
            for (int64_t i = 0; i < p.d; i += W) {
                const int64_t width = p.d - i < W ? p.d - i : W;
                V rows[W];
                for (int r = 0; r < W; ++r) rows[r] = j + r < count ? take(keys_at(p, first + j + r) + i, width) : V{};
                transpose(rows);
                for (int r = 0; r < width; ++r) store(kt + (i + r) * kKeys + j, rows[r]);
            }
        }
    }
    for (int64_t j = 0; j < count; ++j) {
        copy(vt + j * ldv, values_at(p, first + j), p.d);
        clear(vt + j * ldv + p.d, ldv - p.d);
    }
}

// Scales of a tile's keys and values, zeros past count.
template <class T, class C>
PM_INLINE void find_scales(const AttentionArgs<T, C>& p, int64_t first, int64_t count, float* keys, float* values) {
    clear(keys, kKeys);
    clear(values, kKeys);
    for (int64_t j = 0, run; j < count; j += run) {
        const int64_t offset = (first + j) % p.block_size, rest = p.block_size - offset;
        run = rest < count - j ? rest : count - j;
        const int64_t at = p.blocks[(first + j) / p.block_size] * p.scale_stride + offset;
        memcpy(keys + j, p.k_scale + at, run * sizeof(float));
        memcpy(values + j, p.v_scale + at, run * sizeof(float));
    }
}

// Asks for the blocks of the tile at key `first`. They lie scattered, and the machine's own prefetching stops at each
// one's end; it hides more of the wait where few rows use what is fetched.
template <class T, class C>
PM_INLINE void prefetch_paged(const AttentionArgs<T, C>& p, int64_t first) {
    if (!p.blocks || p.block_size > kKeys) return;
    const int64_t end = first + kKeys < p.keys ? first + kKeys : p.keys;
    const int64_t bytes = p.d * p.block_size * static_cast<int64_t>(sizeof(C));
    for (int64_t key = first; key < end; key += p.block_size) {
        const int64_t base = p.blocks[key / p.block_size] * p.block_stride;
        const char* k = reinterpret_cast<const char*>(p.k + base);
        const char* v = reinterpret_cast<const char*>(p.v + base);
        for (int64_t i = 0; i < bytes; i += 64) {
            __builtin_prefetch(k + i, 0, 2);
            __builtin_prefetch(v + i, 0, 2);
        }
    }
}

// One tile of scores for one row: s becomes the weights, the running maximum and lane sums move on, the output so
// far is rescaled. `valid` >= 1 keys of `width` columns are visible. Scaled: scores and weights are multiplied with
// what the keys' and the values' codes stand for; the sum of weights is not.
template <bool kScaled>
PM_INLINE void soften(float* s, int64_t valid, int64_t width, const float* key_scale, const float* value_scale,
                      float& maximum, float* lanes, float* out, int64_t ldv) {
    const float inf = std::numeric_limits<float>::infinity();
    const I lane = iota();
    V best = splat(maximum);
    for (int64_t j = 0; j < width; j += W) {
        V v = load(s + j);
        if (kScaled) v = v * load(key_scale + j);
        if (valid - j < W) v = lane < static_cast<int32_t>(valid - j) ? v : splat(-inf);
        if (kScaled || valid - j < W) store(s + j, v);
        best = max(v, best);
    }
    const float top = highest(best);
    V total = {};
    for (int64_t j = 0; j < width; j += W) {
        const V weight = exp(load(s + j) - top);
        store(s + j, kScaled ? weight * load(value_scale + j) : weight);
        total += weight;
    }
    if (top != maximum) {
        const float rescale = exp(splat(maximum - top))[0];
        store(lanes, load(lanes) * rescale + total);
        for (int64_t i = 0; i < ldv; i += W) store(out + i, load(out + i) * rescale);
        maximum = top;
    } else {
        store(lanes, load(lanes) + total);
    }
}

PM_INLINE const float* wide(const float* p) { return p; }
PM_INLINE const float* wide(const void*) { return nullptr; }  // other types are never read in place

// Queries in float32, keys and values widened to it: read where they lie, or staged. The members stand for the rows of an
// item; T is the type of queries and output, C that of the cache.
template <class T, class C>
struct FloatTile {
    static constexpr float kUnit = 1.0f;  // of the maxima, in natural logarithms
    float *q, *s, *kt, *vt, *out, *lanes, *maxima;
    int64_t ldv;
    bool fits;

    static int64_t columns(const AttentionArgs<T, C>& p) { return (p.d + kColumns - 1) / kColumns * kColumns; }

    // Floats of working memory; `begin` cuts them up and takes the queries.
    static int64_t floats(const AttentionArgs<T, C>& p) {
        return p.tokens * p.group * (2 * kAStride + columns(p) + W + 1) + kKeys * (p.d + columns(p));
    }
    void begin(const AttentionArgs<T, C>& p, const AttentionArgs<T, C>*, float* memory) {
        const int64_t rows = p.tokens * p.group;
        ldv = columns(p);
        q = memory;
        s = q + rows * kAStride;
        kt = s + rows * kAStride;
        vt = kt + p.d * kKeys;
        out = vt + kKeys * ldv;
        lanes = out + rows * ldv;
        maxima = lanes + rows * W;
        for (int64_t r = 0; r < rows; ++r) {
            const T* from = p.q + r / p.group * p.q_token + r % p.group * p.q_head;
            sweep(p.d, [&](int64_t i, int64_t n) { put(q + r * kAStride + i, take(from + i, n) * p.scale, n); });
        }
        // A full tile is read where it lies in the cache if no column block of keys or values is cut.
        fits = sizeof(C) == 4 && p.blocks && p.block_size % kColumns == 0 && p.d % kColumns == 0;
    }

    void tile(const AttentionArgs<T, C>& p, int64_t first, int64_t count) {
        const int64_t rows = p.tokens * p.group, begin = first_row(p, first), left = rows - begin;
        const bool in_place = fits && count == kKeys;
        prefetch_paged(p, first + kKeys);
        if (!in_place) stage(p, first, count, kt, vt, ldv);
        float* sb = s + begin * kAStride;
        const int blocks = static_cast<int>((count + kColumns - 1) / kColumns);
        const float* at[kMaxBlocks];
        for (int j = 0; j < blocks; ++j) at[j] = in_place ? wide(keys_at(p, first + j * kColumns)) : kt + j * kColumns;
        gemm<Single>(left, q + begin * kAStride, at, blocks, in_place ? p.block_size : kKeys, p.d, sb, kAStride, false);
        constexpr bool scaled = sizeof(C) == 1;
        float key_scale[kKeys], value_scale[kKeys];
        if (scaled) find_scales(p, first, count, key_scale, value_scale);
        for (int64_t r = begin; r < rows; ++r) {
            const int64_t seen = visible(p, r) - first;
            soften<scaled>(s + r * kAStride, seen < count ? seen : count, blocks * kColumns, key_scale, value_scale,
                           maxima[r], lanes + r * W, out + r * ldv, ldv);
        }
        // Values of consecutive keys lie together as far as their block goes, or all of them where they were staged.
        for (int64_t j = 0, run; j < count; j += run) {
            run = count - j;
            if (in_place) {
                const int64_t rest = p.block_size - (first + j) % p.block_size;
                run = rest < run ? rest : run;
            }
            const float* values = in_place ? wide(values_at(p, first + j)) : vt;
            for (int i = 0; i < ldv / kColumns; ++i) at[i] = values + i * kColumns;
            gemm<Single>(left, sb + j, at, static_cast<int>(ldv / kColumns), ldv, run, out + begin * ldv, ldv, true);
        }
    }
};
