"""An engine that reads nothing: what a page yields stands in its file's name.

`a_p3.png` has three pages; names with `bad` fail, names with `loop` degenerate. Pages finish out of order.
`FAKE_DELAY` (seconds a page), `FAKE_CLOSE` (seconds to close), `FAKE_RAISE` and `FAKE_LOST` (the source at
which the engine breaks, or loses its device) steer it; to the file `FAKE_HOW` it writes how it is asked to read.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

from pagemill.errors import CheckpointError, DeviceError
from pagemill.results import PageResult, TokenCounts


def pages_of(source: str) -> int:
    found = re.search(r"_p(\d+)\.", source)
    return int(found[1]) if found else 1


def result_of(source: str, page: int) -> PageResult:
    name = Path(source).name
    if "bad" in name:
        return PageResult(
            source, page, "error", finish_reason="error", error=f"{source}, page {page}: cannot be decoded"
        )
    return PageResult(
        source,
        page,
        "degenerate" if "loop" in name else "ok",
        header=f"header of {name}",
        text=f"page {page} of {name}\nsegunda linha: ação, 日本語\n" + "x" * (page * 37 % 500),
        footer=str(page),
        tokens=TokenCounts(10, 20, 30),
        model="fake",
    )


class Engine:
    def __init__(self, **options: object) -> None:
        self.options = options
        self.delay = float(os.environ.get("FAKE_DELAY", "0"))
        self.raise_at = os.environ.get("FAKE_RAISE")
        self.reads: list[tuple[str, int]] = []

    @classmethod
    def from_pretrained(cls, name: str, **options: object) -> Engine:
        if name == "nowhere":
            raise CheckpointError("nowhere is neither a folder nor a known checkpoint.")
        if name.startswith("too"):
            raise MemoryError
        return cls(model=name, **options)

    def describe(self) -> dict[str, object]:
        return {**self.options, "kernels": {"attention": "fake"}}

    def read(
        self,
        inputs: Sequence[str],
        *,
        skip: Container[tuple[str, int]] = (),
        **how: object,
    ) -> Iterator[PageResult]:
        if "FAKE_HOW" in os.environ:
            Path(os.environ["FAKE_HOW"]).write_text(json.dumps(how, default=repr))
        waiting: list[PageResult] = []
        for source in inputs:
            if self.raise_at and self.raise_at in source:
                raise RuntimeError("the engine broke")
            if "FAKE_LOST" in os.environ and os.environ["FAKE_LOST"] in source:
                raise DeviceError("cuda:0 is lost to this process")
            for page in range(1, pages_of(source) + 1):
                if (source, page) in skip:
                    continue
                self.reads.append((source, page))
                waiting.append(result_of(source, page))
                time.sleep(self.delay)
                if len(waiting) == 4:
                    yield waiting.pop(2)
        yield from reversed(waiting)

    def close(self) -> None:
        time.sleep(float(os.environ.get("FAKE_CLOSE", "0")))

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
