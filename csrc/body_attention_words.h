// Attention in bfloat16 by the dot products of pairs: the tile of body_attention.h where the machine has them.
//
// Keys are taken in pairs along head_dim, values and weights in pairs along keys, so that both products run over steps of
// one word. The cache keeps its layout: two rows of it are woven together in registers, either where they are used (few
// rows of queries: every byte of the cache is read once) or once into staging (many rows). Either way a score is one chain over
// head_dim, and an output one chain over keys. Weights are rounded to bfloat16 for the product, as in FlashAttention;
// their sum takes them unrounded.
#if defined(PM_AVX512BF16)

typedef uint32_t Word;  // a pair of bfloat16, the lower half first
constexpr int kTileRows = 12;
constexpr int kWords = 128;             // of a row of queries (head_dim <= 256)
constexpr int kWordStride = kWords + 16;  // not a multiple of 512 bytes: rows would fall on one another in the cache
constexpr int kRowsInPlace = 36;        // up to so many rows it is cheaper to weave every time than to stage
constexpr int kVectors = kKeys / W;     // of a tile of scores
constexpr int kMostAt = 256 / W * kVectors;
// Output vectors of head_dim <= 256 for runs of 16 keys, or key vectors: pointers that a product steps along.
constexpr int columns_of(int rows) { return rows <= 6 ? 4 : 2; }

PM_INLINE __m512i weave(__m256i low, __m256i high) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, _mm512_inserti64x4(_mm512_zextsi256_si512(low), high, 1));
}
PM_INLINE V widen_int8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

// One step of b: W pairs. Staged: words as they lie. In the cache: rows p and p + stride, int8 is exact in bfloat16.
PM_INLINE V step_of(const Word* p, int64_t) { return load_bits(p); }
PM_INLINE V step_of(const bf16* p, int64_t stride) {
    return (V)weave(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
                    _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + stride)));
}
PM_INLINE V step_of(const int8_t* p, int64_t stride) {
    const __m512i low = _mm512_srli_epi32((__m512i)widen_int8(p), 16), high = (__m512i)widen_int8(p + stride);
    return (V)_mm512_mask_blend_epi16(0xaaaaaaaa, low, high);
}

// Where b lies: `runs` stretches of `steps` steps each, `columns` vectors wide: run i of column j begins at
// at[i * columns + j]. ahead: as at, of the tile after this one, which is asked for on the way.
template <class B>
struct Operand {
    const B* const* at;
    const B* const* ahead;
    int64_t columns, runs, steps;
    int64_t stride;        // from row to row
    int64_t ahead_stride;  // from what an even column asks for to what an odd one does: they share lines of cache
};

// c[R][C * W] (+)= a b for the columns from `column` on.
template <class B, int R, int C>
static void word_tile(const Word* a, const Operand<B>& b, int64_t column, float* c, int64_t ldc, bool accumulate) {
    constexpr bool staged = sizeof(B) == sizeof(Word);
    V acc[R][C];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int j = 0; j < C; ++j) acc[r][j] = accumulate ? load(c + r * ldc + j * W) : V{};
    for (int64_t i = column; i < b.runs * b.columns; i += b.columns) {
        const B *at[C], *ahead[C];
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) {
            at[j] = b.at[i + j];
            if constexpr (!staged) ahead[j] = b.ahead[i + j] + j % 2 * b.ahead_stride;
        }
        const int64_t move = staged ? b.stride : 2 * b.stride;
        for (int64_t k = 0; k < b.steps; ++k) {
            V row[C];
#pragma GCC unroll 4
            for (int j = 0; j < C; ++j) {
                row[j] = step_of(at[j], b.stride);
                at[j] += move;
                if constexpr (!staged) {
                    __builtin_prefetch(ahead[j], 0, 2);
                    ahead[j] += move;
                }
            }
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int j = 0; j < C; ++j) acc[r][j] = multiply_add(a[r * kWordStride], row[j], acc[r][j]);
            ++a;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int j = 0; j < C; ++j) store(c + r * ldc + j * W, acc[r][j]);
}

template <class B, int R>
static void word_rows(const Word* a, const Operand<B>& b, float* c, int64_t ldc, bool accumulate) {
    constexpr int C = columns_of(R);
    int64_t j = 0;
    for (; j + C <= b.columns; j += C) word_tile<B, R, C>(a, b, j, c + j * W, ldc, accumulate);
    for (; j < b.columns; ++j) word_tile<B, R, 1>(a, b, j, c + j * W, ldc, accumulate);
}

