"""The public engine on the embedded model: what it reads, and that one bad page costs no other."""

import asyncio
import gc
import json
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pagemill import Engine, Request, SamplingParams
from pagemill.errors import CheckpointError, ConfigError, KernelUnavailable
from pagemill.pages.preprocess import PreparedImage

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
    for page in engine.read(
        files, params=SamplingParams(guidance="off", max_retries=0), resolution="full"
    ):
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
while not engine.core.num_steps:
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
        steps = engine.core.num_steps
        (page,) = engine.read(str(tmp_path / "blank.png"))
        assert (page.status, page.shortcut, page.attempts) == ("ok", "blank", 0)
        assert (page.text, page.header, page.tokens.output) == (None, None, 0)
        assert engine.core.num_steps == steps


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
            for r in engine.read([str(tmp_path / "large.png"), good], params=SamplingParams(max_new_tokens=4))
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


@pytest.mark.parametrize(
    "request_",
    [
        Request([1, 2, 3], params={"max_new_tokens": 5}),
        Request([1, 2, 3], priority="high"),
        Request([1.5] * 40),
        Request(
            [1, 2046, 3], images=[PreparedImage(np.zeros((24, 1176), np.float32), (1, 4, 6), 5, b"x" * 16)]
        ),
        Request([1, 2046, 3], images=[PreparedImage(np.zeros((24, 9), np.float32), (1, 4, 6), 6, b"x" * 16)]),
        Request(
            [1, 2046, 3], images=[PreparedImage(np.zeros((3, 1176), np.float32), (1, 1, 3), 0, b"x" * 16)]
        ),
        Request(7),
        Request([1, 2, 3], images=[3.5]),
    ],
    ids=["params", "priority", "float tokens", "token count", "patch width", "odd grid", "prompt", "image"],
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
        while not engine.core.num_steps:
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


def test_the_kv_budget_is_what_is_allocated():
    with Engine.from_pretrained("pagemill-tiny", kv_cache_bytes=20_000_000) as engine:
        allocated = sum(k.nbytes + v.nbytes for k, v in engine.core.runner.kv_cache)
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
        (dict(kernels="magic"), ConfigError, "kernels should be auto"),
        (dict(kernels="triton"), KernelUnavailable, "triton"),
        (dict(name="/no/such"), CheckpointError, "no model"),
    ],
    ids=str,
)
def test_impossible_options(options, error, expected):
    import torch

    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(error, match=expected):
        Engine.from_pretrained(**options)
