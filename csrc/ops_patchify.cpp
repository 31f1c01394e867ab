// patchify: resize and patch order in one pass over the page, on the calling thread: pages are prepared side
// by side. Checks, and the plan of the resize.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "isa.h"

namespace py = pybind11;

namespace pagemill {
namespace {

constexpr int64_t kMaxSide = 1 << 20;

struct Axis {
    std::vector<int> first, count;
    std::vector<int32_t> weight;
    ResizeAxis view;
};

double bicubic(double x) {
    constexpr double a = -0.5;
    x = std::fabs(x);
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
    return 0.0;
}

// As Pillow computes them: in double, then rounded to fixed point.
Axis plan_axis(int in, int out) {
    Axis axis;
    const double scale = static_cast<double>(in) / out;
    const double filter_scale = std::max(scale, 1.0);  // widens the filter when shrinking (antialias)
    const double support = 2.0 * filter_scale;
    const int taps = static_cast<int>(std::ceil(support)) * 2 + 1;
    axis.first.resize(out);
    axis.count.resize(out);
    axis.weight.assign(static_cast<size_t>(out) * taps, 0);
    std::vector<double> w(taps);
    const double inverse = 1.0 / filter_scale;
    for (int i = 0; i < out; ++i) {
        const double center = (i + 0.5) * scale;
        const int lo = std::max(static_cast<int>(center - support + 0.5), 0);
        const int n = std::min(static_cast<int>(center + support + 0.5), in) - lo;
        double sum = 0.0;
        for (int t = 0; t < n; ++t) {
            w[t] = bicubic((t + lo - center + 0.5) * inverse);
            sum += w[t];
        }
        for (int t = 0; t < n; ++t) {
            const double v = (sum != 0.0 ? w[t] / sum : w[t]) * (1 << kPrecisionBits);
            axis.weight[static_cast<size_t>(i) * taps + t] = static_cast<int>(v < 0 ? v - 0.5 : v + 0.5);
        }
        axis.first[i] = lo;
        axis.count[i] = n;
    }
    axis.view = {in, out, taps, axis.first.data(), axis.count.data(), axis.weight.data()};
    return axis;
}

void run(PatchifyArgs& p) {
    const auto &x = p.x, &y = p.y;
    // Because of the rounding in between, the order of the passes shows in the last bit. Pillow 13 begins with the
    // vertical one where the height shrinks by more than twice the pixels that the width does.
    p.vertical_first = y.in > y.out && y.in - y.out > 2 * (x.in - x.out);
    p.vertical_second = !p.vertical_first && y.in != y.out;
    int span = 0;
    for (int row = 0; row < y.out; row += p.patch)
        span = std::max(span, p.end_row(row + p.patch - 1) - p.first_row(row));
    p.stride = (int64_t{3} * x.out + kStripAlign - 1) / kStripAlign * kStripAlign;
    const int64_t source = int64_t{3} * x.in * kStrip;
    const int64_t sizes[] = {(span + 2 * kStrip) * p.stride, p.patch * p.stride, source, source, p.stride * kStrip};
    uint8_t** const parts[] = {&p.window, &p.band, &p.block, &p.tile, &p.turned};
    int64_t total = 0;
    for (int64_t size : sizes) total += size;
    std::vector<uint8_t> memory(total);
    int64_t at = 0;
    for (int i = 0; i < 5; ++i) {
        *parts[i] = memory.data() + at;
        at += sizes[i];
    }
    isa().patchify(p);
}

void require(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument("patchify: " + message);
}

py::array patchify(const py::array& rgb, int64_t out_h, int64_t out_w, int patch, int merge) {
    require(py::isinstance<py::array_t<uint8_t>>(rgb) && rgb.ndim() == 3 && rgb.shape(2) == 3 &&
                (rgb.flags() & py::array::c_style),
            "the page must be a C-contiguous uint8 array [height, width, 3]");
    require(rgb.shape(0) >= 1 && rgb.shape(1) >= 1 && rgb.shape(0) <= kMaxSide && rgb.shape(1) <= kMaxSide,
            "the page's sides must be between 1 and 2**20 pixels");
    require(patch >= 1 && patch <= 256 && merge >= 1 && merge <= 16,
            "patch_size must be in 1..256, merge_size in 1..16");
    require(out_h >= 1 && out_w >= 1 && out_h <= kMaxSide && out_w <= kMaxSide && out_h % (patch * merge) == 0 &&
                out_w % (patch * merge) == 0,
            "the size must be positive multiples of patch_size * merge_size, up to 2**20");

    const py::ssize_t grid_h = out_h / patch, grid_w = out_w / patch;
    py::array_t<uint8_t> patches({grid_h * grid_w, py::ssize_t{3} * patch * patch});
    PatchifyArgs args{};
    args.rgb = static_cast<const uint8_t*>(rgb.data());
    args.patches = patches.mutable_data();
    args.patch = patch, args.merge = merge;
    const int in_h = static_cast<int>(rgb.shape(0)), in_w = static_cast<int>(rgb.shape(1));
    {
        py::gil_scoped_release release;
        const Axis x = plan_axis(in_w, static_cast<int>(out_w)), y = plan_axis(in_h, static_cast<int>(out_h));
        args.x = x.view, args.y = y.view;
        run(args);
    }
    return std::move(patches);
}

}  // namespace

void bind_patchify(py::module_& m) {
    m.def("patchify", &patchify, py::arg("rgb"), py::arg("height"), py::arg("width"), py::arg("patch_size"),
          py::arg("merge_size"));
}

}  // namespace pagemill