// c[rows][columns * W] (+)= a b, rows <= kTileRows, those of a kWordStride apart.
template <class B>
__attribute__((noinline)) static void product(int64_t rows, const Word* a, const Operand<B>& b, float* c, int64_t ldc,
                                              bool accumulate) {
#define PM_ROWS(n) \
    case n: word_rows<B, n>(a, b, c, ldc, accumulate); break
    switch (rows) {
        PM_ROWS(1); PM_ROWS(2); PM_ROWS(3); PM_ROWS(4); PM_ROWS(5); PM_ROWS(6);
        PM_ROWS(7); PM_ROWS(8); PM_ROWS(9); PM_ROWS(10); PM_ROWS(11); PM_ROWS(12);
    }
#undef PM_ROWS
}

PM_INLINE __m256i take_bf16(const bf16* p, int64_t n) {
    return _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
}
PM_INLINE __m256i take_bf16(const int8_t* p, int64_t n) {
    const __m128i bytes = _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << n) - 1), p);
    return (__m256i)_mm512_cvtneps_pbh(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
}

// to[i] = the pair of low[i] and high[i], or of low[i] and 0 where high is null, for n elements.
template <class C>
PM_INLINE void weave_rows(Word* to, const C* low, const C* high, int64_t n) {
    for (int64_t i = 0; i < n; i += W) {
        const int64_t width = n - i < W ? n - i : W;
        const __m256i second = high ? take_bf16(high + i, width) : _mm256_setzero_si256();
        _mm512_mask_storeu_epi32(to + i, static_cast<__mmask16>((1u << width) - 1),
                                 weave(take_bf16(low + i, width), second));
    }
}

// kt[pair of dimensions][kKeys] and vt[pair of keys][ldv]. Lanes of kt past count and columns of vt past d stay as they are.
template <class C>
PM_KERNEL void stage_words(const AttentionArgs<bf16, C>& p, int64_t first, int64_t count, Word* kt, Word* vt,
                           int64_t ldv) {
    if (p.blocks) {
        for (int64_t j = 0, run; j < count; j += run) {
            const int64_t rest = p.block_size - (first + j) % p.block_size;
            run = rest < count - j ? rest : count - j;
            const C* k = keys_at(p, first + j);
            for (int64_t i = 0; i < p.d; i += 2)
                weave_rows(kt + i / 2 * kKeys + j, k + i * p.block_size,
                           i + 1 < p.d ? k + (i + 1) * p.block_size : nullptr, run);
        }
    } else {
        for (int64_t j = 0; j < count; j += W) {
            for (int64_t i = 0; i < p.d; i += 2 * W) {
                const int64_t width = p.d - i < 2 * W ? p.d - i : 2 * W;
                const __mmask32 mask = width < 32 ? (1u << width) - 1 : ~0u;
                V rows[W];
                for (int r = 0; r < W; ++r)
                    rows[r] = j + r < count ? (V)_mm512_maskz_loadu_epi16(mask, p.k + (first + j + r) * p.k_key + i) : V{};
                transpose(rows);
                for (int64_t r = 0; 2 * r < width; ++r)
                    store(reinterpret_cast<float*>(kt + (i / 2 + r) * kKeys + j), rows[r]);
            }
        }
    }
    for (int64_t j = 0; j < count; j += 2)
        weave_rows(vt + j / 2 * ldv, values_at(p, first + j), j + 1 < count ? values_at(p, first + j + 1) : nullptr, p.d);
}

// 2^x to 6e-5 relative, a fifteenth of what rounding the weight to bfloat16 costs. Exactly 1 at 0; 0 far below.
PM_INLINE V exp2_coarse(V x) {
    const V f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x)
    V p = splat(0.0770670511829959f);
    p = fma(p, f, splat(0.22764498119090026f));
    p = fma(p, f, splat(0.695116788669706f));
    p = fma(p, f, splat(1.0f));
    return _mm512_scalef_ps(p, x);  // p 2^floor(x)
}

