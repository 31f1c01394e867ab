"""Settings of the kernel benchmarks, and what of their result is kept.

Torch's OpenMP threads would spin between its operations; OpenMP reads that once, when torch is loaded.
"""

import os
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

_KEPT = ("min", "q1", "median", "q3", "max", "mean", "stddev", "rounds", "iterations")


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Add each op's limit; keep what is compared: every round of every op would be megabytes."""
    rows = [row for row in output_json["benchmarks"] if "peak_flops" in row["extra_info"]]
    peak: dict[str, float] = {}
    bandwidth: dict[str, float] = {}
    for info in (row["extra_info"] for row in rows):
        arithmetic, device = info["arithmetic"], info["arithmetic"].split()[-1]
        peak[arithmetic] = max(peak.get(arithmetic, 0.0), info["peak_flops"])
        bandwidth[device] = max(bandwidth.get(device, 0.0), info["bandwidth"])
    for row in rows:
        info = row["extra_info"]
        best = peak[info["arithmetic"]], bandwidth[info["arithmetic"].split()[-1]]
        flops_s, bytes_s = info["flops"] / best[0], info["bytes"] / best[1]
        limit = max(flops_s, bytes_s)
        seconds = row["stats"][info.get("statistic", "min")]
        info |= {
            "limit_s": limit,
            "limited_by": "arithmetic" if flops_s > bytes_s else "bandwidth",
            "fraction": limit / seconds,
            "tflop_per_s": info["flops"] / seconds / 1e12,
            "gb_per_s": info["bytes"] / seconds / 1e9,
            "disturbed": max(best[0] / info["peak_flops"], best[1] / info["bandwidth"]),
        }
        row["stats"] = {name: row["stats"][name] for name in _KEPT}
