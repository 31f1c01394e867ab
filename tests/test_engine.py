"""The public engine on the embedded model: what it reads, and that one bad page costs no other."""

import asyncio
import gc
import json
import re
import resource
import shutil
import subprocess
import sys
import threading
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from fake_gpu import FakeGpu
from PIL import Image
from typer.testing import CliRunner

from pagemill import Engine, Request, SamplingParams
from pagemill.cli import app
from pagemill.decode.guidance import Guide, Regex
from pagemill.decode.loops import Loop
from pagemill.errors import CheckpointError, ConfigError, DeviceError, KernelUnavailable, RequestError
from pagemill.gpu import Gpu, is_lost
from pagemill.pages.fit import FitOptions, fit_page
from pagemill.pages.ink import plausible_output_chars
from pagemill.pages.preprocess import PreparedImage
from pagemill.pages.source import list_pages
from pagemill.runner import Runner

PAGES = Path(__file__).parents[1] / "bench" / "pages"


def reference():
    with open(PAGES / "reference_hf_fp32.jsonl", encoding="utf-8") as f:
        return {str(PAGES / row["file"]): row for row in map(json.loads, f)}


@pytest.fixture(scope="module")
def engine():
    with Engine.from_pretrained("pagemill-tiny", dtype="float32", max_num_seqs=16) as engine:
        yield engine


def is_idle(engine):
    engine.core.scheduler.check()
    return (
        not engine.core.scheduler.has_work
        and engine.core.blocks.num_free == engine.core.blocks.num_blocks
        and not engine._tickets
    )


def wait_idle(engine):
    done = threading.Event()
    for _ in range(500):
        if is_idle(engine):
            return
        done.wait(0.01)
    raise AssertionError("the engine still holds something")


def test_every_sample_page_reads_as_transformers_does(engine):
    """Greedy tokens identical to transformers in float32, page by page, in one shared batch of strangers."""
    expected = reference()
    files = sorted(expected)
    seen = set()
    for page in engine.read(files, params=SamplingParams(guidance="off", max_retries=0), resolution="full"):
        row = expected[page.source]
        assert page.status in ("ok", "degenerate"), page.error
        assert page.raw == row["text"], page.source
        assert page.tokens.prompt == row["prompt_tokens"]
        assert page.tokens.output == len(row["token_ids"])
        assert page.tokens.image == np.prod(row["image_grid_thw"]) // 4
        assert page.finish_reason == ("stop" if row["token_ids"][-1] == 2036 else "length")
        assert page.seconds.vision > 0
        assert page.seconds.decode > 0
        seen.add(page.source)
    assert seen == set(files)
    wait_idle(engine)


def test_token_ids_through_generate(engine):
    expected = reference()
    files = sorted(expected)[:3]
    content = [{"type": "image"}, {"type": "text", "text": "Extraia o texto da página em JSON."}]
    chat = [{"role": "user", "content": content}]
    requests = [Request(chat, images=[file], request_id=file) for file in files]
    outputs = engine.generate(requests, SamplingParams(logprobs=True))
    for file, output in zip(files, outputs, strict=True):
        assert output.request_id == file
        assert output.token_ids == expected[file]["token_ids"]
        assert len(output.logprobs) == len(output.token_ids)
        assert all(lp <= 0 for lp in output.logprobs)


