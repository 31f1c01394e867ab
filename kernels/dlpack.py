"""How tensors reach C++: as DLPack capsules, without a copy."""

from torch.utils import dlpack as _dlpack

__all__ = ["dl"]

dl = _dlpack.to_dlpack
