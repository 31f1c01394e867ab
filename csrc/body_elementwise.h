// Row and element kernels; T is float or bf16, arithmetic is float32.

PM_INLINE V round_to(float, V v) { return v; }
PM_INLINE V round_to(bf16, V v) { return widen(narrow(v)); }

template <class T>
PM_KERNEL void rms_norm(const NormArgs<T>& p, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const T* x = p.x + row * p.ldx;
        V even = {}, odd = {};  // of the squares of every other W elements
        int64_t i = 0;
        for (; i + 2 * W <= p.h; i += 2 * W) {
            const V first = take(x + i, W), second = take(x + i + W, W);
            even = fma(first, first, even);
            odd = fma(second, second, odd);
        }
        if (i + W <= p.h) {
            const V v = take(x + i, W);
            even = fma(v, v, even);
            i += W;
            if (i < p.h) {
                const V last = take(x + i, p.h - i);
                odd = fma(last, last, odd);
            }
        } else if (i < p.h) {
            const V last = take(x + i, p.h - i);
            even = fma(last, last, even);
        }
        const V scale = splat(1.0f / sqrtf(sum(even + odd) / static_cast<float>(p.h) + p.eps));
        T* out = p.out + row * p.h;
        sweep(p.h, [&](int64_t i, int64_t n) {
            put(out + i, take(p.weight + i, n) * round_to(T{}, take(x + i, n) * scale), n);
        });
    }
}

template <class T>
PM_KERNEL void swiglu(const T* gate_up, int64_t ld, T* out, int64_t width, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const T *gate = gate_up + row * ld, *up = gate + width;
        T* o = out + row * width;
        sweep(width, [&](int64_t i, int64_t n) {
            const V g = take(gate + i, n);
            put(o + i, g / (1.0f + exp(-g)) * take(up + i, n), n);
        });
    }
}

// x Phi(x), with erfc to 1.2e-7 relative (Press et al., Numerical Recipes, 6.2): the left tail keeps its digits.
template <class T>
PM_KERNEL void gelu(const T* x, T* out, int64_t begin, int64_t end) {
    sweep(end - begin, [&](int64_t i, int64_t n) {
        const V v = take(x + begin + i, n);
        const V z = (v < 0.0f ? -v : v) * 0.70710678118654752f;
        const V t = 1.0f / (1.0f + 0.5f * z);
        V p = splat(0.17087277f);
        p = fma(p, t, splat(-0.82215223f));
        p = fma(p, t, splat(1.48851587f));
        p = fma(p, t, splat(-1.13520398f));
        p = fma(p, t, splat(0.27886807f));
        p = fma(p, t, splat(-0.18628806f));
        p = fma(p, t, splat(0.09678418f));
        p = fma(p, t, splat(0.37409196f));
        p = fma(p, t, splat(1.00002368f));
        p = fma(p, t, splat(-1.26551223f));
        const V half_erfc = 0.5f * t * exp(fma(-z, z, p));
        put(out + begin + i, v * (v < 0.0f ? half_erfc : 1.0f - half_erfc), n);
    });
}

// codes[i] = round(x[i] / scale) with scale = max |x| / 127: symmetric, from this vector alone. Returns the scale.
template <class T>
PM_INLINE float quantise(const T* x, int64_t n, int8_t* codes) {
    V most = {};
    sweep(n, [&](int64_t i, int64_t count) {
        const V v = take(x + i, count);
        most = max(v < 0.0f ? -v : v, most);
    });
    const float top = highest(most);
    const V inverse = splat(top > 1e-30f ? 127.0f / top : 0.0f);
    sweep(n, [&](int64_t i, int64_t count) { put(codes + i, take(x + i, count) * inverse, count); });
    return top > 1e-30f ? top / 127.0f : 0.0f;
}

