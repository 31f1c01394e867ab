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

Isa with_tiles(const char* name, decltype(TypedKernels<bf16>::linear) linear) {
    Isa isa = kAvx512Bf16;
    isa.name = name;
    isa.b16.linear = linear, isa.b16.linear_blocking = amx::kTileBlocking;
    return isa;
}

}  // namespace

const Isa kAmx = with_tiles("amx", &amx::linear_tiled);
const Isa kAmxEmulated = with_tiles("amx-emulated", &amx_emulated::linear_tiled);
}  // namespace pagemill
#endif
