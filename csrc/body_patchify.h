// A page to patches: bicubic resize of 8-bit RGB rows, bit for bit as Pillow's Image.resize(BICUBIC) (fixed-point
// coefficients, two passes, rounded and clipped to 8 bits between them; Pillow 13, src/libImaging/Resample.c, the
// *_8bpc functions), then patch order.

typedef uint8_t Bytes __attribute__((vector_size(16)));

// Transpose a 16 x 16 block of bytes: four rounds of interleaving the first half with the second.
PM_INLINE void transpose16(Bytes (&a)[16]) {
    const Bytes low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    const Bytes high = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    for (int round = 0; round < 4; ++round) {
        Bytes b[16];
        for (int i = 0; i < 8; ++i) {
            b[2 * i] = __builtin_shuffle(a[i], a[i + 8], low);
            b[2 * i + 1] = __builtin_shuffle(a[i], a[i + 8], high);
        }
        memcpy(a, b, sizeof(b));
    }
}

// The loops below become single widening loads and narrowing stores; GCC 12 takes __builtin_convertvector
// between bytes and int32 apart, lane by lane.
PM_INLINE I load_wide(const uint8_t* src) {
    int32_t wide[W];
    for (int i = 0; i < W; ++i) wide[i] = src[i];
    I v;
    memcpy(&v, wide, sizeof(v));
    return v;
}

// Accumulators to bytes: shift, clip, narrow.
PM_INLINE void store_clipped(const I& sum, uint8_t* dst) {
    I acc = sum >> kPrecisionBits;
    acc = acc < 0 ? I{} : acc;
    acc = acc > 255 ? I{} + 255 : acc;
    int32_t wide[W];
    memcpy(wide, &acc, sizeof(acc));
    for (int i = 0; i < W; ++i) dst[i] = static_cast<uint8_t>(wide[i]);
}

// 16 interleaved RGB rows of `width` pixels to planar rows [3][width].
PM_INLINE void split_channels(const uint8_t* const (&rows)[kStrip], int width, uint8_t* dst, int64_t stride) {
    for (int r = 0; r < kStrip; ++r)
        for (int x = 0; x < width; ++x)
            for (int c = 0; c < 3; ++c)
                dst[r * stride + int64_t(c) * width + x] = rows[r][int64_t(x) * 3 + c];
}

// Resize 16 interleaved RGB rows to planar rows [3][axis.out]. Turned on their side, so that one coefficient
// meets 16 rows at once. `tile` [axis.in * 3][16] and `turned` [stride][16] are scratch.
PM_INLINE void resize_horizontal(const uint8_t* const (&rows)[kStrip], const ResizeAxis& axis, uint8_t* tile,
                                 uint8_t* turned, uint8_t* dst, int64_t stride) {
    const int64_t bytes = int64_t(axis.in) * 3;
    int64_t j = 0;
    Bytes block[16];
    for (; j + 16 <= bytes; j += 16) {
        for (int r = 0; r < 16; ++r) memcpy(&block[r], rows[r] + j, 16);
        transpose16(block);
        memcpy(tile + j * 16, block, sizeof(block));
    }
    for (; j < bytes; ++j)
        for (int r = 0; r < 16; ++r) tile[j * 16 + r] = rows[r][j];

    const I half = I{} + (1 << (kPrecisionBits - 1));
    for (int x = 0; x < axis.out; ++x) {
        const int32_t* weight = &axis.weight[int64_t(x) * axis.taps];
        const uint8_t* from = tile + int64_t(axis.first[x]) * 48;
        const int n = axis.count[x];
        for (int r = 0; r < kStrip; r += W) {
            const uint8_t* s = from + r;
            I red = half, green = half, blue = half;
            for (int t = 0; t < n; ++t, s += 48) {
                const int32_t w = weight[t];
                red += load_wide(s) * w;
                green += load_wide(s + 16) * w;
                blue += load_wide(s + 32) * w;
            }
            store_clipped(red, turned + int64_t(x) * 16 + r);
            store_clipped(green, turned + (int64_t(axis.out) + x) * 16 + r);
            store_clipped(blue, turned + (int64_t(axis.out) * 2 + x) * 16 + r);
        }
    }
    for (int64_t i = 0; i < stride; i += 16) {
        memcpy(block, turned + i * 16, sizeof(block));
        transpose16(block);
        for (int r = 0; r < 16; ++r) memcpy(dst + r * stride + i, &block[r], 16);
    }
}

