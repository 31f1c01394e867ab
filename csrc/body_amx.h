// Linear layers on the tile unit. Tiles 0-3 are sums of 16 features, 4 and 5 rows of x, 6 and 7 weights, read where they
// lie: 16 rows of k of half a panel, 128 bytes apart.
//
// A block is two tiles of rows by one panel, so that four loads feed four products; of at most 16 rows, it is one tile
// of rows by two panels. Every element of the result is a chain over k in steps of a tile: a row of a product
// depends on that row of x alone, so a row's bits do not depend on the rows around it.
//
// What bounds it, counted and not measured, for Sapphire Rapids (a product takes 16 cycles, a load 8, a store 16): a step of
// a block is 64 cycles of products and 4 KB of loads, 2 KB of them, the rows of x, from the L2 cache: 32 bytes a cycle of
// the about 48 that it gives. For the panel's piece to stay in the L1 cache while all rows pass, both pieces and the sums
// must fit its 48 KB: kPieceSteps. Sums that come and go between pieces cost at most 96 cycles of 640. An item of 256
// rows by 16 panels draws 6 bytes a cycle from beyond the L2 cache, and its sums take 512 KB of it. With k = 2048 a block
// of bfloat16 is 4100 cycles of products, 600 of sums that come and go, and 400 to write the result: 80 % of the unit's
// peak. Of int8, 2050, 300 and 600: 70 % of its peak, 1.7 times bfloat16. Of int4 in groups of 128, 2050 of products and
// 3100 to 4100 of vector work, in part at the same time: between 0.8 and 1.2 times bfloat16.

#include "body_simd.h"
#include "body_gemm.h"
#include "body_linear.h"
#include "body_qlinear.h"
#include "body_tiles.h"

constexpr Blocking kTileBlocking{256, 16};
constexpr int64_t kTileRows = 16, kTileBytes = 64;
constexpr int64_t kStride = kPanel * 4;                      // of a panel's rows of k, in bytes
constexpr int64_t kSumsSize = 4 * kTileRows * kTileRows;     // floats or integers of a block
constexpr int64_t kTileFloats = kTileRows * kTileBytes / 4;  // of a staged tile of x

// What is multiplied. Pieces of k, for all rows and panels of an item, are of kPieceSteps full tiles. A row of x that is
// not padded to a whole tile needs a padded copy of its end.
struct Bf16Products {
    static constexpr int64_t kPieceSteps = 10;
    static constexpr bool kPadded = false;
    template <int C, int A, int B>
    PM_INLINE void add() { tile_dot_bf16<C, A, B>(); }
};
struct ByteProducts {
    static constexpr int64_t kPieceSteps = kChunk / kTileBytes;
    static constexpr bool kPadded = true;
    template <int C, int A, int B>
    PM_INLINE void add() { tile_dot_int8<C, A, B>(); }
};

