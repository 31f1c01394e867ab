// Arrays from Python through DLPack: no copy, no link against torch.
//
// An argument of type Array accepts a "dltensor" or "dltensor_versioned" capsule, or any object whose type has DLPack's table of C
// functions or that has __dlpack__. A capsule is never consumed (never renamed to "used_dltensor"): whoever made it still
// owns the memory, Array keeps it, or the object, alive. What is said of the memory is believed. That it makes sense, and is
// what the op takes, is seen to by check, through which every argument goes, and by check_written for outputs; neither takes
// longer for a larger array.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

namespace pagemill {

// The DLPack ABI (https://dmlc.github.io/dlpack), as far as it is read here.
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
struct Versioned {  // of a "dltensor_versioned" capsule
    uint32_t major, minor;
    void *context, *deleter;
    uint64_t flags;
    Tensor tensor;
};
constexpr uint32_t kMajor = 1;
constexpr uint64_t kReadOnly = 1;
// DLPackExchangeAPI of DLPack 1.x, the capsule "dlpack_exchange_api" of a type, up to the function used here: a view of an
// object, without an owner.
struct ExchangeHeader {
    uint32_t major, minor;
    ExchangeHeader* older;
};
struct ExchangeApi {
    ExchangeHeader header;
    int (*allocate)(Tensor*, void**, void*, void (*)(void*, const char*, const char*));
    int (*export_object)(void* object, void** out);
    int (*import_object)(void* tensor, void** out);
    int (*view)(void* object, Tensor* out);
};
constexpr int32_t kCPU = 1;
constexpr uint8_t kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4;
}  // namespace dlpack

enum class DType { float32, bfloat16, int8, uint8, int32, int64, other };

inline int64_t size_of(DType dtype) {
    switch (dtype) {
        case DType::float32: case DType::int32: return 4;
        case DType::bfloat16: return 2;
        case DType::int64: return 8;
        case DType::int8: case DType::uint8: case DType::other: break;
    }
    return 1;
}

struct Array {
    static constexpr int kMaxDims = 6;
    static constexpr int64_t kMaxSize = int64_t{1} << 56;  // elements, and elements between the first and the last

    pybind11::object owner;
    char* data = nullptr;  // null only where there is no element
    DType dtype = DType::other;
    bool on_cpu = false;
    bool writable = true;
    const char* fault = nullptr;  // what is wrong with the capsule itself; check reports it
    int ndim = 0;
    int64_t shape[kMaxDims] = {};
    int64_t strides[kMaxDims];
    int64_t count = 0;
    bool packed = true;
    const char *first = nullptr, *end = nullptr;  // the bytes of all elements lie in [first, end)

    template <class T>
    T* as() const { return reinterpret_cast<T*>(data); }

    void read(pybind11::handle source);
    void describe(const dlpack::Tensor& tensor);

    int64_t size() const { return count; }
    bool contiguous() const { return packed; }  // in row-major order; any array without an element is
    bool aligned() const { return (reinterpret_cast<uintptr_t>(data) & (size_of(dtype) - 1)) == 0; }
    // Whether every element has memory of its own, as far as nested strides show it.
    bool disjoint() const {
        if (contiguous()) return true;
        std::pair<int64_t, int64_t> steps[kMaxDims];  // stride and shape, the smallest stride first
        int n = 0;
        for (int i = ndim - 1; i >= 0; --i) {
            if (shape[i] == 1) continue;
            int at = n++;
            for (; at > 0 && steps[at - 1].first > std::abs(strides[i]); --at) steps[at] = steps[at - 1];
            steps[at] = {std::abs(strides[i]), shape[i]};
        }
        int64_t extent = 1;
        for (int i = 0; i < n; ++i) {
            if (steps[i].first < extent) return false;
            extent += steps[i].first * (steps[i].second - 1);
        }
        return true;
    }
};

inline const char* dtype_name(DType dtype) {
    switch (dtype) {
        case DType::float32: return "float32";
        case DType::bfloat16: return "bfloat16";
        case DType::int8: return "int8";
        case DType::uint8: return "uint8";
        case DType::int32: return "int32";
        case DType::int64: return "int64";
        default: return "another dtype";
    }
}

