"""The Triton kernels compiled for GPUs that need not be there. Like `tests/emulator`, in a process without `TRITON_INTERPRET`."""

from tests.emulator.conftest import WHY_NOT

collect_ignore_glob = ["test_*.py"] if WHY_NOT else []
