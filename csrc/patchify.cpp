#include <pybind11/pybind11.h>

namespace pagemill {
void bind_patchify(pybind11::module_&) {}
}  // namespace pagemill
