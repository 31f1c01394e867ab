"""Argument checks shared by every op: one sentence with the argument, what it must be and what it is."""

from torch import Tensor
from torch import dtype as DType

__all__ = ["expect", "expect_tensor"]


def expect(holds: bool, argument: str, wanted: str, found: object) -> None:
    """Raise ValueError naming `argument`, what was `wanted` and what was `found`, unless `holds`."""
    if not holds:
        raise ValueError(f"{argument}: expected {wanted}, found {found}")


def expect_tensor(
    argument: str, tensor: Tensor, dtype: DType | tuple[DType, ...], shape: tuple[int | None, ...]
) -> None:
    """Raise ValueError unless `tensor` has `dtype` (one of), `shape` (None: any size) and dense rows.

    Rows are dense when the last dimension has stride 1; the other strides are free.
    """
    allowed = dtype if isinstance(dtype, tuple) else (dtype,)
    sizes = tensor.shape
    if (
        tensor.dtype in allowed
        and len(sizes) == len(shape)
        and all(want is None or want == size for want, size in zip(shape, sizes, strict=True))
        and (not shape or sizes[-1] <= 1 or tensor.stride(-1) == 1)
    ):
        return
    wanted = "|".join(str(item).removeprefix("torch.") for item in allowed)
    dims = ", ".join("*" if size is None else str(size) for size in shape)
    found = f"{str(tensor.dtype).removeprefix('torch.')} {list(sizes)} with strides {list(tensor.stride())}"
    raise ValueError(f"{argument}: expected {wanted} [{dims}] with dense rows, found {found}")
