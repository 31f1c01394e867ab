// The kernels of one instruction set, as a table; the best one the machine has is picked when first used.
//
// Each isa_*.cpp compiles the same bodies (body_*.h) for its instruction set. A kernel works on a range of items
// and knows nothing of threads or Python; within one table the result of an item is the same bits however the
// range is cut.
#pragma once

#include <cstdint>

namespace pagemill {

struct bf16 { uint16_t bits; };

// y[m, n] = x w^T + bias, of weights in panels of 32 output features, zero padded, and what becomes of y: stored, or
// added to a residual in place; or, if gated, each panel is 16 gates and their 16 ups and silu(gate) * up is stored.
constexpr int kPanel = 32;
template <class T>
struct LinearOut {
    const float* bias;  // [ceil(n / 32) * 32], or null
    T* out;             // rows of n, of n / 2 if gated; or null:
    float* out_wide;    // the same; or null:
    T* residual;        // += y
    int64_t ldr;
    bool gated;
    int64_t m, n, k;
    int64_t row_block, row_blocks;      // rows of an item
    int64_t panel_group, panels_count;  // panels of an item
};

// Panels: [ceil(n / 32)][k][32] of float, or of bf16 with the two features of a pair side by side,
// [ceil(n / 32)][ceil(k / 2)][32][2], as the dot products of pairs want them.
template <class T>
struct LinearArgs : LinearOut<T> {
    const T* x;
    int64_t ldx;
    const T* panels;
};

// x in int8, each group of k's of each row with a scale of its own: the largest magnitude becomes 127.
constexpr int64_t kChunk = 512, kChunkStride = kChunk + 64;
struct QuantizedRows {
    int8_t* x;      // [ceil(k / kChunk)][m][kChunkStride], zeros from k on up to a multiple of 64
    float* scales;  // [groups][m]
    int32_t* sums;  // [groups][m], of the group's int8
    int64_t m, k, group, groups;
};

// y[m, n] = sum over groups of x_scale * w_scale * sum over the group of x * (w - zero): the inner sum in integers, so
// that it is exact, and the outer one in order, multiplied and added in float.
// Panels of bytes: [ceil(n / 32)][ceil(k / 4)][32][4], one group of all k, zero 128. Of nibbles: [ceil(n / 32)]
// [ceil(k / 8)][32][4], the low nibbles are the first four of eight k's, the high ones the other four.
template <class T>
struct QLinearArgs : LinearOut<T> {
    QuantizedRows rows;
    const uint8_t* panels;
    const float* scales;   // [ceil(n / 32)][groups][32]
    const uint8_t* zeros;  // the same, of nibbles; null: bytes
};

template <class T>
struct NormArgs {
    const T* x;
    int64_t ldx;
    const T* weight;
    float eps;
    T* out;
    int64_t h;
};

template <class T>
struct RotaryArgs {
    T* x;
    int64_t token_stride, head_stride;
    const float *cos, *sin;  // [tokens, d / 2]
    int64_t angle_stride;
    int64_t heads, kv_heads, d;  // rotates heads + kv_heads; the kv_heads after those are v
    const int64_t* slots;        // null: no cache
    T *k_cache, *v_cache;
    int64_t block_size;
    int8_t *k_codes, *v_codes;  // in place of the caches, or null
    float *k_scale, *v_scale;   // of the codes, [blocks, kv_heads, block_size]
};

// Keys of a range: ranges begin afresh, so that threads can share the keys of one sequence.
constexpr int64_t kAttentionRange = 1024;
// Floats of one row of a range that is joined later: the output padded to whole vectors, the maximum, the sum of weights.
constexpr int64_t attention_partial(int64_t d) { return (d + 31) / 32 * 32 + 16; }

// One item: the rows (query token, head of the group) of `tokens` queries for one kv head. C: type of keys and values.
template <class T, class C>
struct AttentionArgs {
    const T* q;
    int64_t q_token, q_head;
    T* out;
    int64_t out_token, out_head;
    int64_t tokens, group, d;
    float scale;
    int64_t first_key;     // a multiple of kAttentionRange: where the item's keys begin
    int64_t keys;          // where they end; visible to the last query, unless the item is one range of several
    int64_t causal_first;  // visible to the first query, one more to each next
    bool causal;           // or else all see all keys
    float* partial;        // [tokens * group][attention_partial(d)]: the range's result, in place of out; or null
    // Paged: blocks of one kv head (block id -> k[d][block_size], v[block_size][d]).
    const C *k, *v;
    const int32_t* blocks;  // null: packed rows k[key * k_key + d], v likewise
    int64_t block_stride, block_size;
    int64_t k_key, v_key;
    // int8: what a token's codes are multiplied with, blocks of one kv head (block id -> scale[block_size]).
    const float *k_scale, *v_scale;
    int64_t scale_stride;
};

// How one axis is resampled: output i is the sum over t < count[i] of input[first[i] + t] * weight[i * taps + t].
struct ResizeAxis {
    int in, out, taps;
    const int *first, *count;
    const int32_t* weight;  // fixed point
};
constexpr int kPrecisionBits = 32 - 8 - 2;  // of a weight: 8 bits of result, 2 of headroom for negative lobes
constexpr int kStrip = 16;                  // rows resized side by side in the horizontal pass
constexpr int kStripAlign = 64;             // bytes that planar rows of working memory are padded to

// A page to patches; the contract is in kernels/patchify.py.
struct PatchifyArgs {
    const uint8_t* rgb;   // [y.in, x.in, 3]
    uint8_t* patches;     // [y.out / patch * x.out / patch, 3 * patch * patch]
    int patch, merge;
    ResizeAxis x, y;
    bool vertical_first, vertical_second;  // at most one; neither where the height stays
    // Working memory, in rows of `stride` bytes: [3][x.out] and padding.
    int64_t stride;
    uint8_t* window;  // [rows read for a row of patches, at most, + 2 * kStrip][stride]
    uint8_t* band;    // [patch][stride]
    uint8_t* block;   // [kStrip][x.in * 3]
    uint8_t* tile;    // [x.in * 3][kStrip]
    uint8_t* turned;  // [stride][kStrip]

