// The thread pool, for Python. threads.cpp itself knows nothing of Python.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "threads.h"

namespace pagemill {

void bind_threads(pybind11::module_& m) {
    m.def("num_threads", &num_threads);
    m.def("set_num_threads", &set_num_threads, pybind11::call_guard<pybind11::gil_scoped_release>());
    m.def("cgroup_quota", &cgroup_quota, "The CPUs that the cgroups of a membership file under a root grant, for tests.");
    m.def("parallel_for", [](int64_t n, int64_t chunk, const pybind11::function& fn) {
        if (chunk < 1) throw std::invalid_argument("chunk: expected a number >= 1, found " + std::to_string(chunk));
        pybind11::gil_scoped_release release;
        parallel_for(n, chunk, [&](int64_t begin, int64_t end) {
            pybind11::gil_scoped_acquire acquire;
            fn(begin, end);
        });
    }, "Call fn(begin, end) on ranges that cover [0, n), for tests.");
}

}  // namespace pagemill
