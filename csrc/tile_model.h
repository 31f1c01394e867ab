// A model of the AMX tile unit, written from Intel's manual, so that tile code runs, and its faults show, on any machine.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

namespace pagemill {

// The sizes of the eight tiles, of up to 16 rows of up to 64 bytes, as LDTILECFG reads them.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

// The tiles of one thread. What the processor answers with a fault throws logic_error.
class TileModel {
public:
    void configure(const void* memory) {  // LDTILECFG
        TileConfig config;
        std::memcpy(&config, memory, sizeof config);
        release();
        if (config.palette == 0) return;
        require(config.palette == 1, "palette");
        require(config.start_row == 0, "start row");
        for (const uint8_t byte : config.reserved) require(byte == 0, "reserved byte");
        for (int t = 0; t < 16; ++t) {
            const int rows = config.rows[t], bytes = config.row_bytes[t];
            require(t < kTiles || (rows == 0 && bytes == 0), "tile beyond the eighth");
            require(rows <= kRows && bytes <= kBytes, "tile size");
            require((rows == 0) == (bytes == 0), "tile of no rows or of no columns");
            if (t < kTiles) tiles_[t].rows = rows, tiles_[t].bytes = bytes;
        }
        configured_ = true;
    }

    void release() { *this = TileModel(); }  // TILERELEASE

    __attribute__((noinline)) void zero(int t) { std::memset(used(t).data, 0, sizeof tiles_[t].data); }  // TILEZERO

    __attribute__((noinline)) void load(int t, const void* from, int64_t stride) {  // TILELOADD
        zero(t);
        for (int r = 0; r < tiles_[t].rows; ++r)
            std::memcpy(tiles_[t].data[r], static_cast<const char*>(from) + r * stride, tiles_[t].bytes);
    }

    __attribute__((noinline)) void store(int t, void* to, int64_t stride) {  // TILESTORED
        const Tile& tile = used(t);
        for (int r = 0; r < tile.rows; ++r)
            std::memcpy(static_cast<char*>(to) + r * stride, tile.data[r], tile.bytes);
    }

    // TDPBF16PS. The even and the odd k are chains of their own, of this instruction alone. Denormals are zero, in and out.
    __attribute__((noinline)) void dot_bf16(int c, int a, int b) {
        const auto& [sums, x, w] = operands(c, a, b);
        float weights[kRows][2][kColumns];
        for (int k = 0; k < w.rows; ++k)
            for (int i = 0; i < 2 * kColumns; ++i) weights[k][i % 2][i / 2] = bf16_at(w, k, i);
        for (int m = 0; m < sums.rows; ++m) {
            float chains[2][kColumns] = {};
            for (int k = 0; k < w.rows; ++k)
                for (int half = 0; half < 2; ++half) {
                    const float factor = bf16_at(x, m, 2 * k + half);
                    for (int n = 0; n < kColumns; ++n)
                        chains[half][n] = fused(factor, weights[k][half][n], chains[half][n]);
                }
            for (int n = 0; n < sums.bytes / 4; ++n) {
                float sum;
                std::memcpy(&sum, sums.data[m] + 4 * n, 4);
                sum = flush(flush(sum) + flush(chains[0][n] + chains[1][n]));
                std::memcpy(sums.data[m] + 4 * n, &sum, 4);
            }
        }
    }

    // TDPBSUD: signed bytes of a times unsigned ones of b, in wrapping 32 bits.
    __attribute__((noinline)) void dot_int8(int c, int a, int b) {
        const auto& [sums, x, w] = operands(c, a, b);
        for (int m = 0; m < sums.rows; ++m) {
            uint32_t row[kColumns];
            std::memcpy(row, sums.data[m], sizeof row);
            for (int k = 0; k < w.rows; ++k)
                for (int n = 0; n < kColumns; ++n)
                    for (int i = 0; i < 4; ++i)
                        row[n] += static_cast<uint32_t>(static_cast<int8_t>(x.data[m][4 * k + i]) * w.data[k][4 * n + i]);
            std::memcpy(sums.data[m], row, sums.bytes);
        }
    }

private:
    static constexpr int kTiles = 8, kRows = 16, kBytes = 64, kColumns = 16;
    struct Tile {
        int rows = 0, bytes = 0;
        uint8_t data[kRows][kBytes] = {};
    };

    static void require(bool holds, const char* what) {
        if (!holds) throw std::logic_error(std::string("tile unit: fault: ") + what);
    }

    Tile& used(int t) {
        require(configured_, "no configuration");
        require(t >= 0 && t < kTiles && tiles_[t].rows > 0, "tile without a size");
        return tiles_[t];
    }

    struct Operands {
        Tile &sums, &x, &w;
    };
    Operands operands(int c, int a, int b) {
        Tile &sums = used(c), &x = used(a), &w = used(b);
        require(c != a && c != b && a != b, "a tile twice");
        require(sums.bytes % 4 == 0 && x.bytes % 4 == 0 && w.bytes % 4 == 0, "columns not of four bytes");
        require(sums.rows == x.rows && sums.bytes == w.bytes && x.bytes / 4 == w.rows, "tiles that do not fit");
        return {sums, x, w};
    }

    // The product is exact in double, and the sum of two floats rounds through double as it would at once.
    static float fused(float a, float b, float c) {
        return flush(static_cast<float>(static_cast<double>(a) * static_cast<double>(b) + static_cast<double>(c)));
    }

    static float flush(float v) {
        return std::fabs(v) < std::numeric_limits<float>::min() ? std::copysign(0.0f, v) : v;
    }

    static float bf16_at(const Tile& tile, int row, int i) {
        uint16_t half;
        std::memcpy(&half, tile.data[row] + 2 * i, 2);
        const uint32_t bits = static_cast<uint32_t>(half) << 16;
        float v;
        std::memcpy(&v, &bits, 4);
        return flush(v);
    }

    bool configured_ = false;
    Tile tiles_[kTiles];
};

}  // namespace pagemill
