// A small persistent thread pool: parallel_for over [0, n) in dynamic chunks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace pagemill {

// min(CPU affinity, cgroup quota) unless set.
int num_threads();

// n >= 1 threads from now on, the calling one included; waits for a running loop to end. Throws std::runtime_error from inside
// a loop that the pool runs.
void set_num_threads(int n);

using RangeFn = void (*)(void* context, int64_t begin, int64_t end);

// Calls fn on disjoint ranges of at most `chunk` >= 1 items that cover [0, n), on the caller and the workers; returns
// when all are done. Runs inline when it is not worth a wake-up (n <= chunk), inside another loop, or when another thread
// has the pool. What a range computes must not depend on which thread runs it, nor on how ranges are cut. The first
// exception out of fn is thrown again here, once no thread is in fn; ranges not begun by then are left out.
void parallel_for(int64_t n, int64_t chunk, RangeFn fn, void* context);

template <class F>
void parallel_for(int64_t n, int64_t chunk, const F& body) {
    parallel_for(
        n, chunk, [](void* f, int64_t begin, int64_t end) { (*static_cast<const F*>(f))(begin, end); },
        const_cast<F*>(&body));
}

// CPUs that the cgroups of `membership` (the format of /proc/self/cgroup) grant, rounded down to at least 1; 0 where none
// sets a quota. `root` is where cgroup file systems are mounted. Every ancestor counts.
int cgroup_quota(const std::string& root, const std::string& membership);

// 64-byte aligned memory of the calling thread, valid until its next call on that thread. Uninitialised.
float* scratch(size_t floats);

}  // namespace pagemill
