// Norms, activations, rotary embedding and greedy choice: checks, and rows spread over threads.
#include <pybind11/pybind11.h>

#include <algorithm>

#include "array.h"
#include "isa.h"
#include "threads.h"

namespace pagemill {
namespace {

constexpr auto kFloats = {DType::float32, DType::bfloat16};
constexpr int64_t kMaxHeads = 1 << 20;
constexpr int64_t kMaxMoments = 64;
constexpr int64_t kGrain = 16384;  // elements of a chunk: some microseconds

int64_t rows_of(int64_t width) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(width, 1)); }

// Calls f with a null pointer of the element type.
template <class F>
void by_type(const Array& a, const F& f) {
    if (a.dtype == DType::float32) f(static_cast<float*>(nullptr));
    else f(static_cast<bf16*>(nullptr));
}

void rms_norm(const Array& x, const Array& weight, float eps, const Array& out) {
    check(x, "x", kFloats, {kAny, kAny}, Layout::rows);
    const int64_t m = x.shape[0], h = x.shape[1];
    check(weight, "weight", {x.dtype}, {h});
    check(out, "out", {x.dtype}, {m, h});
    check_written(out, "out", {{"x", x}, {"weight", weight}});
    if (!(eps >= 0)) reject("eps", "a number >= 0", std::to_string(eps));
    if (out.size() == 0) return;
    by_type(x, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        const NormArgs<T> args{x.as<T>(), x.strides[0], weight.as<T>(), eps, out.as<T>(), h};
        const auto& kernels = isa().typed(t);
        pybind11::gil_scoped_release release;
        parallel_for(m, rows_of(h), [&](int64_t begin, int64_t end) { kernels.rms_norm(args, begin, end); });
    });
}

void swiglu(const Array& gate_up, const Array& out) {
    check(gate_up, "gate_up", kFloats, {kAny, kAny}, Layout::rows);
    const int64_t m = gate_up.shape[0], width = gate_up.shape[1] / 2;
    if (gate_up.shape[1] % 2) reject("gate_up", "an even number of columns", std::to_string(gate_up.shape[1]));
    check(out, "out", {gate_up.dtype}, {m, width});
    check_written(out, "out", {{"gate_up", gate_up}});
    if (out.size() == 0) return;
    by_type(gate_up, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        const auto& kernels = isa().typed(t);
        pybind11::gil_scoped_release release;
        parallel_for(m, std::max<int64_t>(1, rows_of(width) / 4), [&](int64_t begin, int64_t end) {
            kernels.swiglu(gate_up.as<T>(), gate_up.strides[0], out.as<T>(), width, begin, end);
        });
    });
}

void gelu(const Array& x, const Array& out) {
    check(x, "x", kFloats, {kAny, kAny});
    check(out, "out", {x.dtype}, {x.shape[0], x.shape[1]});
    check_written(out, "out", {{"x", x}});
    by_type(x, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        const auto& kernels = isa().typed(t);
        pybind11::gil_scoped_release release;
        parallel_for(x.size(), kGrain / 4,
                     [&](int64_t begin, int64_t end) { kernels.gelu(x.as<T>(), out.as<T>(), begin, end); });
    });
}

void check_angles(const Array& cos, const Array& sin, int64_t tokens, int64_t d) {
    if (d % 2) reject("head_dim", "an even number", std::to_string(d));
    check(cos, "cos", {DType::float32}, {tokens, d / 2});
    check(sin, "sin", {DType::float32}, {tokens, d / 2});
}

template <class T>
void rotate(const RotaryArgs<T>& args, int64_t tokens) {
    const auto& kernels = isa().typed(args.x);
    pybind11::gil_scoped_release release;
    parallel_for(tokens, rows_of((args.heads + 2 * args.kv_heads) * args.d),
                 [&](int64_t begin, int64_t end) { kernels.rotary(args, begin, end); });
}

void rotary(const Array& x, const Array& cos, const Array& sin) {
    check(x, "x", kFloats, {kAny, kAny, kAny}, Layout::rows);
    check_angles(cos, sin, x.shape[0], x.shape[2]);
    check_written(x, "x", {{"cos", cos}, {"sin", sin}});
    if (x.size() == 0) return;
    by_type(x, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        rotate(RotaryArgs<T>{x.as<T>(), x.strides[0], x.strides[1], cos.as<float>(), sin.as<float>(), x.shape[2] / 2,
                             x.shape[1], 0, x.shape[2], nullptr, nullptr, nullptr, 1, nullptr, nullptr, nullptr, nullptr},
               x.shape[0]);
    });
}

