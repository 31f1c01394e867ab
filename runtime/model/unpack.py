"""A stored weight to a packed one: each format's integers into one form, that into the kernels' layout, a module at a time.

Where the kernels have no layout for it (8-bit groups, 8-bit with zero points, groups of no multiple of 32, parts of a stack that
are stored differently; fp8 in blocks, and all fp8 where the device has no arithmetic for it) a weight becomes the compute dtype:
exact but for that rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pagemill.errors import CheckpointError
from pagemill.kernels import Kernels, PackedLinear, Scheme
from pagemill.kernels.linear import check_wide
from pagemill.model.packed import PackedWeights
from pagemill.model.quantized import Stored
from pagemill.model.weights import Checkpoint

_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # where the eight columns of a word lie among its nibbles
_PIECE = 1 << 22  # numbers converted at a time
_MOST_K = 1 << 16  # inputs of an int8 layer


@dataclass
class Integers:
    """A weight `(q - zeros) * scales`, unsigned: uint8 `q [N, K]`, float32 `scales [N, G]`, uint8 `zeros [N, G]`."""

    name: str
    q: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group: int
    index: Tensor | None = None
    """int64 `[K]`, each column's group; None: groups of `group` columns in order."""

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight `[N, K]`, computed in float32, rounded to `dtype`."""
        n, k = self.q.shape
        index = torch.arange(k) // self.group if self.index is None else self.index
        out = torch.empty(n, k, dtype=dtype)
        step = max(1, _PIECE // max(1, k))
        for first in range(0, n, step):
            rows = slice(first, first + step)
            zeros, scales = self.zeros[rows].float()[:, index], self.scales[rows][:, index]
            out[rows] = (self.q[rows].float() - zeros) * scales
        return out

    def int8(self) -> tuple[Tensor, Tensor] | None:
        """int8 `[N, K]` and scales `[N]`, where that says the same: one symmetric scale a row."""
        if self.bits != 8 or self.scales.shape[1] != 1 or self.q.shape[1] > _MOST_K:
            return None
        if not bool((self.zeros == 128).all()):
            return None
        return (self.q ^ 128).view(torch.int8), self.scales[:, 0].contiguous()

    def int4(self) -> tuple[Integers, Tensor | None] | None:
        """The same in groups that the kernels have, and the order that its columns were sorted in."""
        if self.bits != 4:
            return None
        k, order, q = self.q.shape[1], None, self.q
        if self.index is not None and self.scales.shape[1] > 1:
            sizes = torch.bincount(self.index, minlength=self.scales.shape[1])
            wanted = torch.full_like(sizes, self.group)
            wanted[-1] = k - self.group * (len(sizes) - 1)
            if not torch.equal(sizes, wanted):
                return None
            order = torch.argsort(self.index, stable=True)
            if torch.equal(order, torch.arange(k)):
                order = None
            else:
                q = q[:, order]
        whole = self.scales.shape[1] == 1
        group = 128 if whole else next((g for g in (128, 64, 32) if self.group % g == 0), 0)
        if group == 0:
            return None
        groups = torch.arange(-(-k // group))
        of = torch.zeros_like(groups) if whole else groups * group // self.group
        return replace(
            self, q=q, scales=self.scales[:, of], zeros=self.zeros[:, of], group=group, index=None
        ), order


@dataclass
class Float8:
    """A weight `q * scales`: float8_e4m3fn `q [N, K]`, float32 `scales [N / rows, K / columns]`, rounded up."""

    q: Tensor
    scales: Tensor
    rows: int
    columns: int

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight `[N, K]`, computed in float32, rounded to `dtype`."""
        n, k = self.q.shape
        out = torch.empty(n, k, dtype=dtype)
        across, step = torch.arange(k) // self.columns, max(1, _PIECE // k)
        for first in range(0, n, step):
            down = torch.arange(first, min(first + step, n)) // self.rows
            scale = self.scales[down] if self.scales.shape[1] == 1 else self.scales[down][:, across]
            out[first : first + step] = self.q[first : first + step].float() * scale
        return out

    def of_rows(self) -> Tensor | None:
        """A scale for each row, `[N]`, where that says the same."""
        if self.scales.shape[1] != 1:
            return None
        return self.scales[torch.arange(len(self.q)) // self.rows, 0].contiguous()


# Words


def nibbles(words: Tensor) -> Tensor:
    """int32 `[..., W]` to its nibbles, the lowest first: uint8 `[..., W, 8]`."""
    data = words.contiguous().unsqueeze(-1).view(torch.uint8)
    return torch.stack([data & 15, data >> 4], -1).flatten(-2)


def fields(words: Tensor, bits: int) -> Tensor:
    """int32 `[..., W]` to integers of 4 or 8 bits, the lowest first: uint8 `[..., W, 32 / bits]`."""
    return nibbles(words) if bits == 4 else words.contiguous().unsqueeze(-1).view(torch.uint8)


def awq_nibbles(words: Tensor) -> Tensor:
    """int32 `[R, W]` of AutoAWQ's `gemm` to uint8 `[R, 8 W]`, its columns in order."""
    return nibbles(words)[..., _AWQ_ORDER].flatten(1)


# Formats


def read_weight(checkpoint: Checkpoint, module: str) -> Integers | Float8 | Tensor:
    """Return a module's weight: integers and fp8 as they are stored, else a tensor `[N, ...]`.

    Raises CheckpointError for values that cannot be.
    """
    stored = checkpoint.stored.get(module)
    if stored is None:
        return checkpoint.read(f"{module}.weight")
    name = checkpoint.name_of(module)
    n, k = checkpoint.shapes[f"{module}.weight"]
    if stored.layout in ("awq", "gptq"):
        return _words(checkpoint, stored, module, name, n, k)
    scales = checkpoint.read(
        f"{module}.weight_scale_inv"
        if checkpoint.has(f"{module}.weight_scale_inv")
        else f"{module}.weight_scale"
    )
    down, across = stored.grid(n, k)
    scales = _finite(name, scales).view(down, across)
    rows, columns = stored.rows or n, stored.columns or k
    if stored.layout == "fp8":
        return Float8(checkpoint.read(f"{module}.weight"), scales, rows, columns)
    half = 1 << (stored.bits - 1)
    index = None
    if stored.layout == "packed":
        if checkpoint.has(f"{module}.weight_shape"):
            shape = checkpoint.read(f"{module}.weight_shape").tolist()
            if shape != [n, k]:
                raise CheckpointError(f"{name}.weight_shape says {shape}, config.json implies {[n, k]}")
        q = fields(checkpoint.read(f"{module}.weight_packed"), stored.bits).flatten(1)[:, :k]
        if checkpoint.has(f"{module}.weight_g_idx"):
            index = _index(f"{name}.weight_g_idx", checkpoint.read(f"{module}.weight_g_idx"), across)
    else:
        q = _unsigned(f"{name}.weight", checkpoint.read(f"{module}.weight"), half)
    zeros = torch.full((down, across), half, dtype=torch.uint8)
    if checkpoint.has(f"{module}.weight_zero_point"):
        stored_zeros = checkpoint.read(f"{module}.weight_zero_point")
        if stored_zeros.dtype == torch.int32:
            zeros = fields(stored_zeros.T, stored.bits).flatten(1)[:, :down].T
        else:
            zeros = _unsigned(f"{name}.weight_zero_point", stored_zeros, half).view(down, across)
    of = torch.arange(n) // rows
    return Integers(name, q, scales[of], zeros[of], stored.bits, columns, index)


def _words(checkpoint: Checkpoint, stored: Stored, module: str, name: str, n: int, k: int) -> Integers:
    """AutoAWQ's and GPTQ's tensors, which lie `[K, N]`."""
    words, zero_words = (checkpoint.read(f"{module}.{suffix}") for suffix in ("qweight", "qzeros"))
    scales = _finite(name, checkpoint.read(f"{module}.scales")).T.contiguous()
    index = None
    if stored.layout == "awq":
        q, zeros = awq_nibbles(words).T.contiguous(), awq_nibbles(zero_words).T.contiguous()
    else:
        q = fields(words, stored.bits).permute(1, 0, 2).reshape(n, k)
        if (
            stored.zero_offset
        ):  # added to whole words, as GPTQModel converts them: a borrow of its subtraction comes back
            ones = sum(1 << shift for shift in range(0, 32, stored.bits))
            zero_words = (zero_words.long() + ones).to(torch.int32)
        zeros = fields(zero_words, stored.bits).flatten(1).T.contiguous()
        if checkpoint.has(f"{module}.g_idx"):
            index = _index(f"{name}.g_idx", checkpoint.read(f"{module}.g_idx"), scales.shape[1])
    return Integers(name, q, scales, zeros, stored.bits, stored.columns or k, index)


def _unsigned(name: str, values: Tensor, half: int) -> Tensor:
    """int8 of -half..half - 1 to uint8, plus half."""
    if values.numel() and (int(values.min()) < -half or int(values.max()) >= half):
        raise CheckpointError(f"{name} holds integers outside {-half}..{half - 1}")
    return (values.view(torch.uint8) ^ 128) - (128 - half)


def _finite(name: str, scales: Tensor) -> Tensor:
    scales = scales.float()
    if not bool(scales.isfinite().all()):
        raise CheckpointError(f"{name} has scales that are not finite numbers; download the checkpoint again")
    return scales


def _index(name: str, index: Tensor, groups: int) -> Tensor | None:
    """Group numbers of columns, checked. None: they are not set, as compressed-tensors says with -1."""
    if bool((index == -1).all()):
        return None
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= groups:
        raise CheckpointError(f"{name} names groups {low}..{high}, and there are 0..{groups - 1}")
    return index.long()


# Packing


def packed_linear(
    weights: PackedWeights,
    modules: Sequence[str],
    bias: bool,
    kernels: Kernels,
    device: torch.device,
    dtype: torch.dtype,
    scheme: Scheme,
    *,
    gated: bool = False,
) -> PackedLinear:
    """Pack the weights of `modules` (canonical names), stacked by rows, or with `gated` those of a gate and an up projection.

    `scheme` is for what is stored plain or in fp8. Of parts that are stored differently all become the compute dtype.
    """
    checkpoint, name = weights.checkpoint, "+".join(modules)
    packed = weights.packed(
        name, lambda: _pack(checkpoint, modules, bias, kernels, device, dtype, scheme, gated)
    )
    if packed.scheme != "int4" or not checkpoint.has_wide(modules):
        return packed
    wide = weights.packed(
        f"{name} wide", lambda: _pack_wide(checkpoint, modules, bias, kernels, device, gated)
    )
    try:
        check_wide(packed, wide)
    except ValueError as error:
        raise CheckpointError(f"{name}: its wide form does not fit: {error}") from None
    return replace(packed, wide=wide)


def _bias(checkpoint: Checkpoint, modules: Sequence[str], wanted: bool) -> Tensor | None:
    if wanted:
        return torch.cat([checkpoint.read(f"{module}.bias") for module in modules])
    # GPTQ exporters give every layer a bias, mostly of zeros.
    found = [
        checkpoint.read(f"{module}.bias").float()
        if checkpoint.has(f"{module}.bias")
        else torch.zeros(checkpoint.shapes[f"{module}.weight"][0])
        for module in modules
    ]
    bias = torch.cat(found)
    return bias if bool(bias.count_nonzero()) else None


def _pack(
    checkpoint: Checkpoint,
    modules: Sequence[str],
    has_bias: bool,
    kernels: Kernels,
    device: torch.device,
    dtype: torch.dtype,
    scheme: Scheme,
    gated: bool,
) -> PackedLinear:
    parts = [read_weight(checkpoint, module) for module in modules]
    bias = _bias(checkpoint, modules, has_bias)
    bias = None if bias is None else bias.to(device)
    integers = [part for part in parts if isinstance(part, Integers)]
    if len(integers) == len(parts):
        if all(rows := [part.int8() for part in integers]):
            q, scales = (torch.cat(each) for each in zip(*filter(None, rows), strict=True))
            return kernels.pack_quantized(q.to(device), scales.to(device), None, bias, gated=gated)
        grouped = [found for part in integers if (found := part.int4()) is not None]
        if len(grouped) == len(parts) and all(_alike(grouped[0], other) for other in grouped[1:]):
            q, scales, zeros = (
                torch.cat([getattr(part, field) for part, _ in grouped]).contiguous().to(device)
                for field in ("q", "scales", "zeros")
            )
            order = grouped[0][1]
            return kernels.pack_quantized(
                q, scales, zeros, bias, group=grouped[0][0].group, gated=gated,
                order=None if order is None else order.to(device),
            )  # fmt: skip
    floats = [part for part in parts if isinstance(part, Float8)]
    if kernels.fp8_weights and scheme == "plain" and len(floats) == len(parts):
        of_rows = [each for part in floats if (each := part.of_rows()) is not None]
        if len(of_rows) == len(parts):
            q = torch.cat([part.q.view(torch.uint8) for part in floats]).view(torch.float8_e4m3fn)
            scales = torch.cat(of_rows)
            return kernels.pack_quantized(q.to(device), scales.to(device), None, bias, gated=gated)
    plain = [
        (part.flatten(1) if isinstance(part, Tensor) else part.dequantized(dtype)).to(device)
        for part in parts
    ]
    if integers:
        scheme = "plain"
    if gated:
        return kernels.pack_swiglu(plain[0], plain[1], bias, scheme=scheme)
    return kernels.pack_linear(plain, bias, scheme=scheme)


def _alike(one: tuple[Integers, Tensor | None], other: tuple[Integers, Tensor | None]) -> bool:
    (a, a_order), (b, b_order) = one, other
    if a_order is None or b_order is None:
        return a.group == b.group and a_order is b_order
    return a.group == b.group and torch.equal(a_order, b_order)


def _pack_wide(
    checkpoint: Checkpoint,
    modules: Sequence[str],
    has_bias: bool,
    kernels: Kernels,
    device: torch.device,
    gated: bool,
) -> PackedLinear:
    q = torch.cat([checkpoint.read(f"wide.{module}.weight") for module in modules])
    scales = torch.cat(
        [_finite(f"{module} (wide)", checkpoint.read(f"wide.{module}.weight_scale")) for module in modules]
    )
    bias = _bias(checkpoint, modules, has_bias)
    return kernels.pack_quantized(
        q.to(device),
        scales[:, 0].contiguous().to(device),
        None,
        None if bias is None else bias.to(device),
        gated=gated,
    )


def what_is_stored(checkpoint: Checkpoint) -> str:
    """Return the method and what each part of the model is stored as, e.g. "awq: text int4 g128, vision plain"."""
    if checkpoint.quantization is None:
        return "plain"
    parts: dict[str, dict[str, int]] = {}
    for name, shape in checkpoint.shapes.items():
        module, _, kind = name.rpartition(".")
        if kind != "weight" or len(shape) != 2:
            continue
        part = "vocabulary" if "embed" in name or module == "lm_head" else module.partition(".")[0]
        stored = checkpoint.stored.get(module)
        forms = parts.setdefault(part, {})
        form = "plain" if stored is None else str(stored)
        forms[form] = forms.get(form, 0) + 1
    line = ", ".join(f"{part} {' and '.join(sorted(forms))}" for part, forms in parts.items())
    if checkpoint.has_any_wide:
        line += ", text also int8 for many rows"
    if checkpoint.unused:
        line += f"; not used: {', '.join(checkpoint.unused)}"
    return f"{checkpoint.quantization.method}: {line}"


def what_runs(linears: Sequence[PackedLinear]) -> str:
    """The forms that layers were packed into, e.g. "int4 g128 and bfloat16"."""
    forms = {
        packed.compute
        if packed.scheme == "plain"
        else packed.scheme + (f" g{packed.group}" if packed.group else "")
        for packed in linears
    }
    return " and ".join(sorted(forms))
