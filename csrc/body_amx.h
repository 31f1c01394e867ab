// Linear layers on the tile unit. Tiles 0-3 are sums of 16 features, 4 and 5 rows of x, 6 and 7 weights, read where they
// lie: 16 rows of k of half a panel, 128 bytes apart.
//
// A block is two tiles of rows by one panel, so that four loads feed four products; of at most 16 rows, it is one tile
// of rows by two panels. Every element of the result is a chain over k in steps of a tile: a row of a product
// depends on that row of x alone, so a row's bits do not depend on the rows around it.
//
// What bounds it, counted, for Sapphire Rapids (a product takes 16 cycles, a load 8, a store 16): a step of a block is
// 64 cycles of products and 4 KB of loads, 2 KB of them, the rows of x, from the L2 cache, 32 bytes a cycle of the about 48
// that it gives. For the panel's piece to stay in the L1 cache while all rows pass, both pieces and the sums must fit its
// 48 KB: kPieceSteps. Sums that come and go between pieces cost at most 96 cycles of 640. An item of 256 rows
// by 16 panels draws 6 bytes a cycle from beyond the L2 cache, and its sums take 512 KB of it.

#include "body_simd.h"
#include "body_gemm.h"
#include "body_linear.h"
#include "body_tiles.h"

constexpr Blocking kTileBlocking{256, 16};
constexpr int64_t kTileRows = 16, kTileBytes = 64;
constexpr int64_t kStepStride = kPanel * 4;                  // of a panel's rows: bytes
constexpr int64_t kStepBytes = kTileRows * kStepStride;      // of a panel, a step
constexpr int64_t kPieceSteps = 10;                          // of k, for all panels and rows of an item
constexpr int64_t kSumsSize = 4 * kTileRows * kTileRows;     // floats of a block
constexpr int64_t kTileFloats = kTileRows * kTileBytes / 4;  // of a staged tile of x

struct Bf16Products {
    template <int C, int A, int B>
    PM_INLINE void add() { tile_dot_bf16<C, A, B>(); }
};

// A thread's tiles: their sizes are set when they change, and given back at the end, so that the system need not save them.
class Tiles {
public:
    void configure(int64_t rows) {
        if (rows == rows_) return;
        TileConfig config;
        for (int t = 0; t < 8; ++t) {
            config.rows[t] = static_cast<uint8_t>(t < 6 ? rows : kTileRows);
            config.row_bytes[t] = kTileBytes;
        }
        tile_configure(config);
        rows_ = rows;
    }
    ~Tiles() { tile_release(); }

private:
    int64_t rows_ = 0;
};

// The rows of an item in tiles of one height, one or an even count of them. The last may begin before the one above it
// ends: rows in both come out the same, and are written once.
struct RowTiles {
    int64_t rows, count, height;
    explicit RowTiles(int64_t all)
        : rows(all), count(all <= kTileRows ? 1 : (all + 31) / 32 * 2), height((all + count - 1) / count) {}
    int64_t start(int64_t t) const { return t * height < rows - height ? t * height : rows - height; }
    int64_t first_written(int64_t t) const { return t * height; }
    int64_t written(int64_t t) const {
        const int64_t left = rows - t * height;
        return left < height ? left : height;
    }
};

// Sums of a block += `steps` tiles of k. Two tiles of rows, a0 and a1, by the panel b0; or, not `pair`, a0 by b0 and b1.
template <class Products, bool pair>
PM_INLINE void multiply(const char* a0, const char* a1, int64_t lda, const char* b0, const char* b1, int64_t steps) {
#pragma GCC unroll 1
    for (int64_t s = 0; s < steps; ++s) {
        tile_load<6>(b0, kStepStride);
        tile_load<4>(a0, lda);
        Products::template add<0, 4, 6>();
        tile_load<7>(b0 + kTileBytes, kStepStride);
        Products::template add<1, 4, 7>();
        if constexpr (pair) {
            tile_load<5>(a1, lda);
            Products::template add<2, 5, 6>();
            Products::template add<3, 5, 7>();
            a1 += kTileBytes;
        } else {
            tile_load<6>(b1, kStepStride);
            Products::template add<2, 4, 6>();
            tile_load<7>(b1 + kTileBytes, kStepStride);
            Products::template add<3, 4, 7>();
            b1 += kStepBytes;
        }
        a0 += kTileBytes;
        b0 += kStepBytes;
    }
}

PM_INLINE void zero_sums() {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
}
// Four tiles, one after the other.
PM_INLINE void load_sums(const float* from) {
    tile_load<0>(from, kTileBytes);
    tile_load<1>(from + kSumsSize / 4, kTileBytes);
    tile_load<2>(from + kSumsSize / 2, kTileBytes);
    tile_load<3>(from + kSumsSize / 4 * 3, kTileBytes);
}
PM_INLINE void store_sums(float* to) {
    tile_store<0>(to, kTileBytes);
    tile_store<1>(to + kSumsSize / 4, kTileBytes);
    tile_store<2>(to + kSumsSize / 2, kTileBytes);
    tile_store<3>(to + kSumsSize / 4 * 3, kTileBytes);
}
// Rows of a panel's 32 features: those of tiles 0 and 1, then those of 2 and 3.
PM_INLINE void store_rows(float* to) {
    tile_store<0>(to, kPanel * 4);
    tile_store<1>(to + kTileRows, kPanel * 4);
    tile_store<2>(to + kSumsSize / 2, kPanel * 4);
    tile_store<3>(to + kSumsSize / 2 + kTileRows, kPanel * 4);
}

