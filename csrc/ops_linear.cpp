// Linear layers over packed panels, and embedding rows read back from the same panels.
#include <pybind11/pybind11.h>

#include <algorithm>

#include "array.h"
#include "isa.h"
#include "threads.h"

namespace pagemill {
namespace {

constexpr int64_t kRowBlock = 96;   // rows of x staged at a time: with a panel they fit the L2 cache
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

template <class T>
void pack(const Array& weight, int64_t first, const Array& panels) {
    const int64_t rows = weight.shape[0], k = weight.shape[1], ld = weight.strides[0];
    const int64_t size = ceil_div(k, kPerStep<T>) * kPerStep<T> * kPanel;
    const T* from = weight.as<T>();
    T* to = panels.as<T>() + first / kPanel * size;
    pybind11::gil_scoped_release release;
    parallel_for(ceil_div(rows, kPanel), 1, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
            const int64_t count = std::min<int64_t>(kPanel, rows - p * kPanel);
            const T* w = from + p * kPanel * ld;
            T* panel = to + p * size;
            if (count < kPanel || k % kPerStep<T>) std::fill(panel, panel + size, T{});
            for (int64_t c = 0; c < k; ++c)
                for (int64_t r = 0; r < count; ++r) panel[place<T>(r, c)] = w[r * ld + c];
        }
    });
}

// The rows of `weight` become output rows first, first + 1, ...; `first` is a multiple of kPanel.
void pack_panels(const Array& weight, int64_t first, const Array& panels) {
    check(weight, "weight", {DType::float32, DType::bfloat16}, {kAny, kAny}, Layout::rows);
    const DType dtype = check_panels(panels, kAny, weight.shape[1]);
    check(weight, "weight", {dtype}, {kAny, kAny}, Layout::rows);
    check_written(panels, "panels", {{"weight", weight}});
    if (first < 0 || first % kPanel || first / kPanel > panels.shape[0] ||
        ceil_div(weight.shape[0], kPanel) > panels.shape[0] - first / kPanel)
        reject("first", "a multiple of 32 whose rows fit the panels", std::to_string(first));
    if (weight.size() == 0) return;
    if (dtype == DType::float32) pack<float>(weight, first, panels);
    else pack<bf16>(weight, first, panels);
}

template <class T>
void run(const Array& x, const Array& panels, const float* bias, const Array& out) {
    const int64_t m = x.shape[0], n = out.shape[1], k = x.shape[1], count = panels.shape[0];
    LinearArgs<T> args{};
    args.x = x.as<T>(), args.ldx = x.strides[0];
    args.panels = panels.as<T>(), args.bias = bias;
    if (out.dtype == x.dtype) args.out = out.as<T>();
    else args.out_wide = out.as<float>();
    args.m = m, args.n = n, args.k = k;
    args.row_blocks = ceil_div(m, kRowBlock);
    args.row_block = ceil_div(m, args.row_blocks);
    // Groups of panels small enough that their sums stay in cache, and that every thread gets some.
    args.panels_count = count;
    args.panel_group = std::clamp<int64_t>(count * args.row_blocks / (4 * num_threads()) / 4 * 4, 4, 8);
    const int64_t items = args.row_blocks * ceil_div(count, args.panel_group);
    const auto linear = isa().typed(static_cast<T*>(nullptr)).linear;
    pybind11::gil_scoped_release release;
    parallel_for(items, m * n * k < kSmall ? items : 1,
                 [&](int64_t begin, int64_t end) { linear(args, begin, end); });
}

void linear(const Array& x, int64_t in_features, const Array& panels, const pybind11::object& bias, const Array& out) {
    const int64_t count = panels.shape[0];
    const DType dtype = check_panels(panels, kAny, in_features);
    check(x, "x", {dtype}, {kAny, in_features}, Layout::rows);
    check(out, "out", {dtype, DType::float32}, {x.shape[0], kAny});
    const int64_t m = x.shape[0], n = out.shape[1];
    if (ceil_div(n, kPanel) != count) reject("out", "columns that fill the panels", std::to_string(n));
    const Array b = optional_array(bias);
    if (!bias.is_none()) check(b, "bias", {DType::float32}, {count * kPanel});
    check_written(out, "out", {{"x", x}, {"panels", panels}, {"bias", b}});
    if (in_features < 1) reject("x", "at least one column", std::to_string(in_features));
    if (m == 0 || n == 0) return;
    if (dtype == DType::float32) run<float>(x, panels, b.as<float>(), out);
    else run<bf16>(x, panels, b.as<float>(), out);
}

template <class T>
void gather(const Array& ids, const Array& panels, const Array& out) {
    const int64_t tokens = out.shape[0], k = out.shape[1], size = ceil_div(k, kPerStep<T>) * kPerStep<T> * kPanel;
    const int64_t* id = ids.as<int64_t>();
    T* to = out.as<T>();
    pybind11::gil_scoped_release release;
    parallel_for(tokens, std::max<int64_t>(1, 16384 / std::max<int64_t>(k, 1)), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            const T* panel = panels.as<T>() + id[t] / kPanel * size;
            for (int64_t c = 0; c < k; ++c) to[t * k + c] = panel[place<T>(id[t] % kPanel, c)];
        }
    });
}

void embed(const Array& ids, const Array& panels, int64_t n, const Array& out) {
    check(ids, "ids", {DType::int64}, {kAny});
    if (n < 0) reject("n", "a number >= 0", std::to_string(n));
    check(out, "out", {panels.dtype}, {ids.shape[0], kAny});
    const DType dtype = check_panels(panels, ceil_div(n, kPanel), out.shape[1]);
    check_written(out, "out", {{"ids", ids}, {"panels", panels}});
    for (int64_t t = 0; t < ids.shape[0]; ++t) {
        const int64_t id = ids.as<int64_t>()[t];
        if (id < 0 || id >= n) reject("ids", "0.." + std::to_string(n - 1), std::to_string(id));
    }
    if (dtype == DType::float32) gather<float>(ids, panels, out);
    else gather<bf16>(ids, panels, out);
}

}  // namespace

void bind_linear(pybind11::module_& m) {
    m.def("pack_panels", &pack_panels);
    m.def("linear", &linear);
    m.def("embed", &embed);
}

}  // namespace pagemill