// A thread's tiles: their sizes are set when they change, and given back at the end, so that the system need not save them.
class Tiles {
public:
    // `depth` bytes of k, in tiles of `rows` rows of x.
    void configure(int64_t rows, int64_t depth) {
        if (rows == rows_) return;
        TileConfig config;
        for (int t = 0; t < 8; ++t) {
            config.rows[t] = static_cast<uint8_t>(t < 6 ? rows : depth / 4);
            config.row_bytes[t] = static_cast<uint16_t>(t == 4 || t == 5 ? depth : kTileBytes);
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

// Rows of x as bytes, the panels that they meet, and how both fall into blocks.
struct Work {
    const char* x;
    int64_t row_stride, piece_stride;
    const char* panels;
    int64_t panel_stride, panel_count;
    int64_t bytes;  // of a row
    RowTiles tiles;
    int64_t first_row, first_panel;

    // One item of p; x and the panels are still to be set.
    template <class T>
    Work(const LinearOut<T>& p, int64_t item)
        : tiles(p.m - item % p.row_blocks * p.row_block < p.row_block ? p.m - item % p.row_blocks * p.row_block
                                                                       : p.row_block) {
        first_row = item % p.row_blocks * p.row_block;
        first_panel = item / p.row_blocks * p.panel_group;
        const int64_t left = p.panels_count - first_panel;
        panel_count = left < p.panel_group ? left : p.panel_group;
    }

    // The two tiles of rows, or the two panels, of a block: calls body(which, tile, panel).
    template <bool pair, class F>
    void halves(int64_t tile, int64_t panel, const F& body) const {
        body(0, tile, panel);
        if (pair) body(1, tile + 1, panel);
        else if (panel + 1 < panel_count) body(1, tile, panel + 1);
    }

    // Writes half `which` of the rows of sums of a block.
    template <class T, bool pair>
    __attribute__((noinline, flatten)) void finish_block(const LinearOut<T>& p, const float* sums, int64_t tile, int64_t panel) const {
        halves<pair>(tile, panel, [&](int64_t which, int64_t t, int64_t to) {
            const int64_t from = tiles.first_written(t) - tiles.start(t);
            finish(p, sums + which * kSumsSize / 2 + from * kPanel, kPanel, first_row + tiles.first_written(t),
                   tiles.written(t), (first_panel + to) * kPanel);
        });
    }
};

template <bool value>
struct Choice {
    static constexpr bool kValue = value;
};

// Sums of a block += `steps` tiles of `depth` bytes of k. Two tiles of rows, a0 and a1, by the panel b0; or, not `pair`,
// a0 by b0 and b1.
template <class Products, bool pair>
PM_INLINE void multiply(const char* a0, const char* a1, int64_t lda, const char* b0, const char* b1, int64_t depth,
                        int64_t steps) {
#pragma GCC unroll 1
    for (int64_t s = 0; s < steps; ++s) {
        tile_load<6>(b0, kStride);
        tile_load<4>(a0, lda);
        Products::template add<0, 4, 6>();
        tile_load<7>(b0 + kTileBytes, kStride);
        Products::template add<1, 4, 7>();
        if constexpr (pair) {
            tile_load<5>(a1, lda);
            Products::template add<2, 5, 6>();
            Products::template add<3, 5, 7>();
            a1 += depth;
        } else {
            tile_load<6>(b1, kStride);
            Products::template add<2, 4, 6>();
            tile_load<7>(b1 + kTileBytes, kStride);
            Products::template add<3, 4, 7>();
            b1 += depth / 4 * kStride;
        }
        a0 += depth;
        b0 += depth / 4 * kStride;
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

// Calls emit(rows of sums, tile, panel) for every block of an item.
template <class Products, bool pair, class F>
PM_INLINE void blocks(const Work& in, const F& emit) {
    constexpr int64_t kTogether = pair ? 1 : 2;  // panels
    constexpr int64_t kStepBytes = kTileRows * kStride;
    const RowTiles& tiles = in.tiles;
    const int64_t steps_all = (in.bytes + kTileBytes - 1) / kTileBytes, rest = in.bytes % kTileBytes;
    const int64_t groups = (in.panel_count + kTogether - 1) / kTogether, pairs = pair ? tiles.count / 2 : 1;
    float* sums = scratch(groups * pairs * kSumsSize + tiles.count * kTileFloats);
    char* last_x = reinterpret_cast<char*>(sums + groups * pairs * kSumsSize);
    alignas(64) char last_w[2][kStepBytes];
    alignas(64) float rows[kSumsSize];
    const char* end_of_x = in.x + (steps_all - 1) / Products::kPieceSteps * in.piece_stride +
                           (steps_all - 1) % Products::kPieceSteps * kTileBytes;
    if (rest) memset(last_w, 0, sizeof last_w);  // what is left of k is padded with zeros
    if (rest && !Products::kPadded) {
        memset(last_x, 0, tiles.count * kTileFloats * 4);
        for (int64_t t = 0; t < tiles.count; ++t)
            for (int64_t r = 0; r < tiles.height; ++r)
                memcpy(last_x + (t * kTileRows + r) * kTileBytes, end_of_x + (tiles.start(t) + r) * in.row_stride, rest);
    }
    // Of few rows the weights are read once and nothing is gained by pieces.
    const int64_t span = tiles.count > 2 ? Products::kPieceSteps : steps_all, whole = steps_all - (rest != 0);
    for (int64_t begin = 0; begin < steps_all; begin += span) {
        const bool last = steps_all - begin <= span;
        const int64_t end = last ? whole : begin + span;
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t panel = g * kTogether;
            const char* w0 = in.panels + panel * in.panel_stride;
            const char* w1 = panel + kTogether - 1 < in.panel_count ? w0 + (kTogether - 1) * in.panel_stride : w0;
            if (last && rest) {
                const int64_t left = in.panel_stride - whole * kStepBytes;
                memcpy(last_w[0], w0 + whole * kStepBytes, left);
                if (!pair) memcpy(last_w[1], w1 + whole * kStepBytes, left);
            }
            for (int64_t t = 0; t < tiles.count; t += 2) {
                const int64_t row0 = tiles.start(t) * in.row_stride;
                const int64_t row1 = pair ? tiles.start(t + 1) * in.row_stride : row0;
                float* kept = sums + (g * pairs + t / 2) * kSumsSize;
                if (begin == 0) zero_sums();
                else load_sums(kept);
                for (int64_t step = begin; step < end; step += Products::kPieceSteps) {
                    const char* x = in.x + step / Products::kPieceSteps * in.piece_stride;
                    const int64_t left = end - step;
                    multiply<Products, pair>(x + row0, x + row1, in.row_stride, w0 + step * kStepBytes,
                                             w1 + step * kStepBytes, kTileBytes,
                                             left < Products::kPieceSteps ? left : Products::kPieceSteps);
                }
                if (!last) {
                    store_sums(kept);
                    continue;
                }
                if (rest) {
                    const char* x0 = Products::kPadded ? end_of_x + row0 : last_x + t * kTileFloats * 4;
                    const char* x1 = Products::kPadded ? end_of_x + row1 : last_x + (t + 1) * kTileFloats * 4;
                    multiply<Products, pair>(x0, x1, Products::kPadded ? in.row_stride : kTileBytes, last_w[0],
                                             last_w[1], kTileBytes, 1);
                }
                store_rows(rows);
                emit(rows, t, panel);
            }
        }
    }
}

PM_KERNEL void linear_tiled(const LinearArgs<bf16>& p, int64_t begin, int64_t end) {
    Tiles tiles;
    for (int64_t item = begin; item < end; ++item) {
        Work work(p, item);
        work.x = reinterpret_cast<const char*>(p.x + work.first_row * p.ldx);
        work.row_stride = p.ldx * 2, work.piece_stride = Bf16Products::kPieceSteps * kTileBytes, work.bytes = p.k * 2;
        work.panel_stride = (p.k + 1) / 2 * kStride;
        work.panels = reinterpret_cast<const char*>(p.panels) + work.first_panel * work.panel_stride;
        tiles.configure(work.tiles.height, kTileBytes);
        const auto run = [&](auto choice) {
            constexpr bool pair = decltype(choice)::kValue;
            blocks<Bf16Products, pair>(work, [&](const float* sums, int64_t tile, int64_t panel) {
                work.finish_block<bf16, pair>(p, sums, tile, panel);
            });
        };
        if (work.tiles.count > 1) run(Choice<true>{});
        else run(Choice<false>{});
    }
}

// Integer sums of a block to floats, in place: one group of all k, weights off by 128. As in q_tile.
template <class T, bool pair>
PM_INLINE void scale_bytes(const QLinearArgs<T>& p, const Work& work, float* sums, int64_t tile, int64_t panel) {
    work.halves<pair>(tile, panel, [&](int64_t which, int64_t t, int64_t from) {
        const int64_t row = work.first_row + work.tiles.start(t);
        for (int64_t j = 0; j < kPanel; j += W) {
            const V scale = load(p.scales + (work.first_panel + from) * kPanel + j);
            float* at = sums + which * kSumsSize / 2 + j;
            for (int64_t r = 0; r < work.tiles.height; ++r, at += kPanel) {
                const I sum = reinterpret_cast<I>(load(at)) - 128 * p.rows.sums[row + r];
                store(at, __builtin_convertvector(sum, V) * (scale * splat(p.rows.scales[row + r])));
            }
        }
    });
}

// y (+)= one group's sums, in integers, of a block of nibbles. As in q_tile.
template <class T, bool pair>
PM_INLINE void add_group(const QLinearArgs<T>& p, const Work& work, const float* sums, float* y, int64_t group,
                         int64_t tile, int64_t panel) {
    const int64_t groups = p.rows.groups;
    work.halves<pair>(tile, panel, [&](int64_t which, int64_t t, int64_t from) {
        const int64_t row = work.first_row + work.tiles.start(t);
        for (int64_t j = 0; j < kPanel; j += W) {
            const int64_t at = ((work.first_panel + from) * groups + group) * kPanel + j;
            const V scale = load(p.scales + at);
            int64_t of_x = group * p.rows.m + row, to = which * kSumsSize / 2 + j;
            for (int64_t r = 0; r < work.tiles.height; ++r, ++of_x, to += kPanel) {
                const I whole = reinterpret_cast<I>(load(sums + to)) - zero_terms(p.zeros + at, p.rows.sums[of_x]);
                V sum = __builtin_convertvector(whole, V);
                sum *= scale * splat(p.rows.scales[of_x]);
                store(y + to, group ? load(y + to) + sum : sum);
            }
        }
    });
}

// Bytes of `steps` rows of nibbles, each of two rows of k, to `to`.
PM_INLINE void unpack(const char* nibbles, int64_t steps, char* to) {
    for (int64_t s = 0; s < steps; ++s)
        for (int64_t j = 0; j < kStride; j += 4 * W) {
            const V bits = load(reinterpret_cast<const float*>(nibbles + s * kStride + j));
            const U both = reinterpret_cast<U>(bits), low = both & 0x0f0f0f0fu, high = both >> 4 & 0x0f0f0f0fu;
            store(reinterpret_cast<float*>(to + 2 * s * kStride + j), reinterpret_cast<V>(low));
            store(reinterpret_cast<float*>(to + (2 * s + 1) * kStride + j), reinterpret_cast<V>(high));
        }
}

// A piece of k of a panel becomes bytes once for all rows of the item, in cache; every group has sums of its own, which
// are added up while the tile unit is at the next group.
template <class T, bool pair>
PM_INLINE void nibble_blocks(const QLinearArgs<T>& p, const Work& in, int64_t depth) {
    constexpr int64_t kTogether = pair ? 1 : 2, kBytes = kChunk / 4 * kStride;  // of a panel's piece
    const RowTiles& tiles = in.tiles;
    const int64_t panel_groups = (in.panel_count + kTogether - 1) / kTogether, pairs = pair ? tiles.count / 2 : 1;
    float* y = scratch(panel_groups * pairs * kSumsSize + kTogether * kBytes / 4);
    char* bytes = reinterpret_cast<char*>(y + panel_groups * pairs * kSumsSize);
    alignas(64) float sums[kSumsSize];
    const int64_t span = tiles.count > 2 ? kChunk : p.k;  // as in blocks()
    for (int64_t begin = 0; begin < p.k; begin += span) {
        const int64_t end = p.k - begin < span ? p.k : begin + span;
        for (int64_t g = 0; g < panel_groups; ++g) {
            const int64_t panel = g * kTogether;
            const bool second = panel + kTogether - 1 < in.panel_count;
            for (int64_t k = begin; k < end; k += kChunk) {
                const int64_t left = end - k < kChunk ? end - k : kChunk, rows = (left + 7) / 8;
                for (int64_t j = 0; j < (second ? kTogether : 1); ++j) {
                    char* to = bytes + j * kBytes;
                    unpack(in.panels + (panel + j) * in.panel_stride + k / 8 * kStride, rows, to);
                    memset(to + 2 * rows * kStride, 0, kBytes - 2 * rows * kStride);  // they meet zeros of x
                }
                const char* x = in.x + k / kChunk * in.piece_stride;
                const char* other = second ? bytes + (kTogether - 1) * kBytes : bytes;
                for (int64_t t = 0; t < tiles.count; t += 2) {
                    const char* x0 = x + tiles.start(t) * in.row_stride;
                    const char* x1 = pair ? x + tiles.start(t + 1) * in.row_stride : x0;
                    float* to = y + (g * pairs + t / 2) * kSumsSize;
                    const int64_t first = k / p.rows.group;
                    for (int64_t at = 0, group = first; at < left; at += p.rows.group, ++group) {
                        const int64_t of_group = left - at < p.rows.group ? left - at : p.rows.group;
                        zero_sums();
                        multiply<ByteProducts, pair>(x0 + at, x1 + at, in.row_stride, bytes + at / 4 * kStride,
                                                     other + at / 4 * kStride, depth, (of_group + depth - 1) / depth);
                        if (group > first) add_group<T, pair>(p, in, sums, to, group - 1, t, panel);
                        store_rows(sums);
                    }
                    add_group<T, pair>(p, in, sums, to, (k + left - 1) / p.rows.group, t, panel);
                    if (k + left == p.k) in.finish_block<T, pair>(p, to, t, panel);
                }
            }
        }
    }
}

template <class T>
PM_KERNEL void qlinear_tiled(const QLinearArgs<T>& p, int64_t begin, int64_t end) {
    Tiles tiles;
    const int64_t depth = p.rows.group < kTileBytes && p.zeros ? p.rows.group : kTileBytes;
    for (int64_t item = begin; item < end; ++item) {
        Work work(p, item);
        work.x = reinterpret_cast<const char*>(p.rows.x + work.first_row * kChunkStride);
        work.row_stride = kChunkStride, work.piece_stride = p.m * kChunkStride, work.bytes = p.k;
        work.panel_stride = (p.zeros ? (p.k + 7) / 8 : (p.k + 3) / 4) * kStride;
        work.panels = reinterpret_cast<const char*>(p.panels) + work.first_panel * work.panel_stride;
        tiles.configure(work.tiles.height, depth);
        const auto run = [&](auto choice) {
            constexpr bool pair = decltype(choice)::kValue;
            if (p.zeros) return nibble_blocks<T, pair>(p, work, depth);
            blocks<ByteProducts, pair>(work, [&](float* sums, int64_t tile, int64_t panel) {
                scale_bytes<T, pair>(p, work, sums, tile, panel);
                work.finish_block<T, pair>(p, sums, tile, panel);
            });
        };
        if (work.tiles.count > 1) run(Choice<true>{});
        else run(Choice<false>{});
    }
}
