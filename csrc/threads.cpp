#include "threads.h"

#include <pthread.h>
#include <pybind11/pybind11.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace pagemill {
namespace {

// Long enough to catch the next op of a model step, short enough not to burn an idle core.
constexpr int kSpins = 2000;

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// CPUs that the cgroup (v2, else v1) grants, or 0 where there is no quota.
int cgroup_quota() {
    double quota = 0, period = 0;
    if (FILE* f = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {
        char text[32] = "";
        if (std::fscanf(f, "%31s %lf", text, &period) == 2) quota = std::atof(text);  // "max": 0
        std::fclose(f);
    } else {
        for (auto [path, value] : {std::pair{"/sys/fs/cgroup/cpu/cpu.cfs_quota_us", &quota},
                                   std::pair{"/sys/fs/cgroup/cpu/cpu.cfs_period_us", &period}}) {
            if (FILE* g = std::fopen(path, "r")) {
                if (std::fscanf(g, "%lf", value) != 1) *value = 0;
                std::fclose(g);
            }
        }
    }
    return quota > 0 && period > 0 ? std::max(1, static_cast<int>(quota / period)) : 0;
}

int default_threads() {
    cpu_set_t set;
    int n = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set)
                                                        : static_cast<int>(std::thread::hardware_concurrency());
    if (const int quota = cgroup_quota()) n = std::min(n, quota);
    return std::max(n, 1);
}

// One loop at a time. A worker joins the open loop, or sleeps. The caller never waits for a worker that has not
// joined: on a machine whose cores are taken (torch's threads spin after an op) the loop just runs on fewer threads.
class Pool {
public:
    explicit Pool(int threads) {
        try {
            for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
        } catch (const std::exception& error) {
            const int found = size();
            stop();
            throw std::runtime_error("threads: the system gives " + std::to_string(found) + " of " +
                                     std::to_string(threads) + " (" + error.what() + "); ask for fewer");
        }
    }

    ~Pool() { stop(); }

    int size() const { return static_cast<int>(workers_.size()) + 1; }

    std::mutex busy;  // held by the thread whose loop it is

    void run(int64_t n, int64_t chunk, RangeFn fn, void* context) {
        n_ = n, chunk_ = chunk, fn_ = fn, context_ = context;
        next_.store(0);
        epoch_.fetch_add(1);  // odd: open
        if (sleepers_.load()) wake();
        take();
        epoch_.fetch_add(1);  // even: closed
        for (int spins = 0; active_.load(std::memory_order_acquire); ++spins) {
            if (spins < kSpins) relax();
            else std::this_thread::yield();
        }
        if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
    }

private:
    void take() {
        try {
            for (;;) {
                const int64_t begin = next_.fetch_add(chunk_, std::memory_order_relaxed);
                if (begin >= n_) return;
                fn_(context_, begin, std::min(begin + chunk_, n_));
            }
        } catch (...) {
            next_.store(n_);
            std::lock_guard lock(mutex_);
            if (!error_) error_ = std::current_exception();
        }
    }

    void stop() {
        stop_.store(true);
        wake();
        for (auto& worker : workers_) worker.join();
    }

    void wake() {
        // Taking the mutex orders this with a worker between its last look at epoch_ and its wait.
        { std::lock_guard lock(mutex_); }
        wake_.notify_all();
    }

    void work() {
        uint64_t seen = 0;
        for (;;) {
            uint64_t epoch = epoch_.load();
            for (int spins = 0; !open(epoch, seen) && spins < kSpins; ++spins) {
                relax();
                epoch = epoch_.load(std::memory_order_acquire);
            }
            if (!open(epoch, seen)) {
                std::unique_lock lock(mutex_);
                sleepers_.fetch_add(1);
                wake_.wait(lock, [&] { return open(epoch = epoch_.load(), seen) || stop_.load(); });
                sleepers_.fetch_sub(1);
            }
            if (stop_.load()) return;
            // Join first, then look whether the loop is still open: run() closes it before it reads active_.
            active_.fetch_add(1);
            if (epoch_.load() == epoch) take();
            active_.fetch_sub(1, std::memory_order_release);
            seen = epoch;
        }
    }

    static bool open(uint64_t epoch, uint64_t seen) { return epoch % 2 == 1 && epoch != seen; }

    int64_t n_ = 0, chunk_ = 1;
    RangeFn fn_ = nullptr;
    void* context_ = nullptr;
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<uint64_t> epoch_{0};
    alignas(64) std::atomic<int> active_{0};
    std::atomic<int> sleepers_{0};
    std::atomic<bool> stop_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
    std::exception_ptr error_;  // the first of the loop; under mutex_ while it is open
    std::vector<std::thread> workers_;
};

// Owned through raw pointers and never freed at exit: a thread may still be in a loop while statics are destroyed.
std::mutex* g_mutex = new std::mutex;
std::shared_ptr<Pool>* g_pool = new std::shared_ptr<Pool>;

std::shared_ptr<Pool> pool() {
    std::lock_guard lock(*g_mutex);
    if (!*g_pool) {
        static const int registered = pthread_atfork(nullptr, nullptr, [] {
            // The child has none of the threads, and mutexes in an unknown state: start afresh, leak the old.
            g_mutex = new std::mutex;
            g_pool = new std::shared_ptr<Pool>;
        });
        (void)registered;
        *g_pool = std::make_shared<Pool>(default_threads());
    }
    return *g_pool;
}

}  // namespace

int num_threads() { return pool()->size(); }

void set_num_threads(int n) {
    if (n < 1 || n > 1024) throw std::invalid_argument("threads: expected 1..1024, found " + std::to_string(n));
    auto old = pool();
    auto fresh = std::make_shared<Pool>(n);
    {
        std::lock_guard lock(*g_mutex);
        g_pool->swap(fresh);
    }
    std::lock_guard wait(old->busy);
}

void parallel_for(int64_t n, int64_t chunk, RangeFn fn, void* context) {
    if (n <= 0) return;
    if (n > chunk) {
        const auto p = pool();
        std::unique_lock mine(p->busy, std::try_to_lock);
        if (mine && p->size() > 1) return p->run(n, chunk, fn, context);
    }
    fn(context, 0, n);
}

float* scratch(size_t floats) {
    struct Buffer {
        float* data = nullptr;
        size_t size = 0;
        ~Buffer() { std::free(data); }
    };
    static thread_local Buffer buffer;
    if (buffer.size < floats) {
        std::free(buffer.data);
        buffer.size = 0;
        buffer.data = static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 4095) / 4096 * 4096));
        if (!buffer.data) throw std::bad_alloc();
        buffer.size = floats;
    }
    return buffer.data;
}

void bind_threads(pybind11::module_& m) {
    m.def("num_threads", &num_threads);
    m.def("set_num_threads", &set_num_threads, pybind11::call_guard<pybind11::gil_scoped_release>());
    m.def("parallel_for", [](int64_t n, int64_t chunk, const pybind11::function& fn) {
        pybind11::gil_scoped_release release;
        parallel_for(n, chunk, [&](int64_t begin, int64_t end) {
            pybind11::gil_scoped_acquire acquire;
            fn(begin, end);
        });
    }, "Call fn(begin, end) on ranges that cover [0, n), for tests.");
}

}  // namespace pagemill
