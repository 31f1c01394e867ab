// The module pagemill._native. Only registrations live here: each op binds itself in its own file.
#include <pybind11/pybind11.h>

namespace pagemill {
void bind_patchify(pybind11::module_& m);
void bind_threads(pybind11::module_& m);
void bind_isa(pybind11::module_& m);
void bind_linear(pybind11::module_& m);
void bind_elementwise(pybind11::module_& m);
void bind_attention(pybind11::module_& m);
}  // namespace pagemill

PYBIND11_MODULE(_native, m) {
    m.doc() = "pagemill's CPU kernels";
    pagemill::bind_patchify(m);
    pagemill::bind_threads(m);
    pagemill::bind_isa(m);
    pagemill::bind_linear(m);
    pagemill::bind_elementwise(m);
    pagemill::bind_attention(m);
}
