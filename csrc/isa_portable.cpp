// The kernels for the compiler's baseline (SSE2 on x86-64, NEON on AArch64).
#include <cmath>
#include <cstring>
#include <limits>

#include "isa.h"
#include "threads.h"

#define PM_WIDTH 4
namespace pagemill::portable {
#include "body.h"
}

namespace pagemill {
const Isa kPortable = portable::table("portable");
}
