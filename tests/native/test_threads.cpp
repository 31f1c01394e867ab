// The thread pool without Python, for ThreadSanitizer: `make sanitize` builds and runs it. Exits with 1 at the first
// claim of csrc/threads.h that does not hold; the sanitizer ends it at the first race.
#include "threads.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <thread>
#include <vector>

using pagemill::num_threads;
using pagemill::parallel_for;
using pagemill::scratch;
using pagemill::set_num_threads;

namespace {

#define CLAIM(holds) \
    if (!(holds)) std::printf("%s:%d: not so: %s\n", __FILE__, __LINE__, #holds), std::exit(1)

// Plain, not atomic, cells: the sanitizer sees it where two threads touch one, or where the caller reads too early.
void covers(int64_t n, int64_t chunk) {
    std::vector<int> seen(n, 0);
    parallel_for(n, chunk, [&](int64_t begin, int64_t end) {
        float* mine = scratch(64);
        for (int64_t i = begin; i < end; ++i) {
            mine[i % 64] = static_cast<float>(i);
            seen[i] += mine[i % 64] == static_cast<float>(i);
        }
    });
    for (int count : seen) CLAIM(count == 1);
}

void every_item_once() {
    for (int threads : {1, 2, 5}) {
        set_num_threads(threads);
        for (int64_t n : {0, 1, 2, 63, 1000})
            for (int64_t chunk : {1, 7, 1000}) covers(n, chunk);
    }
    int64_t calls = 0;  // sizes whose sums do not fit in 64 bits
    parallel_for(INT64_MAX, INT64_MAX, [&](int64_t begin, int64_t end) { calls += begin == 0 && end == INT64_MAX; });
    CLAIM(calls == 1);
    std::atomic<int64_t> covered{0};
    parallel_for(INT64_MAX, INT64_MAX / 2, [&](int64_t begin, int64_t end) { covered += end - begin; });
    CLAIM(covered == INT64_MAX);
}

// Loops so short that workers often join one that has just ended.
void short_loops() {
    set_num_threads(4);
    for (int round = 0; round < 30000; ++round) {
        int seen[3] = {};
        const int64_t n = 2 + round % 2;
        parallel_for(n, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) ++seen[i];
        });
        for (int64_t i = 0; i < n; ++i) CLAIM(seen[i] == 1);
    }
}

void nested_loops() {
    set_num_threads(3);
    std::vector<int> seen(16 * 16, 0);
    parallel_for(16, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            parallel_for(16, 1, [&](int64_t from, int64_t to) {
                for (int64_t j = from; j < to; ++j) ++seen[i * 16 + j];
            });
    });
    for (int count : seen) CLAIM(count == 1);
    std::atomic<int> refused{0};
    parallel_for(16, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) try {
                set_num_threads(2);
            } catch (const std::runtime_error&) {
                ++refused;
            }
    });
    CLAIM(refused == 16 && num_threads() == 3);
}

void exceptions() {
    set_num_threads(4);
    for (int round = 0; round < 200; ++round) {
        std::vector<int> begun(64, 0);
        int caught = -1;
        try {
            parallel_for(64, 1, [&](int64_t begin, int64_t) {
                begun[begin] = 1;
                if (begin % 16 == round % 16) throw static_cast<int>(begin);
            });
        } catch (int at) {
            caught = at;
        }
        CLAIM(caught >= 0 && caught % 16 == round % 16 && begun[caught]);
    }
    covers(1000, 1);
}

// Several threads with loops of their own, while another changes the number of threads and forks.
void all_at_once() {
    std::atomic<bool> done{false};
    std::vector<std::thread> callers;
    for (int i = 0; i < 4; ++i)
        callers.emplace_back([&, i] {
            while (!done.load()) {
                covers(200 + i, 3);
                try {
                    parallel_for(32, 1, [&](int64_t begin, int64_t end) {
                        if (begin <= 20 && 20 < end) throw i;
                    });
                    CLAIM(false);
                } catch (int thrown) {
                    CLAIM(thrown == i);
                }
            }
        });
    for (int round = 0; round < 60; ++round) {
        set_num_threads(1 + round % 4);
        CLAIM(num_threads() == 1 + round % 4);
        if (round % 10) continue;
        const pid_t child = fork();
        if (child == 0) {  // between fork and exit: no lock but those that the pool makes anew
            alarm(60);
            std::atomic<int> sum{0};
            parallel_for(100, 1, [&](int64_t begin, int64_t end) { sum += static_cast<int>(end - begin); });
            _exit(sum == 100 && num_threads() == 1 + round % 4 ? 0 : 1);
        }
        int status = 1;
        CLAIM(waitpid(child, &status, 0) == child && status == 0);
    }
    done.store(true);
    for (auto& caller : callers) caller.join();
}

}  // namespace

int main() {
    alarm(300);
    std::thread first([] { covers(100, 1); });  // two threads that both find no pool
    covers(100, 1);
    first.join();
    every_item_once();
    short_loops();
    nested_loops();
    exceptions();
    all_at_once();
    std::puts("the pool holds: every item once, nested loops, exceptions, loops of several threads, fork");
}
