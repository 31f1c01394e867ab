// The kernels for AVX2 and FMA.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "isa.h"
#include "threads.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")
#define PM_WIDTH 8
#define PM_AVX2 1
namespace pagemill::avx2 {
#include "body.h"
}
#pragma GCC pop_options

namespace pagemill {
const Isa kAvx2 = avx2::table("avx2");
}
#endif
