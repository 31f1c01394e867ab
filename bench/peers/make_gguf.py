"""A checkpoint as GGUF files for llama.cpp; `weights.sh` calls it.

make_gguf.py convert SOURCE CHECKPOINT FOLDER    text-bf16.gguf and vision-bf16.gguf, by the converter in llama.cpp's SOURCE
gguf.py quantize FOLDER q8_0 q4_0           text-q8_0.gguf and text-q4_0.gguf, by llama-cpp-python
"""

from __future__ import annotations

import runpy
import sys
from multiprocessing import get_context
from typing import Any


def convert(source: str, arguments: list[str]) -> None:
    """Run convert_hf_to_gguf.py; a tokenizer that it does not know by its fingerprint is one of Qwen2."""
    sys.path[:0] = [source, f"{source}/gguf-py"]
    from conversion.base import TextModel

    known = TextModel.get_vocab_base_pre

    def name(self: Any, tokenizer: Any) -> str:
        try:
            return str(known(self, tokenizer))
        except NotImplementedError:
            return "qwen2"

    TextModel.get_vocab_base_pre = name
    sys.argv = ["convert_hf_to_gguf.py", *arguments]
    runpy.run_path(f"{source}/convert_hf_to_gguf.py", run_name="__main__")


def quantize(folder: str, form: str) -> None:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{form.upper()}")
    files = (f"{folder}/text-{name}.gguf".encode() for name in ("bf16", form))
    if llama_cpp.llama_model_quantize(*files, params) != 0:
        raise SystemExit(f"quantising to {form} failed")


def main() -> None:
    match sys.argv[1:]:
        case ["convert", source, checkpoint, folder]:
            for part in ([], ["--mmproj"]):
                output = f"{folder}/{'vision' if part else 'text'}-bf16.gguf"
                arguments = [checkpoint, *part, "--outtype", "bf16", "--outfile", output]
                child = get_context("spawn").Process(target=convert, args=(source, arguments))
                child.start()
                child.join()  # a child gives its memory back
                if child.exitcode:
                    raise SystemExit(child.exitcode)
        case ["quantize", folder, *forms]:
            for form in forms:
                quantize(folder, form)
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
