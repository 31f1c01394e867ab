"""What guidance costs: token masks, compiling, starting, memory, and the interpreter lock, for llguidance and xgrammar.

    python bench/guidance.py                                         # pagemill's guidance, 2k and 152k tokens
    pip install --target /tmp/xgrammar --no-deps xgrammar apache-tvm-ffi
    PYTHONPATH=/tmp/xgrammar python bench/guidance.py --xgrammar     # the other library, on the same outputs

The outputs are those of pagemill-tiny on the sample pages (`pages/reference_hf_fp32.jsonl`, those that conform). The 152k
vocabulary is synthetic: pagemill-tiny's byte-level BPE, merged on to 151,643 tokens with random pairs and with whole characters of
the CJK and Hangul blocks, 22 special tokens, 152,064 logits. Every case runs in a process of its own, so that memory is its own;
times are processor times of the calling thread, which other programs disturb less than the clock. xgrammar stops after 20 s.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from environment import PAGES, describe, show
from tokenizers import Tokenizer

from pagemill.decode.guidance import Guide, GuideFactory, PageFormat
from pagemill.model.loader import find_checkpoint

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {name: {"type": ["string", "null"]} for name in ("header", "margin", "footer", "text")},
    "required": ["header", "margin", "footer", "text"],
    "additionalProperties": False,
}
_STRING = (
    r'"\"" ([^"\\\x00-\x1f] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F] [0-9a-fA-F] [0-9a-fA-F] [0-9a-fA-F]))* "\""'
)


def vocabulary(name: str) -> tuple[Tokenizer, int, list[int]]:
    """Return a tokenizer, the width of the logits, and the stop ids."""
    tiny = json.loads((find_checkpoint("pagemill-tiny") / "tokenizer.json").read_text())
    if name == "2k":
        return Tokenizer.from_str(json.dumps(tiny)), 2048, [2036, 2034]
    rng = random.Random(0)
    vocab: dict[str, int] = tiny["model"]["vocab"]
    merges: list[Any] = tiny["model"]["merges"]
    letters = Tokenizer.from_str(json.dumps(tiny)).pre_tokenizer

    def merge(left: str, right: str) -> None:
        if left + right not in vocab and len(left + right) <= 24:
            vocab[left + right] = len(vocab)
            merges.append([left, right])

    for code in [*range(0x4E00, 0x9FA6), *range(0xAC00, 0xD7A4)]:
        a, b, c = letters.pre_tokenize_str(chr(code))[0][0]
        merge(a, b)
        merge(a + b, c)
    words = [word for word in vocab if word.lstrip("Ġ").isalpha()][:2000]
    tails = [word for word in words if not word.startswith("Ġ")]
    while len(vocab) < 151_643:
        merge(rng.choice(words), rng.choice(tails))
    names = [token["content"] for token in tiny["added_tokens"]] + [f"<|extra_{i}|>" for i in range(8)]
    tiny["added_tokens"] = [
        dict(tiny["added_tokens"][0], id=len(vocab) + i, content=content) for i, content in enumerate(names)
    ]
    return Tokenizer.from_str(json.dumps(tiny)), 152_064, [len(vocab) + 2, len(vocab)]


def outputs(tokenizer: Tokenizer, as_learned: bool) -> list[list[int]]:
    """Return the token ids of the sample outputs that are JSON, end token left out."""
    found = []
    for line in (PAGES / "reference_hf_fp32.jsonl").read_text().splitlines():
        page = json.loads(line)
        try:
            json.loads(page["text"])
        except ValueError:
            continue
        found.append(page["token_ids"][:-1] if as_learned else tokenizer.encode(page["text"]).ids)
    return found


def resident() -> float:
    """Memory of this process, MB."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.thread_time()
    result = function()
    return result, time.thread_time() - start


