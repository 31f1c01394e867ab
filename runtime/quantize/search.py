"""How a weight is rounded, and how its input is scaled before: pure functions of weights and of what they were fed.

A linear layer y = x W^T is unchanged if input k is divided by s_k and column k of W multiplied by it; rounding is not. The
factors are searched where they can be folded into what comes before the layer:

- int4: s = mean |x|^a (AWQ: arXiv 2306.00978), so that columns that see large inputs are rounded more finely.
- int8: s = max |x|^a / max |w|^(1 - a) (SmoothQuant: arXiv 2211.10438), so that inputs and weights share the range.

a is the one of a grid that leaves the least squared error of the layers' outputs on a sample of inputs; "no factors" is among
the candidates. Then 4-bit weights are rounded column by column, each column's error made up for by those after it as far as the
inputs allow (GPTQ: arXiv 2210.17323). Scales are bfloat16 numbers, as the file will hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pagemill.kernels.linear import round_int8

GRID = 20
"""Steps of the exponent a."""
_CUTS = 12  # ranges tried for a group of int4 weights, each 4 % smaller
_CUT_STEP = 0.04
_FP8_MAX = 448.0  # of e4m3
_LEAST = 1e-4
_SAMPLE = 1024  # rows of inputs that errors are measured on
_HESSIAN_ROWS = 8192
_DAMPING = 0.01  # of the mean of the products' diagonal, as in GPTQ


@dataclass
class Inputs:
    """What a layer was fed over all calibration pages: the largest of each column, and samples of rows."""

    columns: int
    products: Tensor | None = None
    """Sum of x^T x over up to 8192 rows `[K, K]`, where it was asked for by zeros."""
    count: int = 0
    total_abs: Tensor = field(init=False)
    highest: Tensor = field(init=False)
    sample: Tensor = field(init=False)
    """Rows `[<= 1024, K]`"""

    def __post_init__(self) -> None:
        self.total_abs, self.highest = torch.zeros(2, self.columns).unbind(0)
        self.sample = torch.empty(0, self.columns)
        self._summed = 0

    def add(self, x: Tensor, share: float) -> None:
        """Count rows `x [M, K]`; `share` of what the samples hold are taken from them, evenly spread."""
        x = x.float()
        self.count += len(x)
        self.total_abs += x.abs().sum(0)
        self.highest = torch.maximum(self.highest, x.abs().amax(0))
        rows = x[_spread(len(x), min(1 + int(share * _SAMPLE), _SAMPLE - len(self.sample)))]
        self.sample = torch.cat([self.sample, rows])
        if self.products is not None:
            rows = x[_spread(len(x), min(1 + int(share * _HESSIAN_ROWS), _HESSIAN_ROWS - self._summed))]
            self._summed += len(rows)
            self.products.addmm_(rows.T, rows)

    def scale(self, s: Tensor) -> None:
        """Divide every column by its factor."""
        self.sample = self.sample / s
        if self.products is not None:
            self.products /= s
            self.products /= s[:, None]

    @property
    def mean_abs(self) -> Tensor:
        """Mean magnitude of each column `[K]`."""
        return self.total_abs / max(self.count, 1)


def _spread(count: int, wanted: int) -> Tensor:
    """Numbers of `wanted` of `count` rows, or of all."""
    if wanted >= count:
        return torch.arange(count)
    return torch.linspace(0, count - 1, max(wanted, 0)).round().long()


@dataclass(frozen=True)
class Rounded:
    """A rounded weight as it is stored: `q [N, K]` (int4: uint8 0..15), `scales [N, 1]`; int4: `scales` and `zeros [N, G]`."""

    scheme: str
    q: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    group: int = 0

    def weight(self) -> Tensor:
        """What it stands for, float32 `[N, K]`."""
        if self.zeros is None:
            return self.q.float() * self.scales.float()
        scales, zeros = (
            t.float().repeat_interleave(self.group, 1)[:, : self.q.shape[1]]
            for t in (self.scales, self.zeros)
        )
        return (self.q.float() - zeros) * scales


def _as_stored(scales: Tensor) -> Tensor:
    return scales.to(torch.bfloat16).float()


def round_int4(weight: Tensor, group: int, products: Tensor | None = None) -> Rounded:
    """Round `weight [N, K]` to 4 bits in groups of `group` columns (it divides K), asymmetric.

    Without `products` each weight to the nearest code of its group's range. With them (the sum of x^T x `[K, K]` over inputs) by
    GPTQ: the range of a group is chosen when its first column's turn comes, of weights that have made up for those before.
    """
    n, k = weight.shape
    w = weight.float().clone()
    q = torch.empty(n, k, dtype=torch.uint8)
    scales, zeros = torch.empty(2, n, k // group).unbind(0)
    inverse = None if products is None else _inverse_root(products)
    for g, first in enumerate(range(0, k, group)):
        columns = slice(first, first + group)
        block = w[:, columns]
        h = None if products is None else products.diagonal()[columns]
        scale, zero = _range(block, h)
        scales[:, g], zeros[:, g] = scale, zero
        if inverse is None:
            q[:, columns] = _codes(block, scale[:, None], zero[:, None]).to(torch.uint8)
            continue
        root = inverse[columns, columns]
        errors = torch.empty_like(block)
        for j in range(group):
            code = _codes(block[:, j], scale, zero)
            q[:, first + j] = code.to(torch.uint8)
            errors[:, j] = (block[:, j] - (code - zero) * scale) / root[j, j]
            block[:, j:] -= errors[:, j, None] * root[j, j:]
        w[:, first + group :] -= errors @ inverse[columns, first + group :]
    return Rounded("int4", q, scales, zeros.to(torch.uint8), group)


def _inverse_root(products: Tensor) -> Tensor:
    """Upper triangular U with U^T U = H^-1, H the products with something added to the diagonal so that there is one."""
    h = products.double() if len(products) <= 4096 else products.clone()  # above, float32 has to do: memory
    mean = h.diagonal().mean().clamp_min(1e-12)
    damping = _DAMPING
    while True:
        h.diagonal().add_(damping * mean)
        root, failed = torch.linalg.cholesky_ex(h)
        if not failed.item():
            inverse = torch.cholesky_inverse(root)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed.item():
                inverse_root: Tensor = upper.float()
                return inverse_root
        damping *= 10


def _range(w: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale and zero point `[N]` of groups `w [N, group]`: of some ranges, each cut a little more, the one with the least squared
    error, columns weighted by `importance [group]`."""
    h = torch.ones(w.shape[1]) if importance is None else importance / importance.mean().clamp_min(1e-30)
    low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    zero = (-low / ((high - low) / 15).clamp_min(1e-10)).round().clamp(0, 15)
    best, scales = torch.full_like(low, torch.inf), torch.ones_like(low)
    for cut in range(_CUTS):
        scale = _as_stored(((high - low) * (1 - _CUT_STEP * cut) / 15).clamp_min(1e-10))
        off = _codes(w, scale[:, None], zero[:, None]).sub_(zero[:, None]).mul_(scale[:, None]).sub_(w)
        error = off.square_().mul_(h).sum(1)
        better = error < best
        best, scales = torch.where(better, error, best), torch.where(better, scale, scales)
    return scales, zero