void rotary_cache(const Array& qkv, const Array& cos, const Array& sin, const Array& slots, const Array& k_cache,
                  const Array& v_cache, int64_t heads, int64_t kv_heads, const pybind11::object& k_scale,
                  const pybind11::object& v_scale) {
    if (std::min(heads, kv_heads) < 0 || std::max(heads, kv_heads) > kMaxHeads)
        reject("num_heads", "numbers in 0..2^20", std::to_string(heads) + " and " + std::to_string(kv_heads));
    check(qkv, "qkv", kFloats, {kAny, kAny}, Layout::rows);
    const bool int8 = !k_scale.is_none();
    if (int8 == v_scale.is_none()) reject("v_scale", "one with k_scale, or neither", "one of the two");
    check(k_cache, "k_cache", {int8 ? DType::int8 : qkv.dtype}, {kAny, kv_heads, kAny, kAny});
    const int64_t blocks = k_cache.shape[0], d = k_cache.shape[2], block_size = k_cache.shape[3];
    check(v_cache, "v_cache", {k_cache.dtype}, {blocks, kv_heads, block_size, d});
    check(qkv, "qkv", kFloats, {kAny, (heads + 2 * kv_heads) * d}, Layout::rows);
    const Array key_scale = optional_array(k_scale), value_scale = optional_array(v_scale);
    if (int8) {
        check(key_scale, "k_scale", {DType::float32}, {blocks, kv_heads, block_size});
        check(value_scale, "v_scale", {DType::float32}, {blocks, kv_heads, block_size});
        if (d > 256) reject("k_cache", "a head_dim of at most 256", std::to_string(d));
        check_written(key_scale, "k_scale", {{"qkv", qkv}, {"cos", cos}, {"sin", sin}, {"slots", slots},
                                             {"k_cache", k_cache}, {"v_cache", v_cache}});
        check_written(value_scale, "v_scale", {{"qkv", qkv}, {"cos", cos}, {"sin", sin}, {"slots", slots},
                                               {"k_cache", k_cache}, {"v_cache", v_cache}, {"k_scale", key_scale}});
    }
    const int64_t tokens = qkv.shape[0];
    check_angles(cos, sin, tokens, d);
    check(slots, "slots", {DType::int64}, {tokens});
    check_written(qkv, "qkv", {{"cos", cos}, {"sin", sin}, {"slots", slots}});
    check_written(k_cache, "k_cache", {{"qkv", qkv}, {"cos", cos}, {"sin", sin}, {"slots", slots}});
    check_written(v_cache, "v_cache", {{"qkv", qkv}, {"cos", cos}, {"sin", sin}, {"slots", slots}, {"k_cache", k_cache}});
    const int64_t* slot = slots.as<int64_t>();
    for (int64_t t = 0; t < tokens; ++t)
        if (slot[t] < -1 || slot[t] >= blocks * block_size)
            reject("slots", "-1.." + std::to_string(blocks * block_size - 1), std::to_string(slot[t]));
    if (qkv.size() == 0) return;
    by_type(qkv, [&](auto* p) {
        using T = std::remove_pointer_t<decltype(p)>;
        RotaryArgs<T> args{};
        args.x = qkv.as<T>(), args.token_stride = qkv.strides[0], args.head_stride = d;
        args.cos = cos.as<float>(), args.sin = sin.as<float>(), args.angle_stride = d / 2;
        args.heads = heads, args.kv_heads = kv_heads, args.d = d;
        args.slots = slot, args.block_size = block_size;
        if (int8) {
            args.k_codes = k_cache.as<int8_t>(), args.v_codes = v_cache.as<int8_t>();
            args.k_scale = key_scale.as<float>(), args.v_scale = value_scale.as<float>();
        } else {
            args.k_cache = k_cache.as<T>(), args.v_cache = v_cache.as<T>();
        }
        rotate(args, tokens);
    });
}

