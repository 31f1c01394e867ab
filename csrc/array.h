// Arrays from Python through DLPack: no copy, no link against torch.
//
// An argument of type Array accepts a "dltensor" capsule or any object with __dlpack__. The capsule is never
// consumed (never renamed to "used_dltensor"): whoever made it still owns the memory, Array keeps it alive.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace pagemill {

// The DLPack ABI (https://dmlc.github.io/dlpack, version 0.x capsules), as far as it is read here.
namespace dlpack {
struct Device { int32_t type, id; };
struct DataType { uint8_t code, bits; uint16_t lanes; };
struct Tensor {
    void* data;
    Device device;
    int32_t ndim;
    DataType dtype;
    int64_t* shape;
    int64_t* strides;  // in elements; null: row-major
    uint64_t byte_offset;
};
constexpr int32_t kCPU = 1;
constexpr uint8_t kInt = 0, kFloat = 2, kBfloat = 4;
}  // namespace dlpack

enum class DType { float32, bfloat16, int8, int32, int64, other };

struct Array {
    static constexpr int kMaxDims = 6;

    pybind11::object owner;
    char* data = nullptr;
    DType dtype = DType::other;
    bool on_cpu = false;
    int ndim = 0;
    int64_t shape[kMaxDims] = {};
    int64_t strides[kMaxDims] = {};

    template <class T>
    T* as() const { return reinterpret_cast<T*>(data); }

    bool contiguous() const {
        if (size() == 0) return true;  // whatever the strides: there is nothing to step over
        int64_t expected = 1;
        for (int i = ndim - 1; i >= 0; --i) {
            if (shape[i] != 1 && strides[i] != expected) return false;
            expected *= shape[i];
        }
        return true;
    }
    int64_t size() const {
        int64_t n = 1;
        for (int i = 0; i < ndim; ++i) n *= shape[i];
        return n;
    }
};

inline const char* dtype_name(DType dtype) {
    switch (dtype) {
        case DType::float32: return "float32";
        case DType::bfloat16: return "bfloat16";
        case DType::int8: return "int8";
        case DType::int32: return "int32";
        case DType::int64: return "int64";
        default: return "another dtype";
    }
}

[[noreturn]] inline void reject(const std::string& argument, const std::string& wanted, const std::string& found) {
    throw std::invalid_argument(argument + ": expected " + wanted + ", found " + found);
}

constexpr int64_t kAny = -1;
enum class Layout { rows, contiguous };  // rows: only the last dimension must be dense

// Throws ValueError naming the argument unless dtype, shape (kAny: free), device and layout fit.
inline void check(const Array& a, const char* argument, std::initializer_list<DType> dtypes,
                  std::initializer_list<int64_t> shape, Layout layout = Layout::contiguous) {
    bool fits = a.on_cpu && a.ndim == static_cast<int>(shape.size());
    bool known = false;
    for (DType d : dtypes) known |= d == a.dtype;
    fits &= known;
    if (fits) {
        int i = 0;
        for (int64_t want : shape) {
            fits &= want == kAny || want == a.shape[i];
            ++i;
        }
        const int last = a.ndim - 1;
        fits &= layout == Layout::contiguous ? a.contiguous()
                                             : a.size() == 0 || last < 0 || a.shape[last] == 1 || a.strides[last] == 1;
    }
    if (fits) return;
    std::string wanted;
    for (DType d : dtypes) wanted += std::string(wanted.empty() ? "" : "|") + dtype_name(d);
    wanted += " [";
    int i = 0;
    for (int64_t want : shape) wanted += (i++ ? ", " : "") + (want == kAny ? "*" : std::to_string(want));
    wanted += layout == Layout::contiguous ? "] contiguous on the CPU" : "] with dense rows on the CPU";
    std::string found = std::string(dtype_name(a.dtype)) + " [";
    for (i = 0; i < a.ndim; ++i) found += (i ? ", " : "") + std::to_string(a.shape[i]);
    found += "] with strides [";
    for (i = 0; i < a.ndim; ++i) found += (i ? ", " : "") + std::to_string(a.strides[i]);
    found += a.on_cpu ? "]" : "] on another device";
    reject(argument, wanted, found);
}

}  // namespace pagemill

namespace pybind11::detail {
template <>
struct type_caster<pagemill::Array> {
    PYBIND11_TYPE_CASTER(pagemill::Array, const_name("Array"));

    bool load(handle src, bool) {
        object capsule = reinterpret_borrow<object>(src);
        if (!PyCapsule_CheckExact(src.ptr())) {
            if (!hasattr(src, "__dlpack__")) return false;
            capsule = src.attr("__dlpack__")();
        }
        auto* tensor = static_cast<pagemill::dlpack::Tensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
        if (!tensor) throw error_already_set();
        if (tensor->ndim > pagemill::Array::kMaxDims) throw std::invalid_argument("an array of too many dimensions");
        value.owner = std::move(capsule);
        value.data = static_cast<char*>(tensor->data) + tensor->byte_offset;
        value.on_cpu = tensor->device.type == pagemill::dlpack::kCPU;
        value.ndim = tensor->ndim;
        value.dtype = dtype_of(tensor->dtype);
        int64_t dense = 1;
        for (int i = tensor->ndim - 1; i >= 0; --i) {
            value.shape[i] = tensor->shape[i];
            value.strides[i] = tensor->strides ? tensor->strides[i] : dense;
            dense *= tensor->shape[i];
        }
        return true;
    }

    static pagemill::DType dtype_of(pagemill::dlpack::DataType d) {
        using namespace pagemill;
        if (d.lanes != 1) return DType::other;
        if (d.code == dlpack::kFloat && d.bits == 32) return DType::float32;
        if (d.code == dlpack::kBfloat && d.bits == 16) return DType::bfloat16;
        if (d.code == dlpack::kInt && d.bits == 8) return DType::int8;
        if (d.code == dlpack::kInt && d.bits == 32) return DType::int32;
        if (d.code == dlpack::kInt && d.bits == 64) return DType::int64;
        return DType::other;
    }
};
}  // namespace pybind11::detail