template <class T>
PM_KERNEL void rotary(const RotaryArgs<T>& p, int64_t begin, int64_t end) {
    const int64_t half = p.d / 2;
    for (int64_t t = begin; t < end; ++t) {
        const float *cos = p.cos + t * p.angle_stride, *sin = p.sin + t * p.angle_stride;
        T* token = p.x + t * p.token_stride;
        for (int64_t h = 0; h < p.heads + p.kv_heads; ++h) {
            T* x = token + h * p.head_stride;
            sweep(half, [&](int64_t i, int64_t n) {
                const V first = take(x + i, n), second = take(x + half + i, n);
                const V c = take(cos + i, n), s = take(sin + i, n);
                put(x + i, first * c - second * s, n);
                put(x + half + i, second * c + first * s, n);
            });
        }
        if (!p.slots || p.slots[t] < 0) continue;
        const int64_t block = p.slots[t] / p.block_size, offset = p.slots[t] % p.block_size;
        for (int64_t h = 0; h < p.kv_heads; ++h) {
            const T* k = token + (p.heads + h) * p.head_stride;
            const T* v = k + p.kv_heads * p.head_stride;
            const int64_t base = (block * p.kv_heads + h) * p.d * p.block_size;
            if (p.k_codes) {
                const int64_t at = (block * p.kv_heads + h) * p.block_size + offset;
                int8_t codes[256];
                p.k_scale[at] = quantise(k, p.d, codes);
                for (int64_t i = 0; i < p.d; ++i) p.k_codes[base + i * p.block_size + offset] = codes[i];
                p.v_scale[at] = quantise(v, p.d, p.v_codes + base + offset * p.d);
                continue;
            }
            for (int64_t i = 0; i < p.d; ++i) p.k_cache[base + i * p.block_size + offset] = k[i];
            memcpy(p.v_cache + base + offset * p.d, v, p.d * sizeof(T));
        }
    }
}

template <class T>
PM_KERNEL void pixel_values(const PixelArgs<T>& p, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const uint8_t* from = p.patches + p.order[row] * p.channels * p.area;
        T* to = p.out + row * p.channels * p.moments * p.area;
        for (int64_t c = 0; c < p.channels; ++c, from += p.area, to += p.moments * p.area) {
            const T* levels = p.levels + c * 256;
            for (int64_t i = 0; i < p.area; ++i) to[i] = levels[from[i]];
            // A still page is the same at every moment.
            for (int64_t t = 1; t < p.moments; ++t) memcpy(to + t * p.area, to, p.area * sizeof(T));
        }
    }
}

// Lanes whose bit is set in `mask`, from bit i on; W divides 32, so that they lie in one word.
PM_INLINE I allowed(const uint32_t* mask, int64_t i) {
    return ((I{} + static_cast<int32_t>(mask[i / 32] >> (i % 32))) >> iota() & 1) != 0;
}

// `mask` may be null: everything is allowed.
PM_KERNEL void greedy(const float* row, const uint32_t* mask, int64_t n, int64_t* token, float* logprob) {
    const float inf = std::numeric_limits<float>::infinity();
    V best = splat(-inf), best_allowed = splat(-inf);
    I nan = {};
    sweep(n, [&](int64_t i, int64_t count) {
        V v = take(row + i, count);
        if (count < W) v = iota() < static_cast<int32_t>(count) ? v : splat(-inf);
        nan |= v != v;
        best = max(v, best);
        if (mask) best_allowed = max(allowed(mask, i) ? v : splat(-inf), best_allowed);
    });
    bool any_nan = false;
    for (int i = 0; i < W; ++i) any_nan |= nan[i] != 0;
    const float top = highest(best), choice = mask ? highest(best_allowed) : top;
    const auto is_choice = [&](int64_t i) {
        if (any_nan) return row[i] != row[i];
        return row[i] == choice && (!mask || (mask[i / 32] >> (i % 32) & 1));
    };
    int64_t at = 0;
    while (at < n && !is_choice(at)) ++at;
    *token = at < n ? at : -1;
    V total = {};
    sweep(n, [&](int64_t i, int64_t count) {
        V v = take(row + i, count);
        if (count < W) v = iota() < static_cast<int32_t>(count) ? v : splat(-inf);
        total += exp(v - top);
    });
    *logprob = any_nan ? std::numeric_limits<float>::quiet_NaN() : at < n ? choice - top - logf(sum(total)) : -inf;
}