[[noreturn, gnu::cold, gnu::noinline]] inline void reject(const std::string& argument, const std::string& wanted, const std::string& found) {
    throw std::invalid_argument(argument + ": expected " + wanted + ", found " + found);
}

constexpr int64_t kAny = -1;
enum class Layout { rows, contiguous };  // rows: only the last dimension must be dense

[[noreturn, gnu::cold, gnu::noinline]] inline void reject(const Array& a, const char* argument,
                                                          std::initializer_list<DType> dtypes,
                                                          std::initializer_list<int64_t> shape, Layout layout) {
    std::string wanted;
    for (DType d : dtypes) wanted += std::string(wanted.empty() ? "" : "|") + dtype_name(d);
    wanted += " [";
    int i = 0;
    for (int64_t want : shape) wanted += (i++ ? ", " : "") + (want == kAny ? "*" : std::to_string(want));
    wanted += layout == Layout::contiguous ? "] contiguous on the CPU" : "] with dense rows on the CPU";
    if (a.fault) reject(argument, wanted, a.fault);
    std::string found = std::string(dtype_name(a.dtype)) + " [";
    for (i = 0; i < a.ndim; ++i) found += (i ? ", " : "") + std::to_string(a.shape[i]);
    found += "] with strides [";
    for (i = 0; i < a.ndim; ++i) found += (i ? ", " : "") + std::to_string(a.strides[i]);
    found += a.on_cpu ? "]" : "] on another device";
    if (!a.aligned()) found += " at an address that is no multiple of " + std::to_string(size_of(a.dtype));
    reject(argument, wanted, found);
}

// Throws ValueError naming the argument unless dtype, shape (kAny: free), device, layout and alignment fit.
inline void check(const Array& a, const char* argument, std::initializer_list<DType> dtypes,
                  std::initializer_list<int64_t> shape, Layout layout = Layout::contiguous) {
    bool fits = !a.fault && a.on_cpu && a.aligned() && a.ndim == static_cast<int>(shape.size());
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
    if (!fits) reject(a, argument, dtypes, shape, layout);
}

struct Named { const char* name; const Array& array; };

// For an array that is written, once it is checked: throws where it is read-only, where two of its elements share
// memory, or where it shares memory with one of `others`, judged by the first and the last byte of each.
inline void check_written(const Array& a, const char* argument, std::initializer_list<Named> others) {
    if (!a.writable) reject(argument, "an array that can be written", "a read-only one");
    if (!a.disjoint()) reject(argument, "elements apart", "some that share memory");
    for (const Named& other : others)
        if (a.first < other.array.end && other.array.first < a.end)
            reject(argument, "memory of its own", std::string("an overlap with ") + other.name);
}

inline DType dtype_of(dlpack::DataType d) {
    if (d.lanes != 1) return DType::other;
    if (d.code == dlpack::kFloat && d.bits == 32) return DType::float32;
    if (d.code == dlpack::kBfloat && d.bits == 16) return DType::bfloat16;
    if (d.code == dlpack::kInt && d.bits == 8) return DType::int8;
    if (d.code == dlpack::kUInt && d.bits == 8) return DType::uint8;
    if (d.code == dlpack::kInt && d.bits == 32) return DType::int32;
    if (d.code == dlpack::kInt && d.bits == 64) return DType::int64;
    return DType::other;
}

// The C functions of a type, or null. The type asked for last is remembered, under the interpreter lock.
inline const dlpack::ExchangeApi* exchange_of(PyTypeObject* type) {
    static PyTypeObject* known = nullptr;
    static const dlpack::ExchangeApi* api = nullptr;
    if (type == known || type == &PyCapsule_Type) return type == known ? api : nullptr;
    const pybind11::handle asked = reinterpret_cast<PyObject*>(type);
    const pybind11::object capsule = pybind11::getattr(asked, "__dlpack_c_exchange_api__", pybind11::none());
    if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
    auto* found = static_cast<dlpack::ExchangeHeader*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    while (found && found->major != dlpack::kMajor) found = found->older;
    auto* functions = reinterpret_cast<const dlpack::ExchangeApi*>(found);
    if (!functions || !functions->view) return nullptr;
    Py_XDECREF(known);
    Py_INCREF(type);
    known = type, api = functions;
    return api;
}

