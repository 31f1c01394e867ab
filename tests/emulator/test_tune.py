"""`pagemill tune` times the kernels that the engine calls."""

from math import inf

import pytest
import torch
import triton

from pagemill.kernels.gpu import tune as tuning
from pagemill.kernels.gpu.configs import AttentionTile, MatmulTile
from pagemill.kernels.gpu.tune import Bench, Heads
from pagemill.kernels.gpu.tuned import ATTENTION, Product
from tests.emulator.launch import emulated


def test_what_is_timed_are_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every form and kind, run once to be compiled and then by the clock."""
    runs: list[object] = []

    def clock(run, **_: object) -> float:
        runs.append(run())
        return 2.0

    monkeypatch.setattr(triton.testing, "do_bench", clock)
    monkeypatch.setattr(tuning, "_PAGED", {"decode": (3, 1, 40), "prefill": (2, 17, 33)})
    monkeypatch.setattr(tuning, "_SEGMENTS", {"windows": [16, 16], "images": [33]})
    kept: list[torch.dtype] = []
    paged_attention = tuning.attention.paged_attention

    def paged(q, keys, values, *rest, **how) -> torch.Tensor:
        kept.append(keys.dtype)
        return paged_attention(q, keys, values, *rest, **how)

    monkeypatch.setattr(tuning.attention, "paged_attention", paged)
    bench = Bench(torch.device("cpu"), Heads(4, 2, 32, 2, 16))
    tile = MatmulTile(16, 32, 32, 2, 4, 2)
    with emulated():
        for product in (
            Product(form, gated, 40, 96) for form in ("plain", "int8", "int4") for gated in (False, True)
        ):
            assert bench.matmul(product, 3, tile) == 0.002
            assert runs.pop().shape == (3, 40)
        assert bench.unpack(Product("int4", False, 40, 96)) == 0.002
        assert runs.pop().weight.shape == (40, 128)
        shapes = [(3, 4, 32), (34, 4, 32)] * 2 + [(32, 2, 16), (33, 2, 16)]
        for kind, shape in zip(ATTENTION, shapes, strict=True):
            assert bench.attention(kind, AttentionTile(16, 32, 4, 2)) == 0.002
            found = runs.pop()
            assert found.shape == shape
            assert found.isfinite().all()
        assert kept == [torch.bfloat16] * 4 + [torch.int8] * 4  # each once to be compiled
        assert (
            Bench(torch.device("cpu"), Heads(34, 2, 32, 2, 16)).attention(
                "decode", AttentionTile(16, 32, 4, 2)
            )
            == inf
        )
        assert not runs
