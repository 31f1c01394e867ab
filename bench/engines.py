"""Other OCR engines as callables, for `pagemill compare`; run it from this folder, with the engine's package installed.

pip install rapidocr onnxruntime
pagemill compare pages/ --truth pages/truth.jsonl -e pagemill-tiny -e RapidOCR=python:engines:rapidocr
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt


@lru_cache(maxsize=1)
def _rapidocr() -> Any:
    from rapidocr import RapidOCR

    return RapidOCR(params={"Global.log_level": "warning"})


def rapidocr(rgb: npt.NDArray[np.uint8]) -> str:
    """RapidOCR (PaddleOCR's models under ONNX Runtime), with its defaults; its boxes are joined into lines."""
    found = _rapidocr()(np.ascontiguousarray(rgb[:, :, ::-1]))
    return "" if found.txts is None else str(found.to_markdown())
