// The module pagemill._native. Only registrations live here: each op binds itself in its own file.
#include <pybind11/pybind11.h>

namespace pagemill {
void bind_patchify(pybind11::module_& m);
}  // namespace pagemill

PYBIND11_MODULE(_native, m) {
    m.doc() = "pagemill's CPU kernels";
    pagemill::bind_patchify(m);
}
