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

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows first..first+rows-1 of a float32 weight into panels; `first` is a multiple of kPanel.
void pack_panels(const Array& weight, int64_t first, const Array& panels) {
    check(weight, "weight", {DType::float32}, {kAny, kAny}, Layout::rows);
    const int64_t rows = weight.shape[0], k = weight.shape[1], ld = weight.strides[0];
    check(panels, "panels", {DType::float32}, {kAny, k, kPanel});
    if (first < 0 || first % kPanel || ceil_div(first + rows, kPanel) > panels.shape[0])
        reject("first", "a multiple of 32 whose rows fit the panels", std::to_string(first));
    const float* from = weight.as<float>();
    float* to = panels.as<float>() + first * k;
    pybind11::gil_scoped_release release;
    parallel_for(ceil_div(rows, kPanel), 1, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
            const int64_t count = std::min<int64_t>(kPanel, rows - p * kPanel);
            const float* w = from + p * kPanel * ld;
            float* panel = to + p * kPanel * k;
            for (int64_t c = 0; c < k; ++c) {
                for (int64_t r = 0; r < count; ++r) panel[c * kPanel + r] = w[r * ld + c];
                std::fill(panel + c * kPanel + count, panel + (c + 1) * kPanel, 0.0f);
            }
        }
    });
}

void linear(const Array& x, const Array& panels, const pybind11::object& bias, const Array& out) {
    check(panels, "panels", {DType::float32}, {kAny, kAny, kPanel});
    const int64_t count = panels.shape[0], k = panels.shape[1];
    check(x, "x", {DType::float32}, {kAny, k}, Layout::rows);
    check(out, "out", {DType::float32}, {x.shape[0], kAny});
    const int64_t m = x.shape[0], n = out.shape[1];
    if (ceil_div(n, kPanel) != count) reject("out", "columns that fill the panels", std::to_string(n));
    Array b;
    if (!bias.is_none()) {
        b = bias.cast<Array>();
        check(b, "bias", {DType::float32}, {count * kPanel});
    }
    if (k == 0) reject("panels", "at least one input column", "0");
    if (m == 0 || n == 0) return;

    LinearArgs args{x.as<float>(), x.strides[0], panels.as<float>(), b.as<float>(), out.as<float>(), m, n, k,
                    0, 0, 0, count};
    args.row_blocks = ceil_div(m, kRowBlock);
    args.row_block = ceil_div(m, args.row_blocks);
    const int64_t items = 4 * num_threads();
    args.panel_group = std::clamp<int64_t>(count * args.row_blocks / items / 4 * 4, 4, 32);
    const int64_t total = args.row_blocks * ceil_div(count, args.panel_group);
    const Isa& kernels = isa();
    pybind11::gil_scoped_release release;
    parallel_for(total, m * n * k < kSmall ? total : 1,
                 [&](int64_t begin, int64_t end) { kernels.linear(args, begin, end); });
}

void embed(const Array& ids, const Array& panels, int64_t n, const Array& out) {
    check(ids, "ids", {DType::int64}, {kAny});
    check(panels, "panels", {DType::float32}, {ceil_div(n, kPanel), kAny, kPanel});
    const int64_t tokens = ids.shape[0], k = panels.shape[1];
    check(out, "out", {DType::float32}, {tokens, k});
    const int64_t* id = ids.as<int64_t>();
    for (int64_t t = 0; t < tokens; ++t)
        if (id[t] < 0 || id[t] >= n) reject("ids", "0.." + std::to_string(n - 1), std::to_string(id[t]));
    const float* weight = panels.as<float>();
    float* to = out.as<float>();
    pybind11::gil_scoped_release release;
    parallel_for(tokens, std::max<int64_t>(1, 16384 / std::max<int64_t>(k, 1)), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            const float* column = weight + id[t] / kPanel * kPanel * k + id[t] % kPanel;
            for (int64_t c = 0; c < k; ++c) to[t * k + c] = column[c * kPanel];
        }
    });
}

}  // namespace

void bind_linear(pybind11::module_& m) {
    m.def("pack_panels", &pack_panels);
    m.def("linear", &linear);
    m.def("embed", &embed);
}

}  // namespace pagemill
