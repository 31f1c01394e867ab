// Linear layers over packed panels, and embedding rows read back from the same panels.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdlib>
#include <new>

#include "array.h"
#include "isa.h"
#include "threads.h"

namespace pagemill {
namespace {

constexpr int64_t kSmall = 1 << 17; // multiply-adds below which waking a thread costs more than it brings

int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b > 0); }

// The element type of a panel, and k's in a step: see LinearArgs.
template <class T>
constexpr int64_t kPerStep = sizeof(T) == 2 ? 2 : 1;

// Where feature c of output row r lies in its panel.
template <class T>
int64_t place(int64_t r, int64_t c) {
    return (c / kPerStep<T> * kPanel + r) * kPerStep<T> + c % kPerStep<T>;
}

DType check_panels(const Array& panels, int64_t count, int64_t k) {
    if (panels.dtype == DType::bfloat16) check(panels, "panels", {DType::bfloat16}, {count, ceil_div(k, 2), kPanel, 2});
    else check(panels, "panels", {DType::float32}, {count, k, kPanel});
    if (reinterpret_cast<uintptr_t>(panels.data) % 4) reject("panels", "an address that is a multiple of 4", "another");
    return panels.dtype;
}

void check_first(int64_t first, int64_t rows, const Array& panels) {
    if (first < 0 || first % kPanel || first / kPanel > panels.shape[0] ||
        ceil_div(rows, kPanel) > panels.shape[0] - first / kPanel)
        reject("first", "a multiple of 32 whose rows fit the panels", std::to_string(first));
}

// One panel, from `count` rows of k features. A stripe of every row is staged first: rows lie a power of two apart as a rule, so
// that reading down a column would put all of them into one set of the cache.
template <class T>
void pack_panel(const T* w, int64_t ld, int64_t count, int64_t k, T* panel) {
    constexpr int64_t kStep = kPerStep<T>, kStripe = 128 / sizeof(T);
    T stripe[kPanel][kStripe];
    for (int64_t c = 0; c < k; c += kStripe) {
        const int64_t width = std::min(kStripe, k - c);
        if (count < kPanel || width < kStripe) std::fill(&stripe[0][0], &stripe[0][0] + kPanel * kStripe, T{});
        for (int64_t r = 0; r < count; ++r) std::copy(w + r * ld + c, w + r * ld + c + width, stripe[r]);
        T* to = panel + c / kStep * kPanel * kStep;
        for (int64_t s = 0; s < ceil_div(width, kStep); ++s)
            for (int64_t r = 0; r < kPanel; ++r)
                for (int64_t i = 0; i < kStep; ++i) *to++ = stripe[r][s * kStep + i];
    }
}

template <class T>
void pack(const Array& weight, int64_t first, const Array& panels) {
    const int64_t rows = weight.shape[0], k = weight.shape[1], ld = weight.strides[0];
    const int64_t size = ceil_div(k, kPerStep<T>) * kPerStep<T> * kPanel;
    const T* from = weight.as<T>();
    T* to = panels.as<T>() + first / kPanel * size;
    pybind11::gil_scoped_release release;
    parallel_for(ceil_div(rows, kPanel), 1, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p)
            pack_panel(from + p * kPanel * ld, ld, std::min<int64_t>(kPanel, rows - p * kPanel), k, to + p * size);
    });
}

// The rows of `weight` become output rows first, first + 1, ...; `first` is a multiple of kPanel.
void pack_panels(const Array& weight, int64_t first, const Array& panels) {
    check(weight, "weight", {DType::float32, DType::bfloat16}, {kAny, kAny}, Layout::rows);
    const DType dtype = check_panels(panels, kAny, weight.shape[1]);
    check(weight, "weight", {dtype}, {kAny, kAny}, Layout::rows);
    check_written(panels, "panels", {{"weight", weight}});
    check_first(first, weight.shape[0], panels);
    if (weight.size() == 0) return;
    if (dtype == DType::float32) pack<float>(weight, first, panels);
    else pack<bf16>(weight, first, panels);
}

