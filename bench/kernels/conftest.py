"""Settings of the kernel benchmarks.

Torch's OpenMP threads would spin between its operations; OpenMP reads that once, when torch is loaded.
"""

import os
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

_KEPT = ("min", "q1", "median", "q3", "max", "mean", "stddev", "rounds", "iterations")


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Keep what is compared: every round of every op would be megabytes."""
    for row in output_json["benchmarks"]:
        row["stats"] = {name: row["stats"][name] for name in _KEPT}
