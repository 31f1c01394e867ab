"""Torch's OpenMP threads would spin between its operations; OpenMP reads this once, when torch is loaded."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