// Where a linear layer's result goes, checked, and how its work is cut.
template <class T>
void set_out(LinearOut<T>& args, const Array& x, int64_t count, const Array& bias, const Array& out, bool add, bool gated,
             std::initializer_list<Named> inputs) {
    if (add) check(out, "residual", {x.dtype}, {x.shape[0], kAny}, Layout::rows);
    else check(out, "out", {x.dtype, DType::float32}, {x.shape[0], kAny});
    args.m = x.shape[0], args.n = out.shape[1], args.k = x.shape[1], args.gated = gated;
    if (ceil_div(args.n, gated ? kPanel / 2 : kPanel) != count)
        reject(add ? "residual" : "out", "columns that fill the panels", std::to_string(args.n));
    if (add) args.residual = out.as<T>(), args.ldr = out.strides[0];
    else if (out.dtype == x.dtype) args.out = out.as<T>();
    else args.out_wide = out.as<float>();
    if (bias.owner) check(bias, "bias", {DType::float32}, {count * kPanel}), args.bias = bias.as<float>();
    check_written(out, add ? "residual" : "out", inputs);
    args.panels_count = count;
}

template <class Args, class F>
void spread(Args& args, const Blocking& most, const F& kernel) {
    args.row_blocks = ceil_div(args.m, most.rows);
    args.row_block = ceil_div(args.m, args.row_blocks);
    // Groups of panels small enough that their sums stay in cache, and that every thread gets some.
    args.panel_group = std::clamp<int64_t>(args.panels_count * args.row_blocks / (4 * num_threads()) / 4 * 4, 4, most.panels);
    const int64_t items = args.row_blocks * ceil_div(args.panels_count, args.panel_group);
    const bool small = args.m * args.panels_count * kPanel * args.k < kSmall;
    parallel_for(items, small ? items : 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// Calls f with a null pointer of x's element type.
template <class F>
void by_type(const Array& x, const F& f) {
    if (x.dtype == DType::float32) f(static_cast<float*>(nullptr));
    else f(static_cast<bf16*>(nullptr));
}

void linear(const Array& x, int64_t in_features, const Array& panels, const pybind11::object& bias, const Array& out,
            bool add, bool gated) {
    if (in_features < 1) reject("in_features", "a number >= 1", std::to_string(in_features));
    const DType dtype = check_panels(panels, kAny, in_features);
    check(x, "x", {dtype}, {kAny, in_features}, Layout::rows);
    const Array b = optional_array(bias);
    by_type(x, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        LinearArgs<T> args{};
        set_out(args, x, panels.shape[0], b, out, add, gated, {{"x", x}, {"panels", panels}, {"bias", b}});
        if (args.m == 0 || args.n == 0) return;
        args.x = x.as<T>(), args.ldx = x.strides[0];
        args.panels = panels.as<T>();
        const auto& kernels = isa().typed(t);
        pybind11::gil_scoped_release release;
        spread(args, kernels.linear_blocking, kernels.linear);
    });
}

// Memory for a call's quantised rows, kept for the next one of the same thread.
char* workspace(size_t bytes) {
    struct Buffer {
        char* data = nullptr;
        size_t size = 0;
        ~Buffer() { std::free(data); }
    };
    static thread_local Buffer buffer;
    if (buffer.size < bytes) {
        std::free(buffer.data);
        buffer.size = 0;
        const size_t size = (bytes + 4095) / 4096 * 4096;
        buffer.data = static_cast<char*>(std::aligned_alloc(64, size));
        if (!buffer.data) throw std::bad_alloc();
        buffer.size = size;
    }
    return buffer.data;
}

QuantizedRows rows_of(int64_t m, int64_t k, int64_t group) {
    QuantizedRows rows{};
    rows.m = m, rows.k = k, rows.group = group, rows.groups = ceil_div(k, group);
    const int64_t bytes = ceil_div(k, kChunk) * m * kChunkStride, scales = ceil_div(m * rows.groups * 4, 64) * 64;
    char* memory = workspace(bytes + 2 * scales);
    rows.x = reinterpret_cast<int8_t*>(memory);
    rows.scales = reinterpret_cast<float*>(memory + bytes);
    rows.sums = reinterpret_cast<int32_t*>(memory + bytes + scales);
    return rows;
}

constexpr int64_t kMostQuantized = 1 << 16;  // of k: int32 holds the sums

void check_group(int64_t group) {
    if (group != 32 && group != 64 && group != 128) reject("group", "32, 64 or 128", std::to_string(group));
}

// `zeros` none: bytes, one group.
int64_t check_quantized(const Array& panels, const Array& scales, const Array* zeros, int64_t k, int64_t group) {
    if (k < 1 || k > kMostQuantized) reject("in_features", "1..65536", std::to_string(k));
    if (zeros) check_group(group);
    check(panels, "panels", {DType::uint8}, {kAny, zeros ? ceil_div(k, 8) : ceil_div(k, 4), kPanel, 4});
    const int64_t count = panels.shape[0], groups = zeros ? ceil_div(k, group) : 1;
    check(scales, "scales", {DType::float32}, {count, groups, kPanel});
    if (zeros) check(*zeros, "zeros", {DType::uint8}, {count, groups, kPanel});
    return count;
}

// `zeros` and `group` as in QLinearArgs; zeros none: bytes.
void qlinear(const Array& x, int64_t in_features, const Array& panels, const Array& scales,
             const pybind11::object& zeros, int64_t group, const pybind11::object& bias, const Array& out, bool add,
             bool gated) {
    const Array z = optional_array(zeros), b = optional_array(bias);
    const Array* nibbles = zeros.is_none() ? nullptr : &z;
    check_quantized(panels, scales, nibbles, in_features, group);
    check(x, "x", {DType::float32, DType::bfloat16}, {kAny, in_features}, Layout::rows);
    by_type(x, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        QLinearArgs<T> args{};
        set_out(args, x, panels.shape[0], b, out, add, gated,
                {{"x", x}, {"panels", panels}, {"scales", scales}, {"zeros", z}, {"bias", b}});
        if (args.m == 0 || args.n == 0) return;
        args.panels = panels.as<uint8_t>(), args.scales = scales.as<float>();
        if (nibbles) args.zeros = z.as<uint8_t>();
        const auto& kernels = isa().typed(t);
        pybind11::gil_scoped_release release;
        args.rows = rows_of(args.m, args.k, nibbles ? group : args.k);
        parallel_for(args.m, std::max<int64_t>(1, 32768 / args.k), [&](int64_t begin, int64_t end) {
            kernels.quantize_rows(x.as<T>(), x.strides[0], args.rows, begin, end);
        });
        spread(args, kernels.qlinear_blocking, kernels.qlinear);
    });
}

