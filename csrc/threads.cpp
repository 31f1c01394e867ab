#include "threads.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
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
constexpr int kMaxThreads = 1024;

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

bool read_number(const std::string& path, const char* format, double* value) {
    FILE* f = std::fopen(path.c_str(), "r");
    if (!f) return false;
    const bool found = std::fscanf(f, format, value) == 1;
    std::fclose(f);
    return found;
}

// The CPUs that one cgroup's directory grants, of version 2 or 1; 0 without a quota ("max", or -1).
double quota_of(const std::string& directory) {
    double quota = 0, period = 0;
    if (read_number(directory + "/cpu.max", "%lf %*f", &quota)) read_number(directory + "/cpu.max", "%*s %lf", &period);
    else if (read_number(directory + "/cpu.cfs_quota_us", "%lf", &quota))
        read_number(directory + "/cpu.cfs_period_us", "%lf", &period);
    return quota > 0 && period > 0 ? quota / period : 0;
}

int default_threads() {
    cpu_set_t set;
    int n = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set)
                                                        : static_cast<int>(std::thread::hardware_concurrency());
    if (const int quota = cgroup_quota("/sys/fs/cgroup", "/proc/self/cgroup")) n = std::min(n, quota);
    return std::clamp(n, 1, kMaxThreads);
}

// Whether this thread is inside a loop. It asks no lock that it may hold already, and waits for no loop but its own.
thread_local bool in_loop = false;

// One loop at a time. A worker joins the open loop, or sleeps. The caller never waits for a worker that has not
// joined: on a machine whose cores are taken (torch's threads spin after an op) the loop just runs on fewer threads.
// Threads are not pinned to cores: with other load, loops of 2 ms took 1.3 times as long with pinned workers, loops of 30 ms
// the same, and two processes would pin theirs to the same cores. Affinity given from outside (taskset) is kept.
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
        n_ = n, chunk_ = chunk, chunks_ = (n - 1) / chunk + 1, fn_ = fn, context_ = context;
        next_.store(0);
        epoch_.fetch_add(1);  // odd: open
        if (sleepers_.load()) wake();
        in_loop = true;
        take();
        in_loop = false;
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
                const int64_t at = next_.fetch_add(1, std::memory_order_relaxed);
                if (at >= chunks_) return;
                const int64_t begin = at * chunk_;
                fn_(context_, begin, begin + std::min(chunk_, n_ - begin));
            }
        } catch (...) {
            next_.store(chunks_);
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
        in_loop = true;
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

    int64_t n_ = 0, chunk_ = 1, chunks_ = 0;
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
std::atomic<int> g_threads{0};  // as many as the pool has, or will have; 0: not looked up yet

std::shared_ptr<Pool> pool() {
    std::lock_guard lock(*g_mutex);
    if (!*g_pool) {
        static const int registered = pthread_atfork(nullptr, nullptr, [] {
            // The child has none of the threads, and mutexes in an unknown state: start afresh, leak the old.
            g_mutex = new std::mutex;
            g_pool = new std::shared_ptr<Pool>;
        });
        (void)registered;
        *g_pool = std::make_shared<Pool>(num_threads());
    }
    return *g_pool;
}

}  // namespace

int cgroup_quota(const std::string& root, const std::string& membership) {
    double least = 0;
    FILE* f = std::fopen(membership.c_str(), "r");
    if (!f) return 0;
    char line[4096];
    while (std::fgets(line, sizeof line, f)) {  // "0::/a/b", or "4:cpu,cpuacct:/a/b"
        char* controllers = std::strchr(line, ':');
        char* path = controllers ? std::strchr(controllers + 1, ':') : nullptr;
        if (!path) continue;
        *path++ = 0;
        path[std::strcspn(path, "\n")] = 0;
        const std::string names = std::string(",") + (controllers + 1) + ",";
        const bool unified = names == ",,";
        if (!unified && names.find(",cpu,") == std::string::npos) continue;
        const std::string top = unified ? root : root + "/cpu";
        // Inside a container the path may be the host's, of which only the top is to be seen.
        for (std::string at = path;; at.resize(at.rfind('/'))) {
            const double quota = quota_of(top + at);
            if (quota > 0 && (least == 0 || quota < least)) least = quota;
            if (at.find('/') == std::string::npos) break;
        }
    }
    std::fclose(f);
    return least > 0 ? static_cast<int>(std::clamp(least, 1.0, double{kMaxThreads})) : 0;
}

int num_threads() {
    int n = g_threads.load(std::memory_order_relaxed);
    if (n == 0 && g_threads.compare_exchange_strong(n, default_threads())) n = g_threads.load();
    return n;
}

void set_num_threads(int n) {
    if (n < 1 || n > kMaxThreads)
        throw std::invalid_argument("threads: expected 1.." + std::to_string(kMaxThreads) + ", found " +
                                    std::to_string(n));
    if (in_loop) throw std::runtime_error("threads: their number cannot change inside a loop that they run");
    auto old = pool();
    auto fresh = std::make_shared<Pool>(n);
    {
        std::lock_guard lock(*g_mutex);
        g_pool->swap(fresh);
        g_threads.store(n);
    }
    std::lock_guard wait(old->busy);
}

void parallel_for(int64_t n, int64_t chunk, RangeFn fn, void* context) {
    if (n <= 0) return;
    if (n > chunk && !in_loop && num_threads() > 1) {
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

}  // namespace pagemill
