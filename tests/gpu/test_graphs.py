"""A step of decoding can be recorded: from its inputs to its logits nothing looks at a value."""

from pathlib import Path

import pytest
import torch
from fake_gpu import FakeGpu
from make_checkpoint import PRESETS, write_checkpoint
from micro import Ask, World, drain

from pagemill import Engine, SamplingParams
from pagemill.gpu import Gpu
from pagemill.kernels import Kernels, LayerCache, kv_scale_shape, select
from pagemill.model.config import read_config
from pagemill.model.decoder import RaggedBatch
from pagemill.model.loader import load_model
from tests.gpu.conftest import DEVICE, ON_GPU

pytestmark = pytest.mark.usefixtures("whole_engine")
PAGES = sorted((Path(__file__).parents[2] / "bench" / "pages").glob("form_2*.png"))
META = torch.device("meta")
"""Tensors of a shape and no values: to ask one for a value, or for a shape that depends on one, is an error."""


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were launched; they compute nothing."""
    triton = pytest.importorskip("triton")
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    names: list[str] = []

    def launch(self: object, *args: object, **kwargs: object) -> None:
        names.append(self.fn.__name__)  # type: ignore[attr-defined]

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", launch)
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", launch)
    return names


def decode(kernels: Kernels, folder: Path, quantize: str = "none", int8_cache: bool = False) -> torch.Tensor:
    """Logits, without values, of three sequences of the micro model."""
    write_checkpoint(folder, *PRESETS["micro"], std=0.25, dtype=torch.float32)
    config = read_config(folder)
    text = config.text
    decoder = load_model(folder, config, kernels, META, torch.float32, quantize=quantize).decoder
    decoder.rope.tables(2047)
    size, blocks, block_size = 3, 20, 16
    shapes: list[tuple[int, ...]] = [
        *kernels.kv_cache_shapes(blocks, text.num_kv_heads, text.head_dim, block_size)
    ]
    dtypes = [torch.int8 if int8_cache else torch.float32] * 2
    if int8_cache:
        shapes += [kv_scale_shape(blocks, text.num_kv_heads, block_size)] * 2
        dtypes += [torch.float32] * 2

    def ids(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    with torch.device(META):
        cache = [
            LayerCache(
                *(torch.empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
            )
            for _ in range(text.num_layers)
        ]
    batch = RaggedBatch(
        token_ids=ids(size),
        positions=ids(3, size),
        max_position=0,
        slots=ids(size),
        query_start=ids(size + 1, dtype=torch.int32),
        context_lens=ids(size, dtype=torch.int32),
        block_tables=ids(size, 128, dtype=torch.int32),
        logit_rows=ids(size),
    )
    logits: torch.Tensor = decoder(batch, cache)
    assert logits.shape == (size, text.vocab_size)
    return logits


@pytest.mark.parametrize(("quantize", "int8_cache"), [("none", True), ("int8", False), ("int4", False)])
def test_decoding_looks_at_no_value(
    tmp_path: Path, launches: list[str], quantize: str, int8_cache: bool
) -> None:
    triton = select("triton", DEVICE, torch.float32)
    assert triton.capturable
    assert decode(triton, tmp_path, quantize, int8_cache).is_meta
    assert {"embed_kernel", "paged_kernel", "rotary_cache_kernel"} <= set(launches)


def test_the_reference_looks_at_values(tmp_path: Path) -> None:
    """So the test above can fail; and `capturable` is false."""
    reference = select("reference", DEVICE, torch.float32)
    assert not reference.capturable
    with pytest.raises(RuntimeError, match="meta"):
        decode(reference, tmp_path)


@pytest.mark.skipif(ON_GPU, reason="of the interpreter")
def test_padded_steps_give_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sequences with a draft each, one of which is right, then both alone, in places for four tokens."""
    fake, asks = FakeGpu(), [Ask((1, 2, 3), (), 4), Ask((5, 6, 7, 8), (), 3)]
    wanted: list[list[int]] = []
    for kind in ("reference", "triton"):
        if kind == "triton":
            monkeypatch.setattr("pagemill.core.gpu_of", lambda device: fake)
            monkeypatch.setattr("pagemill.graphs.ladder", lambda most: [4])
            monkeypatch.setattr("pagemill.core.EngineCore._needed", lambda self, gpu, free: 0)
        world = World(tmp_path / kind, kind)
        core = world.core(max_num_seqs=2, overlap=False)
        seqs = [world.add(core, ask, ignore_eos=True, drafts="off") for ask in asks]
        core.step()
        if kind == "triton":
            for seq, draft in zip(seqs, (wanted[0][1], (wanted[1][1] + 1) % 2000), strict=True):
                seq.draft = [draft]
            with monkeypatch.context() as patch:
                patch.setattr(core, "_guess", lambda: None)
                core.step()
            assert [len(seq.output_ids) for seq in seqs] == [3, 2]
        drain(core)
        wanted = wanted or [seq.output_ids for seq in seqs]
    assert [seq.output_ids for seq in seqs] == wanted
    assert fake.replayed == [0, 0]


@pytest.mark.skipif(not ON_GPU, reason="CUDA records nothing of the interpreter")
@pytest.mark.parametrize("quantize", ["none", "int4"])
def test_pages_are_read_as_without_graphs(quantize: str) -> None:
    """Really recorded, really replayed, planned ahead: batches of 1 to 3 pages that come and go, images encoded beside them."""
    found = []
    for graphs in (False, True):
        options = dict(device=str(DEVICE), dtype="float32", quantize=quantize, max_num_seqs=3)
        with Engine.from_pretrained(**options, cuda_graphs=graphs, overlap=graphs) as engine:
            assert (engine.core.runner._graphs is not None) == graphs
            pages = engine.read(list(map(str, PAGES)), params=SamplingParams(drafts="off"))
            found.append({page.source: (page.raw, page.error) for page in pages})
    assert found[0] == found[1]
    assert all(raw and error is None for raw, error in found[0].values())


@pytest.mark.skipif(not ON_GPU, reason="the interpreter has no memory of its own")
def test_the_device_tells_its_memory() -> None:
    gpu = Gpu(torch.device("cuda", 0))

    def take() -> None:
        torch.empty(300 << 20, dtype=torch.uint8, device=gpu.device).fill_(1)

    assert 300 << 20 <= gpu.peak(take) < 400 << 20
    free, total = gpu.memory()
    assert 0 < free <= total


@pytest.mark.skipif(not ON_GPU, reason="the CPU has no streams")
def test_what_runs_beside_is_waited_for() -> None:
    """A second stream is busy for a while when its result is read, and when its memory is given back."""
    gpu = Gpu(torch.device("cuda", 0))
    x = torch.randn(4096, 4096, device=gpu.device)

    def run() -> list[torch.Tensor]:
        y = x
        for _ in range(20):
            y = (y @ x) / 64
        return [y, y + 1]

    wanted = [tensor.clone() for tensor in run()]
    for _ in range(3):
        (first, second), join = gpu.beside(run)
        join(first)
        copy = first.clone()
        del first
        join(second)
        wait = gpu.fetch(copy, second)
        found = wait()
        for ours, theirs in zip(found, wanted, strict=True):
            assert torch.equal(ours, theirs.cpu())