// One tile of scores s[kKeys] of one row to weights, of which `valid` >= 1 are not 0. Maxima are of the scores times
// factor, log2(e) included. The output moves to a new maximum only where weights would pass 2^8: they only have to stay finite.
template <bool kScaled>
PM_INLINE void soften_words(const float* s, Word* weights, int64_t valid, const V* factor, const V* value_scale,
                            float& maximum, float* lanes, float* out, int64_t ldv) {
    V v[kVectors];
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) v[j] = load(s + j * W) * factor[kScaled ? j : 0];
    if (valid < kKeys)
#pragma GCC unroll 16
        for (int j = 0; j < kVectors; ++j)
            v[j] = iota() < static_cast<int32_t>(valid - j * W) ? v[j] : splat(-std::numeric_limits<float>::infinity());
    V best = v[0];
#pragma GCC unroll 16
    for (int j = 1; j < kVectors; ++j) best = max(v[j], best);
    const float top = _mm512_reduce_max_ps(best);
    if (!(top <= maximum + 8.0f)) {
        const V rescale = exp2_coarse(splat(maximum - top));
        store(lanes, load(lanes) * rescale);
        for (int64_t i = 0; i < ldv; i += W) store(out + i, load(out + i) * rescale);
        maximum = top;
    }
    const V shift = splat(maximum);
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) v[j] = exp2_coarse(v[j] - shift);
    V total = v[0];
#pragma GCC unroll 16
    for (int j = 1; j < kVectors; ++j) total += v[j];
    store(lanes, load(lanes) + total);
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; j += 2) {
        const V low = kScaled ? v[j] * value_scale[j] : v[j], high = kScaled ? v[j + 1] * value_scale[j + 1] : v[j + 1];
        _mm512_storeu_si512(weights + j * W / 2, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
}

// The pointers that an operand in the cache steps along for the tile at key `first`. Past the last key they stay with it.
template <class C>
PM_INLINE void find_keys(const AttentionArgs<bf16, C>& p, int64_t first, const C** at) {
    for (int64_t j = 0; j < kVectors; ++j) {
        const int64_t key = first + j * W;
        at[j] = keys_at(p, key < p.keys ? key : first);
    }
}
template <class C>
PM_INLINE void find_values(const AttentionArgs<bf16, C>& p, int64_t first, int64_t run, const C** at) {
    const int64_t columns = p.d / W;
    for (int64_t j = 0; j < kKeys; j += run) {
        const C* v = values_at(p, first + j < p.keys ? first + j : first);
        for (int64_t i = 0; i < columns; ++i) *at++ = v + i * W;
    }
}

template <class C>
PM_INLINE void fetch(const C* p, int64_t n) {
    for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(C))) __builtin_prefetch(p + i, 0, 2);
    __builtin_prefetch(p + n - 1, 0, 2);
}

// Asks for row r of packed queries, keys and values of the next item: their rows lie a page of memory apart, and the
// machine does not see them coming.
template <class C>
PM_INLINE void fetch_row(const AttentionArgs<bf16, C>& p, const AttentionArgs<bf16, C>& next, int64_t r) {
    if (r < next.tokens) fetch(next.q + r * next.q_token, next.d);
    if (r >= next.keys || next.k == p.k) return;
    fetch(next.k + r * next.k_key, next.d);
    fetch(next.v + r * next.v_key, next.d);
}

// As FloatTile, in pairs of bfloat16.
template <class C>
struct WordTile {
    static constexpr float kUnit = 0.693147180559945f;  // of the maxima, in logarithms to base 2
    Word *q, *weights, *kt, *vt;
    float *s, *out, *lanes, *maxima;
    int64_t ldv;
    const AttentionArgs<bf16, C>* next;

    static int64_t floats(const AttentionArgs<bf16, C>& p) {
        const int64_t rows = p.tokens * p.group, columns = (p.d + W - 1) / W * W;
        return (rows + kTileRows) * kWordStride + (p.d + 1) / 2 * kKeys + kKeys / 2 * columns + kTileRows * kKeys +
               rows * (columns + W + 1);
    }
    void begin(const AttentionArgs<bf16, C>& p, const AttentionArgs<bf16, C>* after, float* memory) {
        next = after;
        const int64_t rows = p.tokens * p.group;
        ldv = (p.d + W - 1) / W * W;
        q = reinterpret_cast<Word*>(memory);
        weights = q + rows * kWordStride;
        kt = weights + kTileRows * kWordStride;
        vt = kt + (p.d + 1) / 2 * kKeys;
        s = reinterpret_cast<float*>(vt + kKeys / 2 * ldv);
        out = s + kTileRows * kKeys;
        lanes = out + rows * ldv;
        maxima = lanes + rows * W;
        for (int64_t r = 0; r < rows; ++r) {
            const bf16* from = p.q + r / p.group * p.q_token + r % p.group * p.q_head;
            bf16* to = reinterpret_cast<bf16*>(q + r * kWordStride);
            memcpy(to, from, p.d * sizeof(bf16));
            if (p.d % 2) to[p.d].bits = 0;
        }
    }