def spread(seconds: list[float]) -> dict[str, float]:
    us = np.array(seconds) * 1e6
    return {
        "median us": round(float(np.median(us)), 2),
        "p99 us": round(float(np.quantile(us, 0.99)), 1),
        "max us": round(float(us.max()), 1),
    }


def lock_share(work: Callable[[], Any], seconds: float = 1.0) -> float:
    """Share of its own speed that a Python loop keeps in this thread while another thread repeats `work`."""

    def loop() -> int:
        count, end = 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            count += 1
        return count

    alone = loop()
    stop = threading.Event()

    def other() -> None:
        while not stop.is_set():
            work()

    thread = threading.Thread(target=other)
    thread.start()
    beside = loop()
    stop.set()
    thread.join()
    return beside / alone


def measure_pagemill(name: str, what: str, max_chars: int | None) -> dict[str, Any]:
    tokenizer, width, stops = vocabulary(name)
    texts = outputs(tokenizer, name == "2k")
    before = resident()
    factory, start = timed(lambda: GuideFactory(tokenizer, width, frozenset(stops), PageFormat()))
    after = resident()
    grammar, compiling = timed(lambda: factory.compile("page" if what == "page" else SCHEMA, max_chars))
    row = np.zeros((1, factory.num_words), np.int32)
    rows = np.zeros((9, factory.num_words), np.int32)
    first = timed(lambda: factory.start(grammar).masks([], row))[1]
    times: dict[str, list[float]] = {
        k: [] for k in ("start", "mask", "forced", "accept", "draft of 8", "closing", "end_string")
    }
    guides: list[Guide] = []
    for tokens in texts:
        guide, seconds = timed(lambda: factory.start(grammar))
        times["start"].append(seconds)
        for i, token in enumerate(tokens):
            times["mask"].append(timed(lambda g=guide: g.masks([], row))[1])
            times["forced"].append(timed(guide.forced)[1])
            if i % 16 == 0 and len(tokens) - i >= 8:
                times["draft of 8"].append(timed(lambda g=guide, d=tokens[i : i + 8]: g.masks(d, rows))[1])
            if i % 32 == 0:
                times["closing"].append(timed(guide.closing)[1])
                times["end_string"].append(timed(guide.end_string)[1])
            times["accept"].append(timed(lambda g=guide, t=token: g.accept([t]))[1])
        guides.append(guide)
    middle = factory.start(grammar)
    middle.accept(texts[0][: len(texts[0]) // 2])
    many = np.zeros((33, factory.num_words), np.int32)
    draft = texts[0][len(texts[0]) // 2 :][:32]
    return {
        "tokenizer ms": round(1e3 * start, 1), "tokenizer MB": round(after - before, 1),
        "compile ms": round(1e3 * compiling, 2), "first mask ms": round(1e3 * first, 2),
        "tokens": len(times["mask"]), "MB of all guides": round(resident() - after, 1),
        **{k: spread(v) for k, v in times.items()},
        "lock kept": round(lock_share(lambda: middle.masks(draft, many)), 2),
    }  # fmt: skip


def measure_xgrammar(name: str, what: str) -> dict[str, Any]:
    before_import = resident()
    xgrammar, importing = timed(lambda: __import__("xgrammar"))
    imported = resident() - before_import
    tokenizer, width, stops = vocabulary(name)
    texts = outputs(tokenizer, name == "2k")
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    words = [""] * (max(vocab.values()) + 1)
    for word, i in vocab.items():
        words[i] = word
    before = resident()
    info, start = timed(
        lambda: xgrammar.TokenizerInfo(
            words, xgrammar.VocabType.BYTE_LEVEL, vocab_size=width, stop_token_ids=stops
        )
    )
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    after = resident()
    if what == "page":
        compiled, compiling = timed(lambda: compiler.compile_grammar(ebnf()))
    elif what == "any order":
        free = dict(SCHEMA, required=["text"])
        compiled, compiling = timed(
            lambda: compiler.compile_json_schema(
                json.dumps(free), any_whitespace=False, separators=(", ", ": "), any_order=True
            )
        )
    else:
        compiled, compiling = timed(
            lambda: compiler.compile_json_schema(
                json.dumps(SCHEMA), any_whitespace=False, separators=(", ", ": ")
            )
        )
    mask = xgrammar.allocate_token_bitmask(1, width)
    first = timed(lambda: xgrammar.GrammarMatcher(compiled).fill_next_token_bitmask(mask))[1]
    times: dict[str, list[float]] = {k: [] for k in ("start", "mask", "forced", "accept")}
    matchers = []
    end = time.thread_time() + 20
    for tokens in texts:
        if time.thread_time() > end:
            break
        matcher, seconds = timed(lambda: xgrammar.GrammarMatcher(compiled))
        times["start"].append(seconds)
        for token in tokens:
            times["mask"].append(timed(lambda m=matcher: m.fill_next_token_bitmask(mask))[1])
            times["forced"].append(timed(matcher.find_jump_forward_string)[1])
            accepted, seconds = timed(lambda m=matcher, t=token: m.accept_token(t))
            if not accepted:
                raise SystemExit(
                    f"{name}, {what}: xgrammar refuses token {token} of {tokenizer.decode(tokens)!r}"
                )
            times["accept"].append(seconds)
        matchers.append(matcher)
    middle = xgrammar.GrammarMatcher(compiled)
    for token in texts[0][: len(texts[0]) // 2]:
        middle.accept_token(token)
    return {
        "import s": round(importing, 2), "import MB": round(imported, 1),
        "tokenizer ms": round(1e3 * start, 1), "tokenizer MB": round(after - before, 1),
        "compile ms": round(1e3 * compiling, 2), "first mask ms": round(1e3 * first, 2),
        "tokens": len(times["mask"]), "MB of all guides": round(resident() - after, 1),
        **{k: spread(v) for k, v in times.items()},
        "lock kept": round(lock_share(lambda: middle.fill_next_token_bitmask(mask)), 2),
    }  # fmt: skip


def ebnf() -> str:
    """The page in any order, `text` required, with one rule for every set of keys already written."""
    keys = PageFormat().keys
    lines = ['root ::= "{" first "}"', 'value ::= "null" | string', f"string ::= {_STRING}"]

    def choices(used: int, separator: str) -> list[str]:
        return [
            f'"{separator}\\"{key}\\": " value more{used | 1 << i}'
            for i, key in enumerate(keys)
            if not used >> i & 1
        ]

    lines.append("first ::= " + " | ".join(choices(0, "")))
    for used in range(1, 16):
        done = ['""'] if used >> keys.index("text") & 1 else []
        lines.append(f"more{used} ::= " + " | ".join(choices(used, ", ") + done))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--xgrammar", action="store_true", help="measure xgrammar, which must be importable")
    parser.add_argument("--one", nargs=3, metavar=("VOCABULARY", "WHAT", "MAX_CHARS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, what, most = args.one
        result = (
            measure_xgrammar(name, what) if args.xgrammar else measure_pagemill(name, what, int(most) or None)
        )
        print(json.dumps(result))
        return
    show(describe("tokenizers", "xgrammar" if args.xgrammar else "llguidance"))
    cases = (
        [("page", 0), ("any order", 0), ("schema", 0)]
        if args.xgrammar
        else [("page", 0), ("page", 8000), ("schema", 0)]
    )
    for name in ("2k", "152k"):
        for what, most in cases:
            command = [sys.executable, str(Path(__file__)), "--one", name, what, str(most)]
            result = subprocess.run(command + ["--xgrammar"] * args.xgrammar, capture_output=True, text=True)
            print(f"\n{name} tokens, {what}" + (f" of strings up to {most} characters" if most else ""))
            if result.returncode:
                print(result.stderr.strip()[-500:])
                continue
            for key, value in json.loads(result.stdout).items():
                print(f"  {key:18} {value}")


if __name__ == "__main__":
    main()