def test_pdf_pages_come_out_of_a_pdf(engine):
    truth = [
        json.loads(line) for line in (PAGES / "pdf_truth.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    results = {(r.source, r.page): r for r in engine.read([str(p) for p in sorted(PAGES.glob("*.pdf"))])}
    assert {(Path(s).name, p) for s, p in results} == {(t["file"], t["page"]) for t in truth}
    for row in truth:
        page = results[str(PAGES / row["file"]), row["page"]]
        want = set(row["truth"]["text"].split())
        assert len(want & set((page.text or "").split())) / len(want) > 0.4, (page.source, page.page)


def test_text_only_requests_and_all_kinds_of_prompt(engine):
    as_text = engine.generate(
        [Request("<|im_start|>user\nabc<|im_end|>\n<|im_start|>assistant\n")],
        SamplingParams(max_new_tokens=5),
    )
    ids = engine.core.prompter.encode("<|im_start|>user\nabc<|im_end|>\n<|im_start|>assistant\n", [])[0]
    as_ids = engine.generate([Request(ids)], SamplingParams(max_new_tokens=5))
    assert as_text[0].token_ids == as_ids[0].token_ids
    assert engine.generate([]) == []


def test_bad_pages_cost_no_other_page(engine, tmp_path):
    good = sorted(reference())[0]
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "cut.png").write_bytes(Path(good).read_bytes()[:5000])
    Image.new("RGB", (6000, 20)).save(tmp_path / "thin.png")
    inputs = [str(tmp_path / name) for name in ("empty.png", "text.png", "cut.png", "thin.png")]
    results = {r.source: r for r in engine.read([*inputs, good])}
    assert results[good].raw == reference()[good]["text"]
    for source in inputs:
        page = results[source]
        assert (page.status, page.finish_reason, page.page) == ("error", "error", 1)
        assert page.error
        assert "\n" not in page.error
        assert Path(source).name in page.error
        assert page.text is None
    wait_idle(engine)


def test_inputs_that_are_not_there_cost_no_other_page(engine, tmp_path):
    good, missing = sorted(reference())[0], str(tmp_path / "missing.png")
    results = {r.source: r for r in engine.read([missing, good, str(tmp_path / "*.tif")])}
    assert results.pop(good).raw == reference()[good]["text"]
    assert [r.status for r in results.values()] == ["error", "error"]
    assert missing in results


def test_an_engine_left_open_does_not_abort_the_process():
    code = """
import sys, threading
from pagemill import Engine
engine = Engine.from_pretrained("pagemill-tiny")
threading.Thread(target=lambda: list(engine.read(sys.argv[1])), daemon=True).start()
while not engine.core.stats.steps:
    pass
sys.exit(3)
"""
    command = [sys.executable, "-c", code, str(PAGES / "*.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3, done.stderr
    assert "terminate" not in done.stderr


def test_a_page_without_print_is_answered_without_the_model(engine, tmp_path):
    for size in ((1, 1), (448, 672)):
        Image.new("RGB", size, "white").save(tmp_path / "blank.png")
        steps = engine.core.stats.steps
        (page,) = engine.read(str(tmp_path / "blank.png"))
        assert (page.status, page.shortcut, page.attempts) == ("ok", "blank", 0)
        assert (page.text, page.header, page.tokens.output) == (None, None, 0)
        assert engine.core.stats.steps == steps


def test_a_one_pixel_image_is_read_like_any_other(engine):
    dot = np.full((1, 1, 3), 255, np.uint8)
    (output,) = engine.generate(
        [Request([{"role": "user", "content": [{"type": "image"}]}], images=[dot])],
        SamplingParams(max_new_tokens=5),
    )
    assert output.error is None
    assert output.tokens.image == 16, "enlarged to min_pixels"


def test_a_page_too_large_for_the_context_is_one_record(tmp_path):
    small = Image.open(PAGES / "prose_00.png")
    small.resize((1000, 1000)).save(tmp_path / "large.png")
    good = sorted(reference())[0]
    with Engine.from_pretrained("pagemill-tiny", max_model_len=1000) as engine:
        results = {
            r.source: r
            for r in engine.read(
                [str(tmp_path / "large.png"), good],
                params=SamplingParams(max_new_tokens=4),
                resolution="full",
            )
        }
    bad = results[str(tmp_path / "large.png")]
    assert bad.status == "error"
    assert "the context holds 1000" in bad.error
    assert results[good].status == "ok"


def test_skip_and_degenerate(engine):
    files = sorted(reference())[:2]
    assert [
        r.source for r in engine.read(files, skip={(files[0], 1)}, params=SamplingParams(max_new_tokens=3))
    ] == files[1:]


def test_leaving_early_cancels_the_rest(engine):
    for _ in engine.read(sorted(reference())[:8]):
        break
    gc.collect()
    wait_idle(engine)


def test_callers_share_one_engine(engine):
    expected, files = reference(), sorted(reference())[:6]
    out = {}

    def work(mine):
        for page in engine.read(mine):
            out[page.source] = page.raw

    threads = [threading.Thread(target=work, args=(files[i::3],)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert out == {file: expected[file]["text"] for file in files}


def test_stream_grows_and_ends(engine):
    file = sorted(reference())[0]
    prompt = engine.page_prompt

    async def one():
        texts = []
        async for output in engine.stream(Request(prompt, [file])):
            texts.append(output.text)
            last = output
        return texts, last

    async def both():
        return await asyncio.gather(one(), one())

    for texts, last in asyncio.run(both()):
        assert last.finish_reason == "stop"
        assert last.text == reference()[file]["text"]
        assert len(texts) > 5
        assert all(last.text.startswith(text.rstrip("\ufffd")) for text in texts)


def test_a_stream_left_early_is_cancelled(engine):
    async def leave():
        stream = engine.stream(Request(engine.page_prompt, [sorted(reference())[0]]))
        async for _ in stream:
            break
        await stream.aclose()

    asyncio.run(leave())
    wait_idle(engine)


def test_a_stream_whose_loop_has_ended_harms_nobody(engine):
    async def abandon():
        stream = engine.stream(Request(engine.page_prompt, [sorted(reference())[0]]))
        await anext(stream)
        return stream  # neither finished nor closed when its loop ends

    stream = asyncio.run(abandon())
    wait_idle(engine)
    del stream
    (page,) = engine.read(sorted(reference())[0], params=SamplingParams(max_new_tokens=2))
    assert page.status == "ok"


def test_closing_ends_what_runs():
    engine = Engine.from_pretrained("pagemill-tiny")
    pages = engine.read(sorted(reference())[:4])
    threading.Timer(0.3, engine.close).start()
    results = list(pages)
    assert len(results) == 4
    assert any(r.error and "closed" in r.error for r in results)
    (late,) = engine.generate([Request("text")])
    assert late.error == "the engine is closed"


def test_bad_requests_answer_with_their_reason(engine):
    good = sorted(reference())[0]
    outputs = engine.generate(
        [
            Request(engine.page_prompt),  # a placeholder and no image
            Request("no placeholder", [good]),
            Request(engine.page_prompt, ["/no/such/file.png"]),
            Request([{"role": "user", "content": 5}]),
            Request(engine.page_prompt, [np.zeros((0, 5, 3), np.uint8)]),
            Request("", []),
            Request(engine.page_prompt, [good]),
        ],
        SamplingParams(max_new_tokens=3),
    )
    assert [o.finish_reason for o in outputs] == ["error"] * 6 + ["length"]
    for output in outputs[:6]:
        assert output.error
        assert "Traceback" not in output.error


def one_image(patches=None, levels=None, grid=(1, 4, 6), tokens=6):
    patches = np.zeros((24, 588), np.uint8) if patches is None else patches
    levels = np.zeros((3, 256), np.float32) if levels is None else levels
    return Request([1, 2046, 3], images=[PreparedImage(patches, levels, grid, tokens, b"x" * 16)])


@pytest.mark.parametrize(
    "request_",
    [
        Request([1, 2, 3], params={"max_new_tokens": 5}),
        Request([1, 2, 3], priority="high"),
        Request([1.5] * 40),
        one_image(tokens=5),
        one_image(patches=np.zeros((24, 9), np.uint8)),
        one_image(patches=np.zeros((3, 588), np.uint8), grid=(1, 1, 3), tokens=0),
        one_image(patches=np.zeros((24, 588), np.float32)),
        one_image(levels=np.zeros((3, 255), np.float32)),
        one_image(levels=np.zeros((3, 256))),
        Request(7),
        Request([1, 2, 3], images=[3.5]),
    ],
    ids=[
        "params",
        "priority",
        "float tokens",
        "token count",
        "patch width",
        "odd grid",
        "float patches",
        "few levels",
        "wide levels",
        "prompt",
        "image",
    ],
)
def test_malformed_requests_harm_nobody(engine, request_):
    good = Request([1, 2, 3], params=SamplingParams(max_new_tokens=4))
    bad, fine = engine.generate([request_, good])
    assert bad.finish_reason == "error"
    assert bad.error
    assert "\n" not in bad.error
    assert (fine.finish_reason, fine.error) == ("length", None)
    wait_idle(engine)


def test_closing_while_readers_leave_early_hangs_nobody():
    files = sorted(reference())[:6]
    for _ in range(5):
        engine = Engine.from_pretrained("pagemill-tiny")

        def leave_early(engine=engine):
            for page in engine.read(files):
                if page.error:
                    break

        readers = [threading.Thread(target=leave_early) for _ in range(3)]
        readers.append(threading.Thread(target=lambda engine=engine: list(engine.read(files))))
        for reader in readers:
            reader.start()
        while not engine.core.stats.steps:
            pass
        engine.close()
        for reader in readers:
            reader.join(30)
            assert not reader.is_alive()
        engine.core.scheduler.check()


def test_a_fork_is_told_that_it_has_no_engine(engine):
    code = """
import os, sys
from pagemill import Engine, Request
engine = Engine.from_pretrained("pagemill-tiny")
child = os.fork()
if not child:
    (output,) = engine.generate([Request("text")])
    os._exit(0 if "does not survive a fork" in output.error else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_paths_are_inputs_too(engine):
    file = sorted(reference())[0]
    (page,) = engine.read(Path(file), params=SamplingParams(max_new_tokens=2))
    assert (page.source, page.status) == (file, "ok")


def test_image_settings_of_another_model_are_refused(tmp_path):
    from pagemill.model.loader import find_checkpoint

    shutil.copytree(find_checkpoint("pagemill-tiny"), tmp_path / "model")
    settings = tmp_path / "model" / "preprocessor_config.json"
    settings.write_text(json.dumps(dict(json.loads(settings.read_text()), patch_size=16)))
    with pytest.raises(CheckpointError, match="has patch_size 14, the image settings have 16"):
        Engine.from_pretrained(str(tmp_path / "model"))


def test_kv_memory_is_taken_when_it_is_used():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    for dtype in ("float32", "bfloat16"):
        with Engine.from_pretrained("pagemill-tiny", dtype=dtype, kv_cache_bytes=10_000_000):
            before = resident()
        with Engine.from_pretrained("pagemill-tiny", dtype=dtype, kv_cache_bytes=800_000_000):
            assert resident() - before < 300_000_000


def test_a_failing_step_ends_its_pages_and_not_the_engine():
    files = sorted(reference())[:2]
    with Engine.from_pretrained("pagemill-tiny") as engine:
        execute, calls = engine.core.runner.execute, []

        def fail_once(plan):
            calls.append(plan)
            if len(calls) == 3:
                raise MemoryError("out of memory")
            return execute(plan)

        engine.core.runner.execute = fail_once
        pages = list(engine.read(files[:1], params=SamplingParams(max_new_tokens=9)))
        assert pages[0].status == "error"
        assert "MemoryError" in pages[0].error
        (page,) = engine.read(files[1:], params=SamplingParams(max_new_tokens=9))
        assert page.status == "ok"
        assert is_idle(engine)


ILLEGAL = getattr(torch, "AcceleratorError", RuntimeError)(
    "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported later"
)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (ILLEGAL, True),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), True),
        (type(ILLEGAL)("CUDA error: out of memory\nCUDA kernel errors might be reported later"), False),
        (type(ILLEGAL)("CUDA error: invalid argument"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), False),
        (RuntimeError("shapes do not match"), False),
        (MemoryError("out of memory"), False),
    ],
)
def test_which_errors_lose_the_device(error, lost):
    gpu = FakeGpu()
    assert is_lost(error, None) is is_lost(error, gpu) is lost
    gpu.dead = True
    assert is_lost(error, gpu)


def test_a_device_that_raises_when_it_is_asked_is_not_alive(monkeypatch):
    gpu = Gpu(torch.device("cuda:1"))
    asked = Mock()
    monkeypatch.setattr(torch.cuda, "synchronize", asked)
    assert gpu.alive()
    asked.side_effect = ILLEGAL
    assert not gpu.alive()
    asked.assert_called_with(torch.device("cuda:1"))


@pytest.mark.parametrize("dead", [False, True])
def test_after_an_error_that_may_mean_anything_the_device_is_asked(monkeypatch, dead):
    """cuBLAS says the same where the context is lost and where memory is short: the batch is failed, or the engine ends."""
    gpu = FakeGpu()
    for module in ("core", "engine"):
        monkeypatch.setattr(f"pagemill.{module}.gpu_of", lambda device: gpu)
    files = sorted(reference())[:4]
    said = "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"
    with Engine.from_pretrained(max_num_seqs=1, max_step_image_tokens=16, max_step_tokens=32) as engine:
        execute, calls = engine.core.runner.execute, []

        def fail(plan):
            calls.append(plan)
            if len(calls) == 4:
                gpu.dead = dead
                raise RuntimeError(said)
            return execute(plan)

        engine.core.runner.execute = fail
        reading = engine.read(files, params=SamplingParams(max_new_tokens=9, max_retries=0))
        if dead:
            with pytest.raises(DeviceError, match=rf"lost to this process \({said}\)"):
                list(reading)
            assert len(calls) == 4
        else:
            found = list(reading)
            assert [said in (page.error or "") for page in found].count(True) == 1
            assert len(found) == 4


def test_a_lost_device_ends_the_engine_and_no_page_is_called_failed():
    files = sorted(reference())[:6]
    short = SamplingParams(max_new_tokens=9)
    with Engine.from_pretrained("pagemill-tiny", max_num_seqs=2, prepare_threads=1) as engine:
        execute, calls = engine.core.runner.execute, []
        (whole,) = engine.read(files[:1], params=short)

        def lose(plan):
            calls.append(plan)
            if len(calls) >= 12:
                raise ILLEGAL
            return execute(plan)

        engine.core.runner.execute = lose
        found = []
        with pytest.raises(DeviceError, match=r"illegal memory access.*begin it anew") as lost:
            found.extend(engine.read([files[0], files[0], *files], params=short))
        assert len(calls) == 12, "nothing more was asked of a device that is lost"
        assert found
        assert {page.status for page in found} <= {"ok", "truncated"}
        assert found[0].raw == whole.raw
        with pytest.raises(DeviceError) as again:
            list(engine.read(files, params=short))
        assert str(again.value) == str(lost.value)
        with pytest.raises(DeviceError):
            list(engine.generate([Request("a")]))
        with pytest.raises(DeviceError):
            list(engine.score(files[:1], ["a"]))

        async def stream():
            return [output async for output in engine.stream(Request("a"))]

        with pytest.raises(DeviceError):
            asyncio.run(stream())


def test_a_command_whose_device_is_lost_is_resumed(tmp_path, monkeypatch):
    files = sorted(reference())[:5]
    output = tmp_path / "out.jsonl"
    command = ["read", *files, "-o", str(output), "--concurrency", "1", "--max-new-tokens", "40"]
    execute, calls = Runner.execute, []

    def lose(self, plan):
        calls.append(plan)
        if len(calls) >= 40:
            raise ILLEGAL
        return execute(self, plan)

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "execute", lose)
        done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    *_, hint, error = done.output.splitlines()
    assert hint.startswith("stopped, for no device is left; finished pages are safe. Go on with: ")
    assert hint.endswith("--resume")
    said = "CUDA error: an illegal memory access was encountered"
    assert error.startswith(f"error: the device is lost to this process ({said}); begin it anew")
    first = [json.loads(line) for line in output.read_text().splitlines()]
    assert 0 < len(first) < len(files)
    assert CliRunner().invoke(app, [*command, "--resume"]).exit_code == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted(record["source"] for record in records) == files
    assert "error" not in {record["status"] for record in first + records}


@pytest.mark.parametrize("place", ["kernels.select", "engine.load_model", "runner.Runner.__init__"])
def test_a_device_that_fails_while_the_engine_starts_is_one_sentence(monkeypatch, place):
    monkeypatch.setattr(f"pagemill.{place}", Mock(side_effect=ILLEGAL))
    done = CliRunner().invoke(app, ["read", sorted(reference())[0]])
    assert done.exit_code == 2
    assert done.output == (
        "error: cpu failed while pagemill-tiny was loaded (CUDA error: an illegal memory access was encountered); "
        "try again, or take another device\n"
    )
    monkeypatch.setattr(f"pagemill.{place}", Mock(side_effect=RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes"):
        Engine.from_pretrained()


def test_reference_kernels_read_the_same(engine):
    file = sorted(reference())[0]
    with Engine.from_pretrained("pagemill-tiny", kernels="reference", dtype="float32") as other:
        assert set(other.describe()["kernels"].values()) == {"reference (torch)"}
        (page,) = other.read(file)
    assert page.raw == reference()[file]["text"]


def test_describe_tells_what_runs(engine):
    facts = json.loads(json.dumps(engine.describe()))
    assert facts["dtype"] == "float32"
    assert facts["kv_cache_tokens"] * 2 * 6 * 2 * 64 * 4 <= facts["kv_cache_bytes"]
    assert facts["kernels"]["paged_attention"].startswith("native")


def test_threads_are_set_for_the_native_kernels_too():
    from pagemill import _native

    before = _native.num_threads()
    try:
        with Engine.from_pretrained("pagemill-tiny", num_threads=1):
            assert _native.num_threads() == 1
    finally:
        _native.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["auto", "int8", "fp8"])
def test_the_kv_budget_is_what_is_allocated(dtype):
    options = dict(kv_cache_bytes=20_000_000, kv_cache_dtype=dtype)
    if dtype == "fp8":
        options["kernels"] = "reference"
    with Engine.from_pretrained("pagemill-tiny", **options) as engine:
        allocated = sum(
            part.nbytes for layer in engine.core.runner.kv_cache for part in layer if part is not None
        )
        assert 19_000_000 < allocated <= 20_000_000


@pytest.mark.parametrize(
    ("options", "error", "expected"),
    [
        (dict(max_seqs=3), ConfigError, "unknown engine option max_seqs; known are device"),
        (dict(device="tpu"), ConfigError, "device should be cpu or cuda"),
        (dict(device="cuda"), ConfigError, "sees no CUDA device"),
        (dict(dtype="float16"), ConfigError, "dtype should be auto, float32 or bfloat16"),
        (dict(block_size=0), ConfigError, "block_size should be at least 1"),
        (dict(max_num_seqs=10**9), ConfigError, "max_num_seqs should be at most 65536"),
        (dict(kv_cache_bytes=10**15), ConfigError, "more than the .* bytes of free memory"),
        (dict(kv_cache_dtype="fp4"), ConfigError, "kv_cache_dtype should be auto, int8 or fp8"),
        (dict(kv_cache_dtype="fp8"), ConfigError, '"fp8" needs the Triton kernels'),
        (dict(kernels="magic"), ConfigError, "kernels should be auto"),
        (dict(kernels="triton"), KernelUnavailable, "triton"),
        (dict(name="/no/such"), CheckpointError, "no model"),
    ],
    ids=str,
)
def test_impossible_options(options, error, expected):

    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(error, match=expected):
        Engine.from_pretrained(**options)


# Steering, through the engine.

SHORT = SamplingParams(max_new_tokens=12)
TITLE = {
    "type": "object",
    "properties": {"title": {"type": "string", "maxLength": 12}, "valid": {"type": "boolean"}},
    "required": ["title", "valid"],
    "additionalProperties": False,
}
BAD_SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}}
KINDS = {
    "source": str,
    "page": int,
    "status": str,
    **dict.fromkeys(("header", "margin", "footer", "text"), (str, type(None))),
    "finish_reason": str,
    "tokens": dict,
    "seconds": dict,
    "model": str,
    "error": (str, type(None)),
    "confidence": (dict, type(None)),
    "mismatch": (str, type(None)),
    "loops": list,
    "drafts": dict,
    "attempts": int,
    "shortcut": (str, type(None)),
}


class SeesLoops:
    """A detector that calls the first tokens of every output a loop."""

    def __init__(self, pieces, expected_tokens=None):
        self.count = 0

    def push(self, token):
        self.count += 1
        return Loop("period", 6, 2, 3, 10) if self.count == 10 else None

    def rollback(self, num_tokens):
        self.count = num_tokens


def copies(folder, count, file="prose_00.png"):
    names = [folder / f"copy{i}.png" for i in range(count)]
    for name in names:
        shutil.copy(PAGES / file, name)
    return list(map(str, names))


def record(page):
    """The page's record, checked: strict JSON, the keys in order, each of its type."""

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    line = page.to_json()
    assert "\n" not in line
    value = json.loads(line, parse_constant=refuse)
    assert list(value) == list(KINDS)
    for name, kind in KINDS.items():
        assert isinstance(value[name], kind), name
    assert list(value["tokens"]) == ["image", "prompt", "output", "discarded"]
    assert list(value["drafts"]) == ["proposed", "accepted"]
    assert all(isinstance(n, int) for part in ("tokens", "drafts") for n in value[part].values())
    assert value["drafts"]["accepted"] <= value["drafts"]["proposed"]
    for loop in value["loops"]:
        assert list(loop) == ["kind", "at", "period", "repeats", "tokens", "action"]
    if value["confidence"] is not None:
        assert list(value["confidence"]) == ["mean", "worst", "fields"]
        assert 0 <= value["confidence"]["worst"] <= value["confidence"]["mean"] <= 1
        assert all(0 <= p <= 1 for p in value["confidence"]["fields"].values())
    assert (value["status"] == "error") == (value["error"] is not None)
    return value


def test_every_kind_of_page_is_one_strict_record(engine, tmp_path, monkeypatch):
    twins = copies(tmp_path, 2)
    Image.new("RGB", (448, 672), "white").save(tmp_path / "blank.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    files = [*twins, str(tmp_path / "blank.png"), str(tmp_path / "bad.png")]
    records = {r["source"]: r for r in map(record, engine.read(files, params=SHORT))}
    assert {r["status"] for r in records.values()} == {"ok", "error"}
    bad = records[files[3]]
    assert (bad["confidence"], bad["mismatch"], bad["loops"], bad["shortcut"]) == (None, None, [], None)
    first, second = sorted((records[name] for name in twins), key=lambda r: -r["attempts"])
    assert (first["attempts"], first["shortcut"], first["finish_reason"]) == (1, None, "length")
    assert second["shortcut"] == f"duplicate of {first['source']} page 1"
    assert (second["attempts"], set(second["tokens"].values())) == (0, {0})
    assert [second[name] for name in ("text", "header", "confidence", "mismatch")] == [
        first[name] for name in ("text", "header", "confidence", "mismatch")
    ]

    monkeypatch.setattr("pagemill.core.LoopDetector", SeesLoops)
    for guidance in ("page", "off", TITLE):
        params = SamplingParams(max_new_tokens=30, guard="stop", guidance=guidance)
        value = record(*engine.read(twins[0], params=params))
        assert (value["status"], value["finish_reason"]) == ("degenerate", "loop")
        assert value["attempts"] == 2
        assert [loop["action"] for loop in value["loops"]] == ["end", "end"]
        assert (value["tokens"]["output"], value["tokens"]["discarded"]) == (6, 4 + 4 + 6)
        if guidance == TITLE:
            assert set(json.loads(value["text"])) == {"title", "valid"}
    wait_idle(engine)


def test_duplicates_are_read_themselves_where_the_first_one_failed(engine, tmp_path, monkeypatch):
    add, failed = engine.core.add, []

    def fail_once(*arguments):
        if not failed:
            failed.append(arguments)
            raise RequestError("no luck")
        return add(*arguments)

    monkeypatch.setattr(engine.core, "add", fail_once)
    pages = list(engine.read(copies(tmp_path, 5), params=SHORT))
    assert sorted(page.status for page in pages) == ["error", "ok", "ok", "ok", "ok"]
    good = [page for page in pages if page.status == "ok"]
    assert len({page.text for page in good}) == 1
    assert sum(page.attempts for page in good) >= 1
    assert all(page.shortcut is None or page.attempts == 0 for page in good)
    wait_idle(engine)


def test_duplicates_of_a_page_that_is_cancelled_are_let_go(engine, tmp_path):
    files = [*copies(tmp_path, 4), str(tmp_path / "empty.png")]
    (tmp_path / "empty.png").touch()
    for page in engine.read(files[::-1]):
        assert page.status == "error", "the first to come is the file that is none"
        break
    gc.collect()
    wait_idle(engine)
    (page,) = engine.read(files[0], params=SHORT)
    assert (page.status, page.attempts) == ("ok", 1), "another call's answers are not taken"


def test_closing_answers_duplicates_that_wait(tmp_path):
    engine = Engine.from_pretrained("pagemill-tiny", max_num_seqs=2)
    pages = engine.read(copies(tmp_path, 5))
    threading.Timer(0.2, engine.close).start()
    assert len(list(pages)) == 5


def test_look_alikes_are_no_duplicates(engine, tmp_path):
    (file,) = copies(tmp_path, 1)
    pixels = np.asarray(Image.open(file).convert("RGB")).copy()
    pixels[300:310, 200:210] ^= 0x80
    Image.fromarray(pixels).save(tmp_path / "other.png")
    pages = list(engine.read([file, str(tmp_path / "other.png")], params=SHORT))
    assert [page.shortcut for page in pages] == [None, None]


def test_a_page_that_ends_in_a_failing_step_is_delivered(engine, tmp_path):
    """It has ended already, so nothing would end it again."""
    step, files = engine.core.step, [*copies(tmp_path, 1), str(PAGES / "form_24.png")]

    def fail_after_an_end():
        advanced, finished = step()
        if finished:
            raise AssertionError("a bug behind it")
        return advanced, finished

    engine.core.step = fail_after_an_end
    try:
        pages = list(engine.read(files[:1], params=SamplingParams(max_new_tokens=4)))
        assert [page.status for page in pages] == ["ok"]
    finally:
        del engine.core.step
    wait_idle(engine)


def test_draft_texts_change_nothing_whatever_they_say(engine, tmp_path):
    file = str(PAGES / "form_24.png")
    truth = {
        row["file"]: row["truth"]
        for row in map(json.loads, (PAGES / "truth.jsonl").read_text(encoding="utf-8").splitlines())
    }[Path(file).name]
    (plain,) = engine.read(file, params=SamplingParams(drafts="off"))
    assert plain.drafts == (0, 0)
    seen = []

    def right(pixels):
        seen.append((pixels.dtype, pixels.shape))
        return "\n".join(value for value in truth.values() if value)

    answers = [right, lambda pixels: "", lambda pixels: "junk \x00 <|im_end|> <|image_pad|>" * 500]
    for answer in answers:
        (page,) = engine.read(file, draft_text=answer)
        assert (page.raw, page.confidence) == (plain.raw, plain.confidence)
        assert page.finish_reason == plain.finish_reason
    assert seen[0][0] == np.uint8
    assert seen[0][1][2] == 3


def test_a_draft_text_that_fails_costs_no_page(engine, tmp_path):
    def broken(pixels):
        raise OSError("the other engine\nis gone")

    (file,) = copies(tmp_path, 1)
    for answer in (broken, lambda pixels: b"bytes", lambda pixels: "\ud800"):
        with pytest.warns(UserWarning, match="draft_text failed on .*copy0.png page 1"):
            (page,) = engine.read(file, params=SHORT, draft_text=answer)
        assert page.status == "ok"


@pytest.mark.parametrize("cap", [1, 3, 20, 60])
def test_a_schema_holds_through_generate_read_and_stream(engine, cap):
    file = str(PAGES / "prose_00.png")
    params = SamplingParams(max_new_tokens=cap, guidance=TITLE)
    prompt = engine.page_prompt
    (output,) = engine.generate([Request(prompt, [file])], params)
    (page,) = engine.read(file, params=params)

    async def last():
        texts = [output async for output in engine.stream(Request(prompt, [file]), params)]
        assert all(output.finish_reason is None for output in texts[:-1])
        return texts[-1]

    streamed = asyncio.run(last())
    for text in (output.text, page.raw, streamed.text):
        value = json.loads(text)
        assert list(value) == ["title", "valid"]
        assert len(value["title"]) <= 12
        assert isinstance(value["valid"], bool)
    assert output.text == streamed.text == page.raw
    assert output.token_ids == streamed.token_ids
    assert len(output.token_ids) <= cap


def test_guided_pages_are_valid_json_at_any_cap(engine):
    file = str(PAGES / "prose_00.png")
    caps = [1, 2, 3, 4, 5, 8, 13, 21, 34]
    requests = [
        Request(
            engine.page_prompt,
            [file],
            params=SamplingParams(max_new_tokens=cap, guidance="page", logprobs=True),
        )
        for cap in caps
    ]
    outputs = engine.generate(requests)
    for cap, output in zip(caps, outputs, strict=True):
        assert "text" in json.loads(output.text)
        assert output.token_ids == outputs[-1].token_ids[:cap]
        assert len(output.logprobs) == cap


@pytest.mark.parametrize(
    ("guidance", "place"),
    [
        (BAD_SCHEMA, "JSON schema at /properties/a: "),
        ({"type": "nonsense"}, "JSON schema"),
        ({"enum": []}, "guidance|JSON schema"),
        ({"default": {1, 2}}, "JSON schema: it cannot be written as JSON"),
        (Regex("(ab"), "regular expression '\\(ab' at character"),
        (Regex("a(?=b)"), "regular expression"),
        (Regex("a" * 300_000), "262144 are the limit"),
    ],
    ids=["pattern", "type", "nothing", "no JSON", "parenthesis", "look-ahead", "long"],
)
def test_guidance_that_is_none_is_refused_at_submission(engine, guidance, place):
    params = SamplingParams(max_new_tokens=5, guidance=guidance)
    steps = engine.core.stats.steps
    (output,) = engine.generate([Request([1, 2, 3], params=params)])
    assert output.finish_reason == "error"
    assert re.search(place, output.error)
    assert "\n" not in output.error
    with pytest.raises(RequestError, match=place):
        engine.read(str(PAGES / "prose_00.png"), params=params)
    assert engine.core.stats.steps == steps
    bad, good = engine.generate([Request([1, 2], params=params), Request([1, 2], params=SHORT)])
    assert (bad.finish_reason, good.error) == ("error", None)


def test_a_grammar_too_complex_at_run_time_ends_its_page_alone(engine, monkeypatch):
    masks = Guide.masks

    def too_complex(self, draft, out):
        if "title" in self._grammar.source and len(self._tokens) > 4:
            raise RequestError("guidance: too complex to follow after 5 tokens")
        return masks(self, draft, out)

    monkeypatch.setattr(Guide, "masks", too_complex)
    file = str(PAGES / "prose_00.png")
    requests = [
        Request(engine.page_prompt, [file], params=SamplingParams(max_new_tokens=20, guidance=guidance))
        for guidance in ("page", TITLE, "off")
    ]
    first, bad, last = engine.generate(requests)
    assert (first.error, last.error) == (None, None)
    assert (bad.finish_reason, bad.text) == ("error", "")
    assert "too complex" in bad.error
    (page,) = engine.read(file, params=requests[1].params)
    assert (page.status, page.finish_reason) == ("error", "error")
    assert "prose_00.png page 1: guidance: too complex" in page.error
    wait_idle(engine)


def test_the_cap_from_a_page_s_ink_cuts_no_sample_page(engine):
    rows = [
        json.loads(line)
        for name in ("truth.jsonl", "pdf_truth.jsonl")
        for line in (PAGES / name).read_text(encoding="utf-8").splitlines()
    ]
    options = FitOptions("auto", False, engine.profile.text_height)
    pages = {
        (ref.source, ref.page): ref
        for file in sorted(PAGES.glob("*.p[nd]*"))
        for ref in list_pages(str(file))
    }
    assert len(pages) == len(rows)
    for row in rows:
        ref = pages[str(PAGES / row["file"]), row.get("page", 1)]
        _, ink = fit_page(ref, engine.dpi, options, engine.processor)
        wanted = len(engine.core.prompter.encode_text(json.dumps(row["truth"], ensure_ascii=False))) + 1
        assert wanted <= plausible_output_chars(ink) + 64, (ref.source, ref.page)


def test_rescue_shows_in_a_stream_and_goes_on(engine, monkeypatch):
    monkeypatch.setattr("pagemill.core.LoopDetector", SeesLoops)
    file, lengths = str(PAGES / "prose_00.png"), []

    async def read():
        params = SamplingParams(max_new_tokens=40, max_rescues=50, guidance="page", drafts="off")
        async for output in engine.stream(Request(engine.page_prompt, [file]), params):
            lengths.append(len(output.token_ids))
        return output

    output = asyncio.run(read())
    assert output.finish_reason in ("length", "loop")
    assert output.tokens.discarded == 4 * (output.tokens.discarded // 4) > 0
    assert "text" in json.loads(output.text)


class TestCommandLine:
    """`pagemill read` with this engine; the command line itself is tested with a fake one."""

    @pytest.fixture
    def cli(self, engine, monkeypatch):
        from pagemill import cli

        commands = import_module("pagemill.cli.read")

        class Lent(nullcontext):
            read = staticmethod(engine.read)

        monkeypatch.setattr(commands, "load_engine", lambda *_, **__: Lent(engine))
        return lambda *arguments: CliRunner().invoke(cli.app, list(map(str, arguments)))

    def test_guidance_that_is_none_leaves_the_old_output(self, cli, tmp_path):
        (tmp_path / "schema.json").write_text(json.dumps(BAD_SCHEMA))
        old = tmp_path / "out.jsonl"
        old.write_text('{"source":"x.png","page":1,"status":"ok"}\n')
        for guidance, place in (
            (tmp_path / "schema.json", "at /properties/a: "),
            ("regex:(", "at character 1"),
        ):
            done = cli("read", PAGES / "prose_00.png", "--guidance", guidance, "-o", old, "--overwrite")
            assert done.exit_code == 2
            assert place in done.stderr
            assert done.stderr.count("\n") == 1
            assert old.read_text() == '{"source":"x.png","page":1,"status":"ok"}\n'

    def test_a_schema_in_a_file(self, cli, tmp_path):
        (tmp_path / "schema.json").write_text(json.dumps(TITLE))
        done = cli(
            *("read", PAGES / "prose_00.png", "--guidance", tmp_path / "schema.json", "--max-new-tokens", 7),
            *(
                "--guard",
                "stop",
                "--drafts",
                "off",
                "--resolution",
                600,
                "--crop",
                "-o",
                tmp_path / "o.jsonl",
            ),
        )
        assert done.exit_code == 0, done.stderr
        value = json.loads((tmp_path / "o.jsonl").read_text())
        assert set(json.loads(value["text"])) == {"title", "valid"}
        assert value["drafts"] == {"proposed": 0, "accepted": 0}
        assert value["tokens"]["image"] < 384