void mrope_angles(const Array& positions, const Array& axis, const Array& cos, const Array& sin, const Array& cos_out,
                  const Array& sin_out) {
    check(positions, "positions", {DType::int64}, {3, kAny});
    check(axis, "axis", {DType::int64}, {kAny});
    const int64_t tokens = positions.shape[1], width = axis.shape[0];
    check(cos, "cos", {DType::float32}, {kAny, width});
    check(sin, "sin", {DType::float32}, {cos.shape[0], width});
    check(cos_out, "cos_out", {DType::float32}, {tokens, width});
    check(sin_out, "sin_out", {DType::float32}, {tokens, width});
    check_written(cos_out, "cos_out", {{"positions", positions}, {"axis", axis}, {"cos", cos}, {"sin", sin}});
    check_written(sin_out, "sin_out",
                  {{"positions", positions}, {"axis", axis}, {"cos", cos}, {"sin", sin}, {"cos_out", cos_out}});
    const int64_t *position = positions.as<int64_t>(), *turns = axis.as<int64_t>();
    const auto require = [](const char* name, const int64_t* values, int64_t count, int64_t limit) {
        for (int64_t i = 0; i < count; ++i)
            if (values[i] < 0 || values[i] >= limit)
                reject(name, "0.." + std::to_string(limit - 1), std::to_string(values[i]));
    };
    require("positions", position, 3 * tokens, cos.shape[0]);
    require("axis", turns, width, 3);
    const float *from_cos = cos.as<float>(), *from_sin = sin.as<float>();
    float *to_cos = cos_out.as<float>(), *to_sin = sin_out.as<float>();
    pybind11::gil_scoped_release release;
    parallel_for(tokens, rows_of(width), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
            for (int64_t f = 0; f < width; ++f) {
                const int64_t at = position[turns[f] * tokens + t] * width + f;
                to_cos[t * width + f] = from_cos[at];
                to_sin[t * width + f] = from_sin[at];
            }
    });
}

void pixel_values(const Array& patches, const Array& order, const Array& levels, int64_t moments, const Array& out) {
    check(levels, "levels", kFloats, {kAny, 256});
    const int64_t channels = levels.shape[0];
    check(patches, "patches", {DType::uint8}, {kAny, kAny});
    const int64_t count = patches.shape[0], width = patches.shape[1];
    if (channels == 0 || width % channels)
        reject("patches", "columns that " + std::to_string(channels) + " channels share", std::to_string(width));
    if (moments < 1 || moments > kMaxMoments)
        reject("moments", "1.." + std::to_string(kMaxMoments), std::to_string(moments));
    check(order, "order", {DType::int64}, {kAny});
    const int64_t rows = order.shape[0];
    check(out, "out", {levels.dtype}, {rows, width * moments});
    check_written(out, "out", {{"patches", patches}, {"order", order}, {"levels", levels}});
    for (int64_t i = 0; i < rows; ++i)
        if (const int64_t at = order.as<int64_t>()[i]; at < 0 || at >= count)
            reject("order", "0.." + std::to_string(count - 1), std::to_string(at));
    if (out.size() == 0) return;
    by_type(levels, [&](auto* t) {
        using T = std::remove_pointer_t<decltype(t)>;
        const PixelArgs<T> args{patches.as<uint8_t>(), order.as<int64_t>(), levels.as<T>(), out.as<T>(),
                                channels, moments, width / channels};
        const auto& kernels = isa().typed(t);
        pybind11::gil_scoped_release release;
        parallel_for(rows, rows_of(width * moments),
                     [&](int64_t begin, int64_t end) { kernels.pixel_values(args, begin, end); });
    });
}

void greedy(const Array& logits, const pybind11::object& mask, const Array& token, const Array& logprob) {
    check(logits, "logits", {DType::float32}, {kAny, kAny}, Layout::rows);
    const int64_t rows = logits.shape[0], n = logits.shape[1];
    if (n == 0) reject("logits", "at least one column", "0");
    const Array m = optional_array(mask);
    if (!mask.is_none()) check(m, "mask", {DType::int32}, {rows, (n + 31) / 32}, Layout::rows);
    check(token, "token", {DType::int64}, {rows});
    check(logprob, "logprob", {DType::float32}, {rows});
    check_written(token, "token", {{"logits", logits}, {"mask", m}});
    check_written(logprob, "logprob", {{"logits", logits}, {"mask", m}, {"token", token}});
    const Isa& kernels = isa();
    pybind11::gil_scoped_release release;
    parallel_for(rows, std::max<int64_t>(1, rows_of(n) / 4), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
            kernels.greedy(logits.as<float>() + row * logits.strides[0],
                           m.data ? m.as<uint32_t>() + row * m.strides[0] : nullptr, n,
                           token.as<int64_t>() + row, logprob.as<float>() + row);
    });
}

}  // namespace

void bind_elementwise(pybind11::module_& m) {
    m.def("rms_norm", &rms_norm);
    m.def("swiglu", &swiglu);
    m.def("gelu", &gelu);
    m.def("rotary", &rotary);
    m.def("rotary_cache", &rotary_cache);
    m.def("mrope_angles", &mrope_angles);
    m.def("pixel_values", &pixel_values);
    m.def("greedy", &greedy);
}

}  // namespace pagemill
