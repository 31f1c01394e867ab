"""Build: the C++ extension, and the two source folders mapped to their import names."""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup

ParallelCompile("PAGEMILL_BUILD_JOBS", default=2).install()

setup(
    packages=["pagemill", "pagemill.kernels", "pagemill.kernels.gpu"]
    + [f"pagemill.{name}" for name in find_packages("runtime") if not name.startswith("assets")],
    package_dir={"pagemill": "runtime", "pagemill.kernels": "kernels"},
    package_data={
        "pagemill": ["py.typed", "_native.pyi", "assets/pagemill-tiny/*", "cost/data/*", "cost/assets/*"]
    },
    ext_modules=[
        Pybind11Extension(
            "pagemill._native",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h")),
            cxx_std=17,
            # No -march: one wheel runs everywhere, the instruction set is chosen at run time.
            # No contraction: a loop's body, tail and unrolled forms must round alike.
            extra_compile_args=[
                "-O3",
                "-ffp-contract=off",
                "-fvisibility=hidden",
                "-Wall",
                "-Wextra",
                "-pthread",
            ],
            extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
