#include "isa.h"

#include <pybind11/pybind11.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace pagemill {
namespace {

#if defined(__x86_64__)
// Whether the processor multiplies bfloat16 and int8 in tiles, the system keeps tiles (XCR0), and lets this process,
// and so all its threads, use them: Linux wants to be asked, as tiles make a thread's saved state 8 KB larger.
bool has_amx() {
#if defined(__linux__)
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kSavedByXsave = 1u << 27;
    constexpr unsigned kTileState = 3u << 17;  // configuration and data
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (~d & (kBf16 | kTile | kInt8))) return false;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kSavedByXsave)) return false;
    unsigned low, high;
    asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & kTileState) == kTileState && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}
#endif

using Isas = std::vector<const Isa*>;
struct Found {
    Isas real, emulated;  // best first
};

Found look() {
    Found found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
    if (bf16 && has_amx()) found.real.push_back(&kAmx);
    if (bf16) found.real.push_back(&kAvx512Bf16), found.emulated.push_back(&kAmxEmulated);
    if (vnni) found.real.push_back(&kAvx512Vnni);
    if (avx512) found.real.push_back(&kAvx512);
    if (avx2) found.real.push_back(&kAvx2);
#endif
    found.real.push_back(&kPortable);
    return found;
}

const Found& available() {
    static const Found found = look();
    return found;
}

const Isa* find(const char* what, const std::string& name) {
    for (const Isas* list : {&available().real, &available().emulated})
        for (const Isa* one : *list)
            if (name == one->name) return one;
    std::string names;
    for (const Isa* one : available().real) names += std::string(names.empty() ? "" : ", ") + one->name;
    throw std::invalid_argument(std::string(what) + ": expected one of this machine's " + names + ", found " + name);
}

std::atomic<const Isa*>& current() {
    static std::atomic<const Isa*> chosen{[] {
        const char* forced = std::getenv("PAGEMILL_ISA");
        return forced && *forced ? find("PAGEMILL_ISA", forced) : available().real.front();
    }()};
    return chosen;
}

pybind11::list names(const Isas& isas) {
    pybind11::list list;
    for (const Isa* one : isas) list.append(one->name);
    return list;
}

}  // namespace

const Isa& isa() { return *current().load(std::memory_order_relaxed); }

void bind_isa(pybind11::module_& m) {
    m.def("isa", [] { return isa().name; },
          "The instruction set in use: the best, or what PAGEMILL_ISA says; ValueError where the machine lacks that.");
    m.def("isas", [] { return names(available().real); }, "The instruction sets of this machine and build, best first.");
    m.def("emulated_isas", [] { return names(available().emulated); },
          "Those that run on a model of the instructions, for tests; only set_isa and PAGEMILL_ISA choose them.");
    m.def("set_isa", [](const std::string& name) { current().store(find("isa", name)); },
          "Force an instruction set, for tests and measurements.");
}

}  // namespace pagemill
