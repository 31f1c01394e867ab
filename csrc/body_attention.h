// Softmax attention of one kv head (online softmax, Milakov & Gimelshein 2018; tiles as in FlashAttention, Dao et
// al. 2022). Keys are taken in tiles at fixed absolute positions and a masked key adds exactly nothing, so that a
// query's bits depend neither on the other queries of its tile, nor on chunking, nor on where blocks lie.

constexpr int kKeys = 64;                  // of a tile
constexpr int kMaxBlocks = 256 / kColumns;  // column blocks of a tile of scores, or of head_dim <= 256
static_assert(kKeys / kColumns <= kMaxBlocks);

// dst[i] = float(src[i])
template <class T>
PM_INLINE void copy(float* dst, const T* src, int64_t n) {
    sweep(n, [&](int64_t i, int64_t count) { put(dst + i, take(src + i, count), count); });
}

PM_INLINE void clear(float* dst, int64_t n) {
    if (n > 0) memset(dst, 0, n * sizeof(float));
}

// kt[d][kKeys] and vt[count][ldv] of keys first..first+count-1; lanes of kt past count are zero, columns of vt past d too.
template <class T>
PM_KERNEL void stage_paged(const AttentionArgs<T>& p, int64_t first, int64_t count, float* kt, float* vt, int64_t ldv) {
    for (int64_t j = 0; j < count;) {
        const int64_t offset = (first + j) % p.block_size;
        const int64_t run = p.block_size - offset < count - j ? p.block_size - offset : count - j;
        const int64_t base = p.blocks[(first + j) / p.block_size] * p.block_stride;
        const T* k = p.k + base + offset;
        for (int64_t i = 0; i < p.d; ++i) copy(kt + i * kKeys + j, k + i * p.block_size, run);
        const T* v = p.v + base + offset * p.d;
        for (int64_t i = 0; i < run; ++i) {
            copy(vt + (j + i) * ldv, v + i * p.d, p.d);
            clear(vt + (j + i) * ldv + p.d, ldv - p.d);
        }
        j += run;
    }
    if (count < kKeys)
        for (int64_t i = 0; i < p.d; ++i) clear(kt + i * kKeys + count, kKeys - count);
}

template <class T>
PM_KERNEL void stage_packed(const AttentionArgs<T>& p, int64_t first, int64_t count, float* kt, float* vt, int64_t ldv) {
    for (int64_t j = 0; j < kKeys; j += W) {
        for (int64_t i = 0; i < p.d; i += W) {
            const int64_t width = p.d - i < W ? p.d - i : W;
            V rows[W];
            for (int r = 0; r < W; ++r) rows[r] = j + r < count ? take(p.k + (first + j + r) * p.k_key + i, width) : V{};
            transpose(rows);
            for (int r = 0; r < width; ++r) store(kt + (i + r) * kKeys + j, rows[r]);
        }
    }
    for (int64_t j = 0; j < count; ++j) {
        copy(vt + j * ldv, p.v + (first + j) * p.v_key, p.d);
        clear(vt + j * ldv + p.d, ldv - p.d);
    }
}

// Whether a full tile can be read where it lies in the cache: float32, and no column block of keys or values is cut.
template <class T>
PM_INLINE bool reads_in_place(const AttentionArgs<T>& p) {
    return sizeof(T) == 4 && p.blocks && p.block_size % kColumns == 0 && p.d % kColumns == 0;
}
PM_INLINE const float* keys_at(const AttentionArgs<float>& p, int64_t key) {
    return p.k + p.blocks[key / p.block_size] * p.block_stride + key % p.block_size;
}
PM_INLINE const float* values_at(const AttentionArgs<float>& p, int64_t key) {
    return p.v + p.blocks[key / p.block_size] * p.block_stride + key % p.block_size * p.d;
}
PM_INLINE const float* keys_at(const AttentionArgs<bf16>&, int64_t) { return nullptr; }
PM_INLINE const float* values_at(const AttentionArgs<bf16>&, int64_t) { return nullptr; }