// Fills a fresh Array from an object, or from a capsule of one.
[[gnu::noinline]] inline void Array::read(pybind11::handle source) {
    owner = pybind11::reinterpret_borrow<pybind11::object>(source);
    if (const auto* api = exchange_of(Py_TYPE(source.ptr()))) {
        dlpack::Tensor view;
        if (api->view(source.ptr(), &view)) {
            PyErr_Clear();
            fault = "an array without memory to look at";
            return;
        }
        return describe(view);
    }
    if (!PyCapsule_CheckExact(source.ptr())) {
        if (!pybind11::hasattr(source, "__dlpack__"))
            throw pybind11::type_error(std::string("expected an array with __dlpack__, or its capsule, found ") +
                                       Py_TYPE(source.ptr())->tp_name);
        owner = source.attr("__dlpack__")();
        if (!PyCapsule_CheckExact(owner.ptr()))
            throw pybind11::type_error(std::string("expected a capsule from __dlpack__, found ") +
                                       Py_TYPE(owner.ptr())->tp_name);
    }
    const auto* tensor = static_cast<const dlpack::Tensor*>(PyCapsule_GetPointer(owner.ptr(), "dltensor"));
    if (!tensor) {
        PyErr_Clear();
        const void* pointer = PyCapsule_GetPointer(owner.ptr(), "dltensor_versioned");
        if (!pointer) {
            PyErr_Clear();
            fault = "a capsule that is no dltensor, or a used one";
            return;
        }
        const auto* versioned = static_cast<const dlpack::Versioned*>(pointer);
        if (versioned->major != dlpack::kMajor) {
            fault = "DLPack of another version";
            return;
        }
        writable = !(versioned->flags & dlpack::kReadOnly);
        tensor = &versioned->tensor;
    }
    describe(*tensor);
}

inline void Array::describe(const dlpack::Tensor& tensor) {
    on_cpu = tensor.device.type == dlpack::kCPU;
    dtype = dtype_of(tensor.dtype);
    if (tensor.ndim < 0 || tensor.ndim > kMaxDims || (tensor.ndim && !tensor.shape)) {
        fault = "another number of dimensions";
        return;
    }
    ndim = tensor.ndim;
    bool empty = false, dense = true, fits = true;
    int64_t size = 1, below = 0, above = 1;
    for (int i = ndim - 1; i >= 0; --i) {
        const int64_t extent = shape[i] = tensor.shape[i];
        const int64_t stride = strides[i] = tensor.strides ? tensor.strides[i] : size;
        empty |= extent == 0;
        if (extent < 0) fault = "a negative size";
        if (extent <= 1) continue;
        dense &= stride == size;
        int64_t step;
        fits &= !__builtin_mul_overflow(stride, extent - 1, &step) && step < kMaxSize && step > -kMaxSize;
        below += fits ? std::min<int64_t>(step, 0) : 0;
        above += fits ? std::max<int64_t>(step, 0) : 0;
        // Also with a zero among the others: a product of some sizes must not overflow.
        if (__builtin_mul_overflow(size, extent, &size) || size > kMaxSize) {
            fault = "a size larger than any memory";
            return;
        }
    }
    if (fault || empty) return;  // empty: whatever its strides and its address
    if (!fits) fault = "strides larger than any memory";
    else if (!tensor.data) fault = "a null pointer";
    if (fault) return;
    count = size;
    packed = dense;
    data = static_cast<char*>(tensor.data) + tensor.byte_offset;
    first = data + below * size_of(dtype);
    end = data + above * size_of(dtype);
}

// The array, or one without data where the argument is None.
inline Array optional_array(const pybind11::object& source) {
    Array a;
    if (!source.is_none()) a.read(source);
    return a;
}

}  // namespace pagemill

namespace pybind11::detail {
template <>
struct type_caster<pagemill::Array> {
    PYBIND11_TYPE_CASTER(pagemill::Array, const_name("Array"));

    type_caster() {}  // declared, so that pybind11's tuple of casters does not clear every byte of them first

    bool load(handle source, bool) {
        value.read(source);
        return true;
    }
};
}  // namespace pybind11::detail