// Rounds rows of `weight` into panels: into bytes, or, with zeros, into nibbles. `first` as in pack_panels.
void pack_quantized(const Array& weight, int64_t first, int64_t group, const Array& panels, const Array& scales,
                    const pybind11::object& zeros) {
    check(weight, "weight", {DType::float32, DType::bfloat16}, {kAny, kAny}, Layout::rows);
    const Array z = optional_array(zeros);
    const Array* nibbles = zeros.is_none() ? nullptr : &z;
    const int64_t rows = weight.shape[0], k = weight.shape[1];
    check_quantized(panels, scales, nibbles, k, group);
    check_written(panels, "panels", {{"weight", weight}});
    check_written(scales, "scales", {{"weight", weight}, {"panels", panels}});
    if (nibbles) check_written(z, "zeros", {{"weight", weight}, {"panels", panels}, {"scales", scales}});
    check_first(first, rows, panels);
    if (rows == 0) return;
    by_type(weight, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        const T* w = weight.as<T>();
        const auto& kernels = isa().typed(t);
        const int64_t size = panels.shape[1] * kPanel * 4, per_panel = scales.shape[1] * kPanel, ld = weight.strides[0];
        pybind11::gil_scoped_release release;
        parallel_for(ceil_div(rows, kPanel), 1, [&](int64_t begin, int64_t end) {
            for (int64_t p = begin; p < end; ++p) {
                const T* from = w + p * kPanel * ld;
                const int64_t count = std::min<int64_t>(kPanel, rows - p * kPanel), to = first / kPanel + p;
                uint8_t* panel = panels.as<uint8_t>() + to * size;
                float* s = scales.as<float>() + to * per_panel;
                if (nibbles) kernels.pack_int4(from, ld, count, k, group, panel, s, z.as<uint8_t>() + to * per_panel);
                else kernels.pack_int8(from, ld, count, k, panel, s);
            }
        });
    });
}

// Once every shape fits: an id is read only where `out` has a row for it.
void check_ids(const Array& ids, int64_t n) {
    if (n < 0) reject("n", "a number >= 0", std::to_string(n));
    for (int64_t t = 0; t < ids.shape[0]; ++t) {
        const int64_t id = ids.as<int64_t>()[t];
        if (id < 0 || id >= n) reject("ids", "0.." + std::to_string(n - 1), std::to_string(id));
    }
}

