// Attention over the paged cache and over packed segments: checks, and the cut into items for the threads.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "array.h"
#include "isa.h"
#include "threads.h"

namespace pagemill {
namespace {

constexpr auto kFloats = {DType::float32, DType::bfloat16};
constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kRows = 144;  // (query, head) rows of an item: enough to pay for staging a tile of keys
constexpr size_t kItemsEach = 4;  // for every thread: with fewer items, the ranges of keys are items too

// Memory of the calling thread, kept from call to call.
template <class A>
struct Work {
    std::vector<A> items, parts;
    std::vector<int32_t> order;
    std::vector<float> partial;
};
template <class A>
Work<A>& begin_work() {
    static thread_local Work<A> work;
    work.items.clear();
    work.parts.clear();
    return work;
}

// kernel(item, the one after it or null) for all items.
template <class A, class Kernel>
void run_all(const std::vector<A>& items, std::vector<int32_t>& order, Kernel kernel) {
    // Long contexts first: the threads finish together.
    const auto cost = [&](int32_t i) { return (items[i].keys - items[i].first_key) * items[i].tokens; };
    const auto before = [&](int32_t i, int32_t j) { return cost(i) != cost(j) ? cost(i) > cost(j) : i < j; };
    order.resize(items.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
    if (!std::is_sorted(order.begin(), order.end(), before)) std::sort(order.begin(), order.end(), before);
    const int64_t count = static_cast<int64_t>(items.size());
    const int64_t chunk = std::clamp<int64_t>(count / (16 * num_threads()), 1, 16);
    parallel_for(count, chunk, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) kernel(items[order[i]], i + 1 < end ? &items[order[i + 1]] : nullptr);
    });
}

// Items whose keys are split into ranges become parts, which are joined once all are done.
template <class A, class Kernel, class Join>
void run(Work<A>& work, Kernel attention, Join join_ranges) {
    int64_t floats = 0;
    if (work.items.size() < kItemsEach * static_cast<size_t>(num_threads())) {
        for (A& a : work.items)
            if (a.keys > kAttentionRange)
                floats += (a.keys + kAttentionRange - 1) / kAttentionRange * a.tokens * a.group * attention_partial(a.d);
    }
    if (!floats) return run_all(work.items, work.order, attention);

    if (static_cast<int64_t>(work.partial.size()) < floats) work.partial.resize(floats);
    float* partial = work.partial.data();
    auto whole = work.items.begin();
    for (A& a : work.items) {
        if (a.keys <= kAttentionRange) {
            work.parts.push_back(a);
            continue;
        }
        a.partial = partial;
        for (int64_t start = 0; start < a.keys; start += kAttentionRange) {
            A part = a;
            part.first_key = start, part.keys = std::min(start + kAttentionRange, a.keys), part.partial = partial;
            work.parts.push_back(part);
            partial += a.tokens * a.group * attention_partial(a.d);
        }
        *whole++ = a;
    }
    work.items.erase(whole, work.items.end());
    run_all(work.parts, work.order, attention);
    run_all(work.items, work.order, [&](const A& a, const A*) { join_ranges(a); });
}

template <class T, class C>
void run(Work<AttentionArgs<T, C>>& work) {
    const auto& kernels = isa().typed(static_cast<T*>(nullptr));
    if constexpr (std::is_same_v<T, C>) run(work, kernels.attention, kernels.join_ranges);
    else run(work, kernels.attention_int8, kernels.join_ranges_int8);
}

// Calls add(first, count) for near-equal pieces of `tokens`, each of at most `most` rows of `group`.
template <class F>
void cut(int64_t tokens, int64_t group, const F& add) {
    const int64_t most = std::max<int64_t>(1, kRows / group);
    const int64_t pieces = (tokens + most - 1) / most;
    for (int64_t i = 0; i < pieces; ++i) {
        const int64_t first = tokens * i / pieces;
        add(first, tokens * (i + 1) / pieces - first);
    }
}

void check_starts(const Array& starts, const char* argument, int64_t tokens) {
    const int32_t* at = starts.as<int32_t>();
    const int64_t n = starts.shape[0];
    bool rises = n > 0 && at[0] == 0 && at[n - 1] == tokens;
    for (int64_t i = 1; rises && i < n; ++i) rises = at[i - 1] <= at[i];
    if (!rises) reject(argument, "values rising from 0 to " + std::to_string(tokens), "others");
}

template <class T, class C>
void paged(const Array& q, const Array& k_cache, const Array& v_cache, const Array& tables, const Array& starts,
           const Array& lens, float scale, const Array& k_scale, const Array& v_scale, const Array& out) {
    const int64_t heads = q.shape[1], d = q.shape[2], kv_heads = k_cache.shape[1], block_size = k_cache.shape[3];
    const int64_t group = heads / kv_heads, stride = kv_heads * d * block_size;
    auto& work = begin_work<AttentionArgs<T, C>>();
    for (int64_t s = 0; s < lens.shape[0]; ++s) {
        const int64_t row = starts.as<int32_t>()[s], count = starts.as<int32_t>()[s + 1] - row;
        if (count == 0) continue;
        const int64_t context = lens.as<int32_t>()[s], used = (context + block_size - 1) / block_size;
        const std::string index = "[" + std::to_string(s) + "]";
        if (context < count)
            reject("context_lens" + index, "at least the chunk's " + std::to_string(count) + " tokens",
                   std::to_string(context));
        if (used > tables.shape[1])
            reject("block_tables", "at least " + std::to_string(used) + " columns", std::to_string(tables.shape[1]));
        const int32_t* table = tables.as<int32_t>() + s * tables.strides[0];
        for (int64_t i = 0; i < used; ++i)
            if (table[i] < 0 || table[i] >= k_cache.shape[0])
                reject("block_tables" + index, "0.." + std::to_string(k_cache.shape[0] - 1), std::to_string(table[i]));
        for (int64_t h = 0; h < kv_heads; ++h) {
            cut(count, group, [&](int64_t first, int64_t tokens) {
                AttentionArgs<T, C> a{};
                a.q = q.as<T>() + (row + first) * q.strides[0] + h * group * q.strides[1];
                a.q_token = q.strides[0], a.q_head = q.strides[1];
                a.out = out.as<T>() + ((row + first) * heads + h * group) * d;
                a.out_token = heads * d, a.out_head = d;
                a.tokens = tokens, a.group = group, a.d = d, a.scale = scale;
                a.causal = true;
                a.causal_first = context - count + first + 1;
                a.keys = a.causal_first + tokens - 1;
                a.k = k_cache.as<C>() + h * d * block_size;
                a.v = v_cache.as<C>() + h * d * block_size;
                if (k_scale.data) {
                    a.k_scale = k_scale.as<float>() + h * block_size;
                    a.v_scale = v_scale.as<float>() + h * block_size;
                    a.scale_stride = kv_heads * block_size;
                }
                a.blocks = table, a.block_stride = stride, a.block_size = block_size;
                work.items.push_back(a);
            });
        }
    }
    pybind11::gil_scoped_release release;
    run(work);
}

void paged_attention(const Array& q, const Array& k_cache, const Array& v_cache, const Array& tables,
                     const Array& starts, const Array& lens, float scale, const pybind11::object& k_scale,
                     const pybind11::object& v_scale, const Array& out) {
    check(q, "q", kFloats, {kAny, kAny, kAny}, Layout::rows);
    const int64_t heads = q.shape[1], d = q.shape[2];
    const Array key_scale = optional_array(k_scale), value_scale = optional_array(v_scale);
    const bool int8 = !k_scale.is_none();
    if (int8 == v_scale.is_none()) reject("v_scale", "one with k_scale, or neither", "one of the two");
    const DType stored = int8 ? DType::int8 : q.dtype;
    check(k_cache, "k_cache", {stored}, {kAny, kAny, d, kAny});
    const int64_t kv_heads = k_cache.shape[1];
    if (int8) {
        check(key_scale, "k_scale", {DType::float32}, {k_cache.shape[0], kv_heads, k_cache.shape[3]});
        check(value_scale, "v_scale", {DType::float32}, {k_cache.shape[0], kv_heads, k_cache.shape[3]});
    }
    check(v_cache, "v_cache", {stored}, {k_cache.shape[0], kv_heads, k_cache.shape[3], d});
    if (kv_heads == 0 || heads % kv_heads)
        reject("q", "a number of heads that is a multiple of " + std::to_string(kv_heads), std::to_string(heads));
    if (d < 1 || d > kMaxHeadDim) reject("q", "a head_dim of 1..256", std::to_string(d));
    if (k_cache.shape[3] == 0) reject("k_cache", "a block size of at least 1", "0");
    check(lens, "context_lens", {DType::int32}, {kAny});
    check(tables, "block_tables", {DType::int32}, {lens.shape[0], kAny}, Layout::rows);
    check(starts, "query_start", {DType::int32}, {lens.shape[0] + 1});
    check(out, "out", {q.dtype}, {q.shape[0], heads, d});
    check_written(out, "out", {{"q", q}, {"k_cache", k_cache}, {"v_cache", v_cache}, {"block_tables", tables},
                               {"query_start", starts}, {"context_lens", lens}, {"k_scale", key_scale},
                               {"v_scale", value_scale}});
    check_starts(starts, "query_start", q.shape[0]);
    if (heads == 0) return;
    const auto attend = [&](auto* t, auto* c) {
        paged<std::remove_pointer_t<decltype(t)>, std::remove_pointer_t<decltype(c)>>(
            q, k_cache, v_cache, tables, starts, lens, scale, key_scale, value_scale, out);
    };
    float* f32 = nullptr;
    bf16* b16 = nullptr;
    int8_t* i8 = nullptr;
    if (q.dtype == DType::float32) int8 ? attend(f32, i8) : attend(f32, f32);
    else int8 ? attend(b16, i8) : attend(b16, b16);
}

template <class T>
void varlen(const Array& q, const Array& k, const Array& v, const Array& starts, float scale, const Array& out) {
    const int64_t heads = q.shape[1], d = q.shape[2];
    auto& work = begin_work<AttentionArgs<T, T>>();
    for (int64_t s = 0; s + 1 < starts.shape[0]; ++s) {
        const int64_t row = starts.as<int32_t>()[s], count = starts.as<int32_t>()[s + 1] - row;
        for (int64_t h = 0; h < heads; ++h) {
            cut(count, 1, [&](int64_t first, int64_t tokens) {
                AttentionArgs<T, T> a{};
                a.q = q.as<T>() + (row + first) * q.strides[0] + h * q.strides[1];
                a.q_token = q.strides[0], a.q_head = q.strides[1];
                a.out = out.as<T>() + ((row + first) * heads + h) * d;
                a.out_token = heads * d, a.out_head = d;
                a.tokens = tokens, a.group = 1, a.d = d, a.scale = scale;
                a.keys = count;
                a.k = k.as<T>() + row * k.strides[0] + h * k.strides[1];
                a.v = v.as<T>() + row * v.strides[0] + h * v.strides[1];
                a.k_key = k.strides[0], a.v_key = v.strides[0];
                work.items.push_back(a);
            });
        }
    }
    pybind11::gil_scoped_release release;
    run(work);
}

void varlen_attention(const Array& q, const Array& k, const Array& v, const Array& starts, float scale,
                      const Array& out) {
    check(q, "q", kFloats, {kAny, kAny, kAny}, Layout::rows);
    const int64_t tokens = q.shape[0], heads = q.shape[1], d = q.shape[2];
    check(k, "k", {q.dtype}, {tokens, heads, d}, Layout::rows);
    check(v, "v", {q.dtype}, {tokens, heads, d}, Layout::rows);
    check(starts, "cu_seqlens", {DType::int32}, {kAny});
    check(out, "out", {q.dtype}, {tokens, heads, d});
    check_written(out, "out", {{"q", q}, {"k", k}, {"v", v}, {"cu_seqlens", starts}});
    check_starts(starts, "cu_seqlens", tokens);
    if (d < 1 || d > kMaxHeadDim) reject("q", "a head_dim of 1..256", std::to_string(d));
    if (q.dtype == DType::float32) varlen<float>(q, k, v, starts, scale, out);
    else varlen<bf16>(q, k, v, starts, scale, out);
}

}  // namespace

void bind_attention(pybind11::module_& m) {
    m.def("paged_attention", &paged_attention);
    m.def("varlen_attention", &varlen_attention);
}

}  // namespace pagemill
