// patchify: resize, normalise and patch order in one pass over the page. The contract is in kernels/patchify.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <exception>
#include <stdexcept>
#include <string>
#include <thread>

#include "patchify_resize.h"

namespace py = pybind11;

namespace pagemill {
namespace {

constexpr int64_t kMaxSide = 1 << 20;
constexpr int kMaxThreads = 256;

struct Job {
    const uint8_t* rgb;   // [in_h, in_w, 3]
    float* patches;       // [grid_h * grid_w, 3 * temporal * patch * patch]
    uint8_t* pixels;      // [3, out_h, out_w]: the resized page
    const float* lookup;  // [3, 256]: byte to normalised value, a channel each
    int patch, merge, temporal;
    Axis x, y;
};

// Write one row of patches from its `patch` planar pixel rows.
template <int PATCH>
PAGEMILL_INLINE void emit_patches(const Job& job, int grid_y, const uint8_t* band, ptrdiff_t stride) {
    const int p = PATCH ? PATCH : job.patch;
    const int grid_w = job.x.out / p;
    const int area = p * p;
    for (int grid_x = 0; grid_x < grid_w; ++grid_x) {
        const ptrdiff_t group = static_cast<ptrdiff_t>(grid_y / job.merge) * (grid_w / job.merge) + grid_x / job.merge;
        const ptrdiff_t index = (group * job.merge + grid_y % job.merge) * job.merge + grid_x % job.merge;
        float* dst = job.patches + index * 3 * job.temporal * area;
        for (int c = 0; c < 3; ++c) {
            const float* lookup = job.lookup + c * 256;
            const uint8_t* src = band + static_cast<ptrdiff_t>(c) * job.x.out + static_cast<ptrdiff_t>(grid_x) * p;
            for (int row = 0; row < p; ++row)
                for (int i = 0; i < p; ++i) dst[row * p + i] = lookup[src[row * stride + i]];
            // A still page is the same at every moment of the temporal patch.
            for (int t = 1; t < job.temporal; ++t) std::memcpy(dst + t * area, dst, area * sizeof(float));
            dst += job.temporal * area;
        }
    }
}

// Rows of patches [begin, end). The first pass runs ahead into a sliding window of planar rows, so that each
// source row is resized once.
template <int LANES>
PAGEMILL_INLINE void run_rows(const Job& job, int begin, int end) {
    const Axis &ax = job.x, &ay = job.y;
    const int p = job.patch;
    const bool vertical_first = vertical_goes_first(ax, ay);
    const bool vertical_second = !vertical_first && !ay.identity();
    const int window_height = vertical_second ? ay.in : ay.out;  // rows of the image that the window slides over
    const ptrdiff_t in_stride = static_cast<ptrdiff_t>(ax.in) * 3;
    const ptrdiff_t stride = (static_cast<ptrdiff_t>(ax.out) * 3 + kRowAlign - 1) / kRowAlign * kRowAlign;
    const auto first_row = [&](int y) { return vertical_second ? ay.first[y] : y; };
    const auto last_row = [&](int y) { return vertical_second ? ay.first[y] + ay.count[y] : y + 1; };
    int span = 0;
    for (int g = begin; g < end; ++g) span = std::max(span, last_row(g * p + p - 1) - first_row(g * p));

    std::vector<uint8_t> window(static_cast<size_t>(span + 2 * kRowBlock) * stride);
    std::vector<uint8_t> band(static_cast<size_t>(p) * stride);
    std::vector<uint8_t> block(vertical_first ? static_cast<size_t>(in_stride) * kRowBlock : 0);
    std::vector<uint8_t> tile(ax.identity() ? 0 : static_cast<size_t>(in_stride) * kRowBlock);
    std::vector<uint8_t> turned(ax.identity() ? 0 : static_cast<size_t>(stride) * kRowBlock);
    int base = first_row(begin * p), next = base;  // the window holds rows [base, next)

    for (int g = begin; g < end; ++g) {
        const int lo = first_row(g * p), hi = last_row(g * p + p - 1);
        const int kept = std::max(next - lo, 0);
        std::memmove(window.data(), window.data() + (next - kept - base) * stride, kept * stride);
        base = lo;
        next = lo + kept;
        for (; next < hi; next += kRowBlock) {
            uint8_t* dst = window.data() + (next - base) * stride;
            const uint8_t* rows[kRowBlock];
            for (int r = 0; r < kRowBlock; ++r) {
                const int y = std::min(next + r, window_height - 1);  // past the last row: repeated, never used
                if (vertical_first) {
                    uint8_t* row = block.data() + r * in_stride;
                    resize_vertical<LANES>(job.rgb + ay.first[y] * in_stride, in_stride, in_stride,
                                           &ay.weight[static_cast<size_t>(y) * ay.taps], ay.count[y], row);
                    rows[r] = row;
                } else {
                    rows[r] = job.rgb + y * in_stride;
                }
            }
            if (ax.identity())
                split_channels(rows, ax.in, dst, stride);
            else
                resize_horizontal<LANES>(rows, ax, tile.data(), turned.data(), dst, stride);
        }
        const uint8_t* ready = window.data();  // the band's rows; without a second pass, those of the window
        if (vertical_second) {
            for (int row = 0; row < p; ++row) {
                const int y = g * p + row;
                resize_vertical<LANES>(window.data() + (ay.first[y] - base) * stride, stride, stride,
                                       &ay.weight[static_cast<size_t>(y) * ay.taps], ay.count[y],
                                       band.data() + row * stride);
            }
            ready = band.data();
        }
        for (int c = 0; c < 3; ++c)
            for (int row = 0; row < p; ++row)
                std::memcpy(job.pixels + (static_cast<ptrdiff_t>(c) * ay.out + g * p + row) * ax.out,
                            ready + row * stride + static_cast<ptrdiff_t>(c) * ax.out, ax.out);
        if (p == 14)
            emit_patches<14>(job, g, ready, stride);
        else
            emit_patches<0>(job, g, ready, stride);
    }
}

typedef void (*Runner)(const Job&, int, int);

void run_portable(const Job& job, int begin, int end) { run_rows<4>(job, begin, end); }
#if defined(__x86_64__)
__attribute__((target("arch=x86-64-v3"))) void run_avx2(const Job& job, int begin, int end) {
    run_rows<8>(job, begin, end);
}
__attribute__((target("arch=x86-64-v4"))) void run_avx512(const Job& job, int begin, int end) {
    run_rows<16>(job, begin, end);
}
#endif

std::vector<std::pair<std::string, Runner>> runners() {  // best first
    std::vector<std::pair<std::string, Runner>> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("x86-64-v4")) found.emplace_back("avx512", run_avx512);
    if (__builtin_cpu_supports("x86-64-v3")) found.emplace_back("avx2", run_avx2);
#endif
    found.emplace_back("portable", run_portable);
    return found;
}

Runner choose(const std::string& isa) {
    std::string names;
    for (const auto& [name, runner] : runners()) {
        if (isa == "auto" || isa == name) return runner;
        names += (names.empty() ? "" : ", ") + name;
    }
    throw std::invalid_argument("patchify: isa '" + isa + "' does not run on this machine, which has auto, " + names);
}

// Give each thread an equal run of rows of patches; the first exception of any of them is thrown again here.
void run_threads(Runner runner, const Job& job, int grid_h, int num_threads) {
    const int n = std::min(num_threads, grid_h);
    std::vector<std::exception_ptr> errors(n);
    const auto part = [&](int i) {
        try {
            runner(job, static_cast<int>(static_cast<int64_t>(grid_h) * i / n),
                   static_cast<int>(static_cast<int64_t>(grid_h) * (i + 1) / n));
        } catch (...) {
            errors[i] = std::current_exception();
        }
    };
    std::vector<std::thread> threads;
    threads.reserve(n);
    int started = 1;
    try {
        for (; started < n; ++started) threads.emplace_back(part, started);
    } catch (const std::system_error&) {
        // The system gives no more threads: this one does the rest.
    }
    part(0);
    for (int i = started; i < n; ++i) part(i);
    for (auto& thread : threads) thread.join();
    for (const auto& error : errors)
        if (error) std::rethrow_exception(error);
}

void require(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument("patchify: " + message);
}

py::tuple patchify(const py::array& rgb, int64_t out_h, int64_t out_w, int patch, int merge, int temporal,
                   const py::array& lookup, int num_threads, const std::string& isa) {
    require(py::isinstance<py::array_t<uint8_t>>(rgb) && rgb.ndim() == 3 && rgb.shape(2) == 3 &&
                (rgb.flags() & py::array::c_style),
            "the page must be a C-contiguous uint8 array [height, width, 3]");
    require(rgb.shape(0) >= 1 && rgb.shape(1) >= 1 && rgb.shape(0) <= kMaxSide && rgb.shape(1) <= kMaxSide,
            "the page's sides must be between 1 and 2**20 pixels");
    require(patch >= 1 && patch <= 256 && merge >= 1 && merge <= 16 && temporal >= 1 && temporal <= 16,
            "patch_size must be in 1..256, merge_size and temporal_patch_size in 1..16");
    require(out_h >= 1 && out_w >= 1 && out_h <= kMaxSide && out_w <= kMaxSide && out_h % (patch * merge) == 0 &&
                out_w % (patch * merge) == 0,
            "the size must be positive multiples of patch_size * merge_size, up to 2**20");
    require(py::isinstance<py::array_t<float>>(lookup) && lookup.ndim() == 2 && lookup.shape(0) == 3 &&
                lookup.shape(1) == 256 && (lookup.flags() & py::array::c_style),
            "the lookup must be a C-contiguous float32 array [3, 256]");
    require(num_threads >= 1 && num_threads <= kMaxThreads, "num_threads must be in 1..256");
    const Runner runner = choose(isa);

    const py::ssize_t grid_h = out_h / patch, grid_w = out_w / patch;
    py::array_t<float> patches({grid_h * grid_w, static_cast<py::ssize_t>(3) * temporal * patch * patch});
    py::array_t<uint8_t> pixels({static_cast<py::ssize_t>(3), static_cast<py::ssize_t>(out_h), static_cast<py::ssize_t>(out_w)});
    const int in_h = static_cast<int>(rgb.shape(0)), in_w = static_cast<int>(rgb.shape(1));
    Job job{static_cast<const uint8_t*>(rgb.data()),
            patches.mutable_data(),
            pixels.mutable_data(),
            static_cast<const float*>(lookup.data()),
            patch,
            merge,
            temporal,
            {},
            {}};
    {
        py::gil_scoped_release release;
        job.x = plan_axis(in_w, static_cast<int>(out_w));
        job.y = plan_axis(in_h, static_cast<int>(out_h));
        run_threads(runner, job, static_cast<int>(grid_h), num_threads);
    }
    return py::make_tuple(std::move(patches), std::move(pixels));
}

}  // namespace

void bind_patchify(py::module_& m) {
    m.def("patchify", &patchify, py::arg("rgb"), py::arg("height"), py::arg("width"), py::arg("patch_size"),
          py::arg("merge_size"), py::arg("temporal_patch_size"), py::arg("lookup"), py::arg("num_threads") = 1,
          py::arg("isa") = "auto",
          "(patches, pixels) of a uint8 [H, W, 3] page resized to height x width; see pagemill.kernels.patchify");
    m.def(
        "patchify_isas",
        [] {
            py::list names;
            for (const auto& [name, runner] : runners()) names.append(name);
            return names;
        },
        "The instruction sets that patchify can run with on this machine, best first");
}

}  // namespace pagemill
