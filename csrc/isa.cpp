#include "isa.h"

#include <pybind11/pybind11.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

namespace pagemill {
namespace {

// Best first.
std::vector<const Isa*> available() {
    std::vector<const Isa*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        found.push_back(&kAvx512);
    if (!found.empty() && __builtin_cpu_supports("avx512vnni")) {
        found.insert(found.begin(), &kAvx512Vnni);
        if (__builtin_cpu_supports("avx512bf16")) found.insert(found.begin(), &kAvx512Bf16);
    }
    if (avx2) found.push_back(&kAvx2);
#endif
    found.push_back(&kPortable);
    return found;
}

std::atomic<const Isa*>& current() {
    static std::atomic<const Isa*> chosen{available().front()};
    return chosen;
}

}  // namespace

// Whether the machine multiplies bfloat16 matrices in tiles, several times faster than any vector code here.
bool has_amx() {
#if defined(__x86_64__)
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
#else
    return false;
#endif
}

const Isa& isa() { return *current().load(std::memory_order_relaxed); }

void bind_isa(pybind11::module_& m) {
    m.def("has_amx", &has_amx, "Whether the machine has AMX tiles for bfloat16.");
    m.def("isa", [] { return isa().name; }, "The instruction set in use.");
    m.def("isas", [] {
        std::vector<std::string> names;
        for (const Isa* one : available()) names.push_back(one->name);
        pybind11::list list;
        for (const auto& name : names) list.append(name);
        return list;
    }, "The instruction sets that this machine and build have, best first.");
    m.def("set_isa", [](const std::string& name) {
        std::string names;
        for (const Isa* one : available()) {
            if (name == one->name) {
                current().store(one);
                return;
            }
            names += std::string(names.empty() ? "" : ", ") + one->name;
        }
        throw std::invalid_argument("isa: expected one of " + names + ", found " + name);
    }, "Force an instruction set, for tests and measurements.");
}

}  // namespace pagemill
