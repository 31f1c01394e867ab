"""The C++ extension (csrc/). What each function takes and gives stands with its op in kernels/."""

from typing import Any

def __getattr__(name: str) -> Any: ...
