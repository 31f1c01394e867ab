// Vectors of W floats as GCC vector extensions, so that one source serves every instruction set; intrinsics only where
// the extensions have no word for it (fma, masked loads).
//
// Multiplications and additions are never contracted by the compiler (-ffp-contract=off): where one rounding is
// wanted fma says so, and the vector body, its tail and every unrolled form of a loop round alike.

constexpr int W = PM_WIDTH;
typedef float V __attribute__((vector_size(4 * PM_WIDTH)));
typedef float VLoose __attribute__((vector_size(4 * PM_WIDTH), aligned(4), may_alias));
typedef int32_t I __attribute__((vector_size(4 * PM_WIDTH)));
typedef uint32_t U __attribute__((vector_size(4 * PM_WIDTH)));
typedef uint16_t S __attribute__((vector_size(2 * PM_WIDTH)));
typedef uint16_t SLoose __attribute__((vector_size(2 * PM_WIDTH), aligned(2), may_alias));

typedef int8_t B __attribute__((vector_size(PM_WIDTH)));
typedef int8_t BLoose __attribute__((vector_size(PM_WIDTH), aligned(1), may_alias));

#define PM_INLINE static inline __attribute__((always_inline))
#define PM_KERNEL static __attribute__((flatten))  // inlines the lambdas given to sweep

PM_INLINE V load(const float* p) { return *reinterpret_cast<const VLoose*>(p); }
PM_INLINE void store(float* p, V v) { *reinterpret_cast<VLoose*>(p) = v; }

PM_INLINE V widen(S bits) {
    // GCC 12 takes __builtin_convertvector of 16 lanes apart. (The maskless intrinsics warn of undefined values.)
#if defined(PM_AVX512)
    return reinterpret_cast<V>((U)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)bits) << 16);
#else
    return reinterpret_cast<V>(__builtin_convertvector(bits, U) << 16);
#endif
}

// Round to nearest even; a NaN stays a NaN. (The instruction takes numbers below 1.2e-38 for zero.)
PM_INLINE S narrow(V v) {
#if defined(PM_AVX512BF16)
    return (S)_mm512_cvtneps_pbh(v);
#else
    const U u = reinterpret_cast<U>(v);
    const U rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    const U quiet = (u >> 16) | 0x40;
    return __builtin_convertvector(v == v ? rounded : quiet, S);
#endif
}

PM_INLINE V load(const bf16* p) { return widen(*reinterpret_cast<const SLoose*>(p)); }
PM_INLINE V load(const int8_t* p) { return __builtin_convertvector(*reinterpret_cast<const BLoose*>(p), V); }
// Rounds to nearest even; v within -127..127.
PM_INLINE void store(int8_t* p, V v) {
    const V shifter = V{} + 12582912.0f;  // 1.5 * 2^23
    *reinterpret_cast<BLoose*>(p) = __builtin_convertvector(__builtin_convertvector(v + shifter - shifter, I), B);
}
PM_INLINE void store(bf16* p, V v) { *reinterpret_cast<SLoose*>(p) = narrow(v); }

PM_INLINE V splat(float x) {
#if defined(PM_AVX512)
    return _mm512_set1_ps(x);
#elif defined(PM_AVX2)
    return _mm256_set1_ps(x);
#else
    return V{x, x, x, x};
#endif
}

PM_INLINE V fma(V a, V b, V c) {
#if defined(PM_AVX512)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(PM_AVX2)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

PM_INLINE V max(V a, V b) { return a > b ? a : b; }

// The first n (1..W-1) elements, zeros after them; memory past them is not touched.
template <class T>
PM_INLINE V load_n(const T* p, int64_t n) {
#if defined(PM_AVX512)
    const __mmask16 mask = static_cast<__mmask16>((1u << n) - 1);
    if constexpr (sizeof(T) == 4) return _mm512_maskz_loadu_ps(mask, p);
    else if constexpr (sizeof(T) == 1)
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, p)));
    else return widen(reinterpret_cast<S>(_mm256_maskz_loadu_epi16(mask, p)));
#else
    alignas(64) T buffer[W] = {};
    for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
    return load(buffer);
#endif
}

template <class T>
PM_INLINE void store_n(T* p, V v, int64_t n) {
#if defined(PM_AVX512)
    const __mmask16 mask = static_cast<__mmask16>((1u << n) - 1);
    if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, mask, v);
    else if constexpr (sizeof(T) == 1) _mm_mask_storeu_epi8(p, mask, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
    else _mm256_mask_storeu_epi16(p, mask, reinterpret_cast<__m256i>(narrow(v)));
#else
    alignas(64) T buffer[W];
    store(buffer, v);
    for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
#endif
}

// Calls body(i, n) for runs of W elements, then for the n < W that are left; body picks load or load_n by n.
template <class F>
PM_INLINE void sweep(int64_t n, F body) {
    int64_t i = 0;
    for (; i + W <= n; i += W) body(i, W);
    if (i < n) body(i, n - i);
}
template <class T>
PM_INLINE V take(const T* p, int64_t n) { return n == W ? load(p) : load_n(p, n); }
template <class T>
PM_INLINE void put(T* p, V v, int64_t n) {
    if (n == W) store(p, v);
    else store_n(p, v, n);
}

// Lane indices 0..W-1.
PM_INLINE I iota() {
    I v;
    for (int i = 0; i < W; ++i) v[i] = i;
    return v;
}

// In place: rows[i] lane j <-> rows[j] lane i.
PM_INLINE void transpose(V* rows) {
#pragma GCC unroll 4
    for (int s = 1; s < W; s *= 2) {
        I low, high;  // of a pair of rows s apart, exchange the off-diagonal s x s squares
        for (int i = 0; i < W; ++i) {
            low[i] = i & s ? W + i - s : i;
            high[i] = i & s ? W + i : i + s;
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
            if (i & s) continue;
            const V a = rows[i], b = rows[i + s];
            rows[i] = __builtin_shuffle(a, b, low);
            rows[i + s] = __builtin_shuffle(a, b, high);
        }
    }
}

// Sums the lanes as a balanced tree.
PM_INLINE float sum(V v) {
    for (int half = W / 2; half; half /= 2) v += __builtin_shuffle(v, (iota() + half) & (W - 1));
    return v[0];
}

PM_INLINE float highest(V v) {
    for (int half = W / 2; half; half /= 2) v = max(v, __builtin_shuffle(v, (iota() + half) & (W - 1)));
    return v[0];
}

// e^x to about 1 ulp: exactly 1 at 0, 0 below -87.3 (-inf too), saturating above 88.3; NaN stays NaN.
PM_INLINE V exp(V x) {
    const V bounded = x > splat(88.37f) ? splat(88.37f) : x;
    const V shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const V shifted = fma(bounded, splat(1.44269504088896f), shifter);
    const V n = shifted - shifter;
    V r = fma(n, splat(-0.693145751953125f), bounded);
    r = fma(n, splat(-1.42860682030941723e-6f), r);
    V p = splat(1.9875691500e-4f);  // Cephes expf
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r) + 1.0f;
    const I exponent = (reinterpret_cast<I>(shifted) + 127) << 23;
    const V result = p * reinterpret_cast<V>(exponent);
    return x < splat(-87.33f) ? V{} : result;
}