// One row of `width` bytes from `count` rows at `src`, `stride` bytes apart.
PM_INLINE void resize_vertical(const uint8_t* src, int64_t stride, int64_t width, const int32_t* weight,
                               int count, uint8_t* dst) {
    const I half = I{} + (1 << (kPrecisionBits - 1));
    int64_t x = 0;
    for (; x + 4 * W <= width; x += 4 * W) {
        I a = half, b = half, c = half, d = half;
        const uint8_t* s = src + x;
        for (int t = 0; t < count; ++t, s += stride) {
            const int32_t w = weight[t];
            a += load_wide(s) * w;
            b += load_wide(s + W) * w;
            c += load_wide(s + 2 * W) * w;
            d += load_wide(s + 3 * W) * w;
        }
        store_clipped(a, dst + x);
        store_clipped(b, dst + x + W);
        store_clipped(c, dst + x + 2 * W);
        store_clipped(d, dst + x + 3 * W);
    }
    for (; x < width; ++x) {
        int32_t sum = 1 << (kPrecisionBits - 1);
        for (int t = 0; t < count; ++t) sum += src[t * stride + x] * weight[t];
        const int32_t value = sum >> kPrecisionBits;
        dst[x] = static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
    }
}

// Write one row of patches from its `patch` planar pixel rows.
template <int PATCH>
PM_INLINE void emit_patches(const PatchifyArgs& p, int grid_y, const uint8_t* band, int64_t stride) {
    const int side = PATCH ? PATCH : p.patch;
    const int grid_w = p.x.out / side;
    const int area = side * side;
    for (int grid_x = 0; grid_x < grid_w; ++grid_x) {
        const int64_t group = int64_t(grid_y / p.merge) * (grid_w / p.merge) + grid_x / p.merge;
        const int64_t index = (group * p.merge + grid_y % p.merge) * p.merge + grid_x % p.merge;
        uint8_t* dst = p.patches + index * 3 * area;
        for (int c = 0; c < 3; ++c) {
            const uint8_t* src = band + int64_t(c) * p.x.out + int64_t(grid_x) * side;
            for (int row = 0; row < side; ++row, dst += side) memcpy(dst, src + row * stride, side);
        }
    }
}

// The first pass runs ahead into a sliding window of planar rows, so that each source row is resized once.
static void patchify(const PatchifyArgs& p) {
    const ResizeAxis &ax = p.x, &ay = p.y;
    const int window_height = p.vertical_second ? ay.in : ay.out;  // rows of the image that the window slides over
    const int64_t in_stride = int64_t(ax.in) * 3, stride = p.stride;
    int base = p.first_row(0), next = base;  // the window holds rows [base, next)

    for (int g = 0; g < ay.out / p.patch; ++g) {
        const int lo = p.first_row(g * p.patch), hi = p.end_row(g * p.patch + p.patch - 1);
        const int kept = next > lo ? next - lo : 0;
        memmove(p.window, p.window + (next - kept - base) * stride, kept * stride);
        base = lo;
        next = lo + kept;
        for (; next < hi; next += kStrip) {
            uint8_t* dst = p.window + (next - base) * stride;
            const uint8_t* rows[kStrip];
            for (int r = 0; r < kStrip; ++r) {
                const int y = next + r < window_height ? next + r : window_height - 1;  // past the last: never used
                if (p.vertical_first) {
                    uint8_t* row = p.block + r * in_stride;
                    resize_vertical(p.rgb + ay.first[y] * in_stride, in_stride, in_stride,
                                    ay.weight + int64_t(y) * ay.taps, ay.count[y], row);
                    rows[r] = row;
                } else {
                    rows[r] = p.rgb + y * in_stride;
                }
            }
            if (ax.in == ax.out) split_channels(rows, ax.in, dst, stride);
            else resize_horizontal(rows, ax, p.tile, p.turned, dst, stride);
        }
        const uint8_t* ready = p.window;  // the band's rows; without a second pass, those of the window
        if (p.vertical_second) {
            for (int row = 0; row < p.patch; ++row) {
                const int y = g * p.patch + row;
                resize_vertical(p.window + (ay.first[y] - base) * stride, stride, stride,
                                ay.weight + int64_t(y) * ay.taps, ay.count[y], p.band + row * stride);
            }
            ready = p.band;
        }
        if (p.patch == 14) emit_patches<14>(p, g, ready, stride);
        else emit_patches<0>(p, g, ready, stride);
    }
}