def _codes(w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Codes 0..15 of weights, as floats; `scale` and `zero` of the same number of dimensions."""
    return (w / scale).round_().add_(zero).clamp_(0, 15)


def round_rows(weight: Tensor, scheme: str) -> Rounded:
    """Round `weight [N, K]` to int8 or fp8 (e4m3), symmetric, a scale a row."""
    w = weight.float()
    most = 127.0 if scheme == "int8" else _FP8_MAX
    scales = _as_stored((w.abs().amax(1, keepdim=True) / most).clamp_min(1e-30))
    q = (w / scales).clamp(-most, most)
    return Rounded(
        scheme, q.round().to(torch.int8) if scheme == "int8" else q.to(torch.float8_e4m3fn), scales
    )


def round_inputs(x: Tensor, scheme: str) -> Tensor:
    """Inputs `[M, K]` as the scheme's kernels see them: in 8 bits a token for int8 and fp8, as they are for int4."""
    if scheme == "int8":
        q, scale = round_int8(x)
        return q * scale
    if scheme == "fp8":
        scale = (x.abs().amax(1, keepdim=True) / _FP8_MAX).clamp_min(1e-30)
        return (x / scale).to(torch.float8_e4m3fn).float() * scale
    return x


def relative_error(x: Tensor, weight: Tensor, rounded: Tensor, scheme: str) -> float:
    """Squared error of the outputs over their square, both on inputs `x [M, K]`; 0 where there are no outputs."""
    wanted = x @ weight.T
    norm = wanted.square().sum().item()
    return (round_inputs(x, scheme) @ rounded.T - wanted).square().sum().item() / norm if norm else 0.0


def candidates(inputs: Inputs, weights: Sequence[Tensor], scheme: str) -> Iterator[Tensor]:
    """Factors `[K]` to try, the first all ones; their geometric middle is 1."""
    yield torch.ones(inputs.columns)
    seen = inputs.mean_abs if scheme == "int4" else inputs.highest
    seen = seen.clamp_min(_LEAST * seen.max().item())
    ours = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
    ours = ours.clamp_min(_LEAST * ours.max().item())
    for step in range(1, GRID):
        a = step / GRID
        s = seen**a if scheme == "int4" else seen**a / ours ** (1 - a)
        yield (s / (s.max() * s.min()).sqrt()).clamp(_LEAST, 1 / _LEAST)


def search(
    inputs: Inputs,
    weights: Sequence[Tensor],
    scheme: str,
    group: int,
    exact: Callable[[Tensor], Tensor] = lambda s: s,
) -> tuple[Tensor, float, float]:
    """Return the best factors `[K]` for layers of one input, and the relative squared error with them and without any.

    `exact` gives the factors that can be had: what is folded into a bfloat16 vector is rounded there.
    """
    x = inputs.sample
    wanted = [x @ w.T for w in weights]
    norm = sum(y.square().sum().item() for y in wanted)
    best, least, without = torch.ones(inputs.columns), torch.inf, 0.0
    for i, s in enumerate(candidates(inputs, weights, scheme)):
        s = exact(s)
        fed = round_inputs(x / s, scheme)
        error = 0.0
        for w, y in zip(weights, wanted, strict=True):
            scaled = w * s
            if scheme == "int4":
                rounded = round_int4_plainly(scaled, group)
            else:
                rounded = round_rows(scaled, scheme).weight()
            error += (fed @ rounded.T - y).square().sum().item()
        if not i:
            without = error
        if error < least:
            best, least = s, error
    return best, least / max(norm, 1e-30), without / max(norm, 1e-30)


def round_int4_plainly(weight: Tensor, group: int) -> Tensor:
    """What round-to-nearest makes of `weight [N, K]` by the whole range of every group: what the search compares by."""
    w = weight.view(len(weight), -1, group)
    low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 15).clamp_min(1e-10)
    zero = (-low / scale).round()
    return ((w / scale).round_().add_(zero).clamp_(0, 15).sub_(zero)).mul_(scale).view_as(weight)
