"""Let torchvision's wheel import beside a CPU build of torch, in the environment of the interpreter that runs this.

The wheel is built against the CUDA torch: its C++ part does not load beside a CPU build, and `import torchvision` stops with
"operator torchvision::nms does not exist". Image processors need its Python part only, so a .pth file here declares the missing
operators, without a kernel, when torchvision is first imported: in this environment's processes and their workers.
"""

import sysconfig
from pathlib import Path

_HOOK = """\
import importlib.abc
import sys


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            for op in ("nms", "qnms"):
                library.define(op + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.modules[__name__].library = library  # keeps the declaration alive
        return None


sys.meta_path.insert(0, _Finder())
"""


def main() -> None:
    packages = Path(sysconfig.get_paths()["purelib"])
    (packages / "_torchvision_ops.py").write_text(_HOOK, encoding="utf-8")
    (packages / "torchvision_ops.pth").write_text("import _torchvision_ops\n", encoding="utf-8")


if __name__ == "__main__":
    main()
