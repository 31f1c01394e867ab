// Linear layers on AMX tiles, twice: with the instructions, and with a model of them for machines that lack them. All
// else is that of AVX-512 with bfloat16, which every processor with AMX has.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "isa.h"
#include "threads.h"
#include "tile_model.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,bmi2")
#define PM_WIDTH 16
#define PM_AVX512 1
#define PM_VNNI 1
#define PM_AVX512BF16 1
namespace pagemill::amx {
#include "body_amx.h"
}
#define PM_TILE_MODEL 1
namespace pagemill::amx_emulated {
#include "body_amx.h"
}
#pragma GCC pop_options

namespace pagemill {
namespace {

template <class T>
struct Tiled {
    decltype(TypedKernels<T>::qlinear) qlinear;
    decltype(TypedKernels<T>::linear) linear = nullptr;

    void put(TypedKernels<T>& kernels) const {
        kernels.qlinear = qlinear, kernels.qlinear_blocking = amx::kTileBlocking;
        if (linear) kernels.linear = linear, kernels.linear_blocking = amx::kTileBlocking;
    }
};

Isa with_tiles(const char* name, const Tiled<float>& f32, const Tiled<bf16>& b16) {
    Isa isa = kAvx512Bf16;
    isa.name = name;
    f32.put(isa.f32);
    b16.put(isa.b16);
    return isa;
}

}  // namespace

const Isa kAmx = with_tiles("amx", {&amx::qlinear_tiled<float>}, {&amx::qlinear_tiled<bf16>, &amx::linear_tiled});
const Isa kAmxEmulated = with_tiles("amx-emulated", {&amx_emulated::qlinear_tiled<float>},
                                    {&amx_emulated::qlinear_tiled<bf16>, &amx_emulated::linear_tiled});
}  // namespace pagemill
#endif