// Rows of x as bytes, and the panels that they meet.
struct Operands {
    const char* x;
    int64_t row_stride;
    const char* panels;
    int64_t panel_stride;
    int64_t bytes;  // of a row
};

// Calls emit(rows of 32 sums, first row, rows, panel) for every block of an item.
template <class Products, bool pair, class F>
PM_INLINE void blocks(const Operands& in, const RowTiles& tiles, int64_t panels, const F& emit) {
    constexpr int64_t kTogether = pair ? 1 : 2;  // panels
    const int64_t steps_all = (in.bytes + kTileBytes - 1) / kTileBytes, rest = in.bytes % kTileBytes;
    const int64_t groups = (panels + kTogether - 1) / kTogether, pairs = pair ? tiles.count / 2 : 1;
    float* sums = scratch(groups * pairs * kSumsSize + tiles.count * kTileFloats);
    char* last_x = reinterpret_cast<char*>(sums + groups * pairs * kSumsSize);
    alignas(64) char last_w[2][kStepBytes];
    alignas(64) float rows[kSumsSize];
    if (rest) {  // of k: padded with zeros, as are the panels' below
        memset(last_x, 0, tiles.count * kTileFloats * 4);
        for (int64_t t = 0; t < tiles.count; ++t)
            for (int64_t r = 0; r < tiles.height; ++r)
                memcpy(last_x + (t * kTileRows + r) * kTileBytes,
                       in.x + (tiles.start(t) + r) * in.row_stride + in.bytes - rest, rest);
        memset(last_w, 0, sizeof last_w);
    }
    for (int64_t step = 0; step < steps_all; step += kPieceSteps) {
        const bool last = steps_all - step <= kPieceSteps;
        const int64_t steps = last ? steps_all - step - (rest != 0) : kPieceSteps;
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t panel = g * kTogether, other = panel + kTogether - 1 < panels ? panel + kTogether - 1 : panel;
            const char* w0 = in.panels + panel * in.panel_stride + step * kStepBytes;
            const char* w1 = in.panels + other * in.panel_stride + step * kStepBytes;
            if (last && rest) {
                const int64_t left = in.panel_stride - (steps_all - 1) * kStepBytes;
                memcpy(last_w[0], w0 + steps * kStepBytes, left);
                if (!pair) memcpy(last_w[1], w1 + steps * kStepBytes, left);
            }
            for (int64_t t = 0; t < tiles.count; t += 2) {
                const int64_t t1 = pair ? t + 1 : t;
                const char* a0 = in.x + tiles.start(t) * in.row_stride + step * kTileBytes;
                const char* a1 = in.x + tiles.start(t1) * in.row_stride + step * kTileBytes;
                float* kept = sums + (g * pairs + t / 2) * kSumsSize;
                if (step == 0) zero_sums();
                else load_sums(kept);
                multiply<Products, pair>(a0, a1, in.row_stride, w0, w1, steps);
                if (!last) {
                    store_sums(kept);
                    continue;
                }
                if (rest)
                    multiply<Products, pair>(last_x + t * kTileFloats * 4, last_x + t1 * kTileFloats * 4, kTileBytes,
                                             last_w[0], last_w[1], 1);
                store_rows(rows);
                for (int64_t i = 0; i < 2; ++i) {
                    const int64_t tile = pair ? t + i : 0, to = pair ? panel : panel + i;
                    if (to >= panels || tiles.written(tile) <= 0) continue;
                    const int64_t first = tiles.first_written(tile);
                    emit(rows + i * kSumsSize / 2 + (first - tiles.start(tile)) * kPanel, first, tiles.written(tile), to);
                }
            }
        }
    }
}

PM_KERNEL void linear_tiled(const LinearArgs<bf16>& p, int64_t begin, int64_t end) {
    Tiles tiles;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t first_row = item % p.row_blocks * p.row_block;
        const int64_t first_panel = item / p.row_blocks * p.panel_group, left = p.panels_count - first_panel;
        const RowTiles rows(p.m - first_row < p.row_block ? p.m - first_row : p.row_block);
        const int64_t panel_stride = (p.k + 1) / 2 * kStepStride;
        const Operands in{reinterpret_cast<const char*>(p.x + first_row * p.ldx), p.ldx * 2,
                          reinterpret_cast<const char*>(p.panels) + first_panel * panel_stride, panel_stride, p.k * 2};
        const auto emit = [&](const float* sums, int64_t first, int64_t count, int64_t panel) {
            finish(p, sums, kPanel, first_row + first, count, (first_panel + panel) * kPanel);
        };
        tiles.configure(rows.height);
        const int64_t panels = left < p.panel_group ? left : p.panel_group;
        if (rows.count == 1) blocks<Bf16Products, false>(in, rows, panels, emit);
        else blocks<Bf16Products, true>(in, rows, panels, emit);
    }
}