// Asks for the blocks of the tile at key `first`. They lie scattered, and the machine's own prefetching stops at each
// one's end; it hides more of the wait where few rows use what is fetched.
template <class T>
PM_INLINE void prefetch_paged(const AttentionArgs<T>& p, int64_t first) {
    const int64_t end = first + kKeys < p.keys ? first + kKeys : p.keys;
    const int64_t bytes = p.d * p.block_size * static_cast<int64_t>(sizeof(T));
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
// far is rescaled. `valid` >= 1 keys of `width` columns are visible.
PM_INLINE void soften(float* s, int64_t valid, int64_t width, float& maximum, float* lanes, float* out, int64_t ldv) {
    const float inf = std::numeric_limits<float>::infinity();
    const I lane = iota();
    V best = splat(maximum);
    for (int64_t j = 0; j < width; j += W) {
        V v = load(s + j);
        if (valid - j < W) {
            v = lane < static_cast<int32_t>(valid - j) ? v : splat(-inf);
            store(s + j, v);
        }
        best = max(v, best);
    }
    const float top = highest(best);
    V total = {};
    for (int64_t j = 0; j < width; j += W) {
        const V weight = exp(load(s + j) - top);
        store(s + j, weight);
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

template <class T>
PM_KERNEL void attention(const AttentionArgs<T>& p) {
    const int64_t rows = p.tokens * p.group;
    const int64_t ldv = (p.d + kColumns - 1) / kColumns * kColumns;
    float* q = scratch(rows * (2 * kAStride + ldv + W + 1) + kKeys * (p.d + ldv));
    float* s = q + rows * kAStride;
    float* kt = s + rows * kAStride;
    float* vt = kt + p.d * kKeys;
    float* out = vt + kKeys * ldv;
    float* lanes = out + rows * ldv;
    float* maxima = lanes + rows * W;
    for (int64_t r = 0; r < rows; ++r) {
        const T* from = p.q + r / p.group * p.q_token + r % p.group * p.q_head;
        sweep(p.d, [&](int64_t i, int64_t n) { put(q + r * kAStride + i, take(from + i, n) * p.scale, n); });
        maxima[r] = -std::numeric_limits<float>::infinity();
    }
    clear(out, rows * ldv);
    clear(lanes, rows * W);
    const bool fits = reads_in_place(p);

    for (int64_t first = 0; first < p.keys; first += kKeys) {
        const int64_t count = p.keys - first < kKeys ? p.keys - first : kKeys;
        const bool in_place = fits && count == kKeys;
        if (p.blocks && p.block_size <= kKeys) prefetch_paged(p, first + kKeys);
        if (!in_place) {
            if (p.blocks) stage_paged(p, first, count, kt, vt, ldv);
            else stage_packed(p, first, count, kt, vt, ldv);
        }
        // Query token i sees causal_first + i keys: the tokens before `begin` see none of this tile.
        int64_t begin = 0;
        if (p.causal && first >= p.causal_first) begin = (first - p.causal_first + 1) * p.group;
        const int64_t left = rows - begin;
        float* sb = s + begin * kAStride;
        const int blocks = static_cast<int>((count + kColumns - 1) / kColumns);
        const float* at[kMaxBlocks];
        for (int j = 0; j < blocks; ++j) at[j] = in_place ? keys_at(p, first + j * kColumns) : kt + j * kColumns;
        gemm<Single>(left, q + begin * kAStride, at, blocks, in_place ? p.block_size : kKeys, p.d, sb, kAStride, false);
        for (int64_t r = begin; r < rows; ++r) {
            const int64_t visible = (p.causal ? p.causal_first + r / p.group : p.keys) - first;
            soften(s + r * kAStride, visible < count ? visible : count, blocks * kColumns, maxima[r], lanes + r * W,
                   out + r * ldv, ldv);
        }
        // Values of consecutive keys lie together as far as their block goes, or all of them where they were staged.
        for (int64_t j = 0, run; j < count; j += run) {
            run = count - j;
            if (in_place) {
                const int64_t rest = p.block_size - (first + j) % p.block_size;
                run = rest < run ? rest : run;
            }
            const float* values = in_place ? values_at(p, first + j) : vt;
            for (int i = 0; i < ldv / kColumns; ++i) at[i] = values + i * kColumns;
            gemm<Single>(left, sb + j, at, static_cast<int>(ldv / kColumns), ldv, run, out + begin * ldv, ldv, true);
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        T* to = p.out + r / p.group * p.out_token + r % p.group * p.out_head;
        const V norm = splat(1.0f / sum(load(lanes + r * W)));
        sweep(p.d, [&](int64_t i, int64_t n) { put(to + i, load(out + r * ldv + i) * norm, n); });
    }
}
