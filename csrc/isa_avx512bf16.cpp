// The kernels for AVX-512 (F, BW, DQ, VL) with the dot products of bfloat16 pairs and of bytes.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "isa.h"
#include "threads.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,bmi2")
#define PM_WIDTH 16
#define PM_AVX512 1
#define PM_VNNI 1
#define PM_AVX512BF16 1
namespace pagemill::avx512bf16 {
#include "body.h"
}
#pragma GCC pop_options

namespace pagemill {
const Isa kAvx512Bf16 = avx512bf16::table("avx512bf16");
}
#endif
