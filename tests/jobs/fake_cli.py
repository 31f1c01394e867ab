"""`pagemill` with the fake engine: run as a program by the tests, so that it can be killed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).parent))
import fake_engine

# The real modules import torch, which takes longer than most of these runs.
engine = ModuleType("pagemill.engine")
engine.Engine = fake_engine.Engine
sys.modules["pagemill.engine"] = engine
sampler = ModuleType("pagemill.decode.sampler")
sampler.SamplingParams = dict
sys.modules["pagemill.decode.sampler"] = sampler

from pagemill.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