// Image embeddings among the tokens': row index[t] of `rows` is token t's, its own where that is -1. Without an index, all are.
struct Merge {
    Array index, rows;
    bool given;

    Merge(const pybind11::object& image_index, const pybind11::object& images)
        : index(optional_array(image_index)), rows(optional_array(images)), given(!image_index.is_none()) {
        if (given == images.is_none()) reject("images", "an image_index beside it, or neither", "one of them");
    }

    void check_for(const Array& out) const {
        if (!given) return;
        check(index, "image_index", {DType::int32}, {out.shape[0]});
        check(rows, "images", {out.dtype}, {kAny, out.shape[1]}, Layout::rows);
        check_written(out, "out", {{"image_index", index}, {"images", rows}});
        for (int64_t t = 0; t < out.shape[0]; ++t) {
            const int32_t at = index.as<int32_t>()[t];
            if (at < -1 || at >= rows.shape[0])
                reject("image_index", "-1.." + std::to_string(rows.shape[0] - 1), std::to_string(at));
        }
    }
};

// out[t] = an image's row, or what `token(id, row)` writes.
template <class T, class F>
void embed_rows(const Array& ids, const Merge& merge, const Array& out, const F& token) {
    const int64_t tokens = out.shape[0], k = out.shape[1];
    const int64_t* id = ids.as<int64_t>();
    pybind11::gil_scoped_release release;
    parallel_for(tokens, std::max<int64_t>(1, 16384 / std::max<int64_t>(k, 1)), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            T* to = out.as<T>() + t * k;
            const int32_t image = merge.given ? merge.index.as<int32_t>()[t] : -1;
            if (image < 0) token(id[t], to);
            else std::copy_n(merge.rows.as<T>() + image * merge.rows.strides[0], k, to);
        }
    });
}

void embed(const Array& ids, const Array& panels, int64_t n, const pybind11::object& image_index,
           const pybind11::object& images, const Array& out) {
    const Merge merge(image_index, images);
    check(ids, "ids", {DType::int64}, {kAny});
    check(out, "out", {panels.dtype}, {ids.shape[0], kAny});
    const int64_t k = out.shape[1];
    check_panels(panels, ceil_div(n, kPanel), k);
    check_written(out, "out", {{"ids", ids}, {"panels", panels}});
    check_ids(ids, n);
    merge.check_for(out);
    by_type(out, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        const int64_t size = ceil_div(k, kPerStep<T>) * kPerStep<T> * kPanel;
        embed_rows<T>(ids, merge, out, [&](int64_t id, T* to) {
            const T* panel = panels.as<T>() + id / kPanel * size;
            for (int64_t c = 0; c < k; ++c) to[c] = panel[place<T>(id % kPanel, c)];
        });
    });
}

// Rows of a matrix of bytes, as they are multiplied with: (w - 128) * scale.
void embed_int8(const Array& ids, const Array& panels, const Array& scales, int64_t n,
                const pybind11::object& image_index, const pybind11::object& images, const Array& out) {
    const Merge merge(image_index, images);
    check(ids, "ids", {DType::int64}, {kAny});
    check(out, "out", {DType::float32, DType::bfloat16}, {ids.shape[0], kAny});
    check_written(out, "out", {{"ids", ids}, {"panels", panels}, {"scales", scales}});
    const int64_t k = out.shape[1];
    if (check_quantized(panels, scales, nullptr, k, 0) != ceil_div(n, kPanel))
        reject("panels", std::to_string(ceil_div(n, kPanel)) + " panels", std::to_string(panels.shape[0]));
    check_ids(ids, n);
    merge.check_for(out);
    by_type(out, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        const auto dequantize = isa().typed(t).dequantize;
        embed_rows<T>(ids, merge, out, [&](int64_t id, T* to) {
            const uint8_t* panel = panels.as<uint8_t>() + id / kPanel * panels.shape[1] * kPanel * 4;
            dequantize(panel + id % kPanel * 4, scales.as<float>()[id], k, to);
        });
    });
}

}  // namespace

void bind_linear(pybind11::module_& m) {
    m.def("pack_panels", &pack_panels);
    m.def("linear", &linear);
    m.def("qlinear", &qlinear);
    m.def("pack_quantized", &pack_quantized);
    m.def("embed", &embed);
    m.def("embed_int8", &embed_int8);
}

}  // namespace pagemill