    void tile(const AttentionArgs<bf16, C>& p, int64_t first, int64_t count) {
        constexpr bool scaled = sizeof(C) == 1;
        V factor[scaled ? kVectors : 1], value_scale[scaled ? kVectors : 1];
        factor[0] = splat(p.scale * 1.44269504088896f);
        if constexpr (scaled) {
            float keys[kKeys], values[kKeys];
            find_scales(p, first, count, keys, values);
            const V unit = factor[0];
            for (int j = 0; j < kVectors; ++j) {
                factor[j] = unit * load(keys + j * W);
                value_scale[j] = load(values + j * W);
            }
        }
        const int64_t left = p.tokens * p.group - first_row(p, first);
        if (p.blocks && left <= kRowsInPlace && count == kKeys && p.block_size % W == 0 && p.d % W == 0) {
            const C *keys[2 * kVectors], *values[2 * kMostAt];
            const int64_t run = p.block_size % kKeys == 0 ? kKeys : p.block_size % (2 * W) == 0 ? 2 * W : W;
            find_keys(p, first, keys);
            const bool crosses = first + kKeys >= p.keys && next && next->blocks;
            const auto& following = crosses ? *next : p;
            const int64_t at = crosses ? next->first_key : first + kKeys < p.keys ? first + kKeys : first;
            find_keys(following, at, keys + kVectors);
            find_values(p, first, run, values);
            find_values(following, at, run, values + kMostAt);
            const Operand<C> k{keys, keys + kVectors, kVectors, 1, p.d / 2, p.block_size,
                               p.block_size == W ? 0 : p.block_size};
            const Operand<C> v{values, values + kMostAt, p.d / W, kKeys / run, run / 2, p.d, p.d};
            multiply(p, first, count, k, v, factor, value_scale);
        } else {
            if (first + kKeys < p.keys) prefetch_paged(p, first + kKeys);
            else if (next) prefetch_paged(*next, next->first_key);
            stage_words(p, first, count, kt, vt, ldv);
            const Word *keys[kVectors], *values[256 / W];
            for (int j = 0; j < kVectors; ++j) keys[j] = kt + j * W;
            for (int j = 0; j < ldv / W; ++j) values[j] = vt + j * W;
            const Operand<Word> k{keys, nullptr, (count + W - 1) / W, 1, (p.d + 1) / 2, kKeys, 0};
            const Operand<Word> v{values, nullptr, ldv / W, 1, (count + 1) / 2, ldv, 0};
            multiply(p, first, count, k, v, factor, value_scale);
        }
    }

    // Scores, weights and output, few rows at a time: what lies between the products stays in the nearest cache.
    template <class B>
    void multiply(const AttentionArgs<bf16, C>& p, int64_t first, int64_t count, const Operand<B>& k,
                            const Operand<B>& v, const V* factor, const V* value_scale) {
        const int64_t begin = first_row(p, first), left = p.tokens * p.group - begin;
        const int64_t tiles = (left + kTileRows - 1) / kTileRows;
        const bool fetch = !p.blocks && next && first + kKeys >= p.keys;
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t row = begin + left * t / tiles, rows = begin + left * (t + 1) / tiles - row;
            float* o = out + row * ldv;
            product(rows, q + row * kWordStride, k, s, kKeys, false);
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t seen = visible(p, row + r) - first;
                if (fetch) fetch_row(p, *next, row + r);
                soften_words<sizeof(C) == 1>(s + r * kKeys, weights + r * kWordStride, seen < count ? seen : count,
                                             factor, value_scale, maxima[row + r], lanes + (row + r) * W, o + r * ldv, ldv);
            }
            product(rows, weights, v, o, ldv, true);
        }
    }
};
#endif