    // Rows of the window's image that row y of the result is made of.
    int first_row(int row) const { return vertical_second ? y.first[row] : row; }
    int end_row(int row) const { return vertical_second ? y.first[row] + y.count[row] : row + 1; }
};

// The most rows and panels of an item of a linear layer.
struct Blocking {
    int64_t rows, panels;
};
constexpr Blocking kVectorBlocking{96, 8};  // a piece of x, one of a panel, and the sums fit the L2 cache

// Patch bytes to the values that a vision tower reads; the contract is in kernels/pixels.py.
template <class T>
struct PixelArgs {
    const uint8_t* patches;  // [*, channels * area]
    const int64_t* order;    // the patch of each row
    const T* levels;         // [channels, 256]
    T* out;                  // [*, channels * moments * area]
    int64_t channels, moments, area;
};

template <class T>
struct TypedKernels {
    void (*linear)(const LinearArgs<T>&, int64_t begin, int64_t end);
    Blocking linear_blocking;
    void (*qlinear)(const QLinearArgs<T>&, int64_t begin, int64_t end);
    Blocking qlinear_blocking;
    void (*quantize_rows)(const T* x, int64_t ldx, const QuantizedRows&, int64_t begin, int64_t end);
    // One panel of `rows` <= 32 rows of w, and its scales and zeros.
    void (*pack_int8)(const T* w, int64_t ldw, int64_t rows, int64_t k, uint8_t* panel, float* scales);
    void (*pack_int4)(const T* w, int64_t ldw, int64_t rows, int64_t k, int64_t group, uint8_t* panel, float* scales,
                      uint8_t* zeros);
    // One row of a panel of bytes: w at its first four k's.
    void (*dequantize)(const uint8_t* w, float scale, int64_t k, T* out);
    void (*rms_norm)(const NormArgs<T>&, int64_t begin, int64_t end);
    void (*swiglu)(const T* gate_up, int64_t ld, T* out, int64_t width, int64_t begin, int64_t end);
    void (*gelu)(const T* x, T* out, int64_t begin, int64_t end);
    void (*rotary)(const RotaryArgs<T>&, int64_t begin, int64_t end);
    void (*attention)(const AttentionArgs<T, T>&, const AttentionArgs<T, T>* next);  // next: fetched ahead, or null
    void (*join_ranges)(const AttentionArgs<T, T>&);
    void (*attention_int8)(const AttentionArgs<T, int8_t>&, const AttentionArgs<T, int8_t>* next);
    void (*join_ranges_int8)(const AttentionArgs<T, int8_t>&);
    void (*pixel_values)(const PixelArgs<T>&, int64_t begin, int64_t end);
};

struct Isa {
    const char* name;
    void (*greedy)(const float* row, const uint32_t* mask, int64_t n, int64_t* token, float* logprob);
    void (*patchify)(const PatchifyArgs&);
    TypedKernels<float> f32;
    TypedKernels<bf16> b16;

    const TypedKernels<float>& typed(const float*) const { return f32; }
    const TypedKernels<bf16>& typed(const bf16*) const { return b16; }
};

extern const Isa kPortable;
#if defined(__x86_64__)
extern const Isa kAvx2, kAvx512, kAvx512Vnni, kAvx512Bf16, kAmx, kAmxEmulated;
#endif

const Isa& isa();

}  // namespace pagemill
