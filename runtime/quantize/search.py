"""How a weight is rounded, and how its input is scaled before: pure functions of weights and of what they were fed.

A linear layer y = x W^T is unchanged if input k is divided by s_k and column k of W multiplied by it; rounding is not. The factors
are searched where they can be folded into what comes before the layer:

- int4: s = mean |x|^a (AWQ: arXiv 2306.00978), so that columns that see large inputs are rounded more finely.
- int8: s = max |x|^a / max |w|^(1 - a) (SmoothQuant: arXiv 2211.10438), so that inputs and weights share the range.

a is the one of a grid that leaves the least squared error of the layers' outputs on a sample of inputs, under the very rounding that
will be used; "no factors" is among the candidates. Scales are bfloat16 numbers, as the file will hold them.
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


@dataclass
class Inputs:
    """What a layer was fed over all calibration pages: a sum over rows a column, and a sample of rows."""

    columns: int
    count: int = 0
    total_abs: Tensor = field(init=False)
    total_square: Tensor = field(init=False)
    highest: Tensor = field(init=False)
    sample: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.total_abs, self.total_square, self.highest = torch.zeros(3, self.columns).unbind(0)
        self.sample = torch.empty(0, self.columns)

    def add(self, x: Tensor, keep: int) -> None:
        """Count rows `x [M, K]`, and keep some `keep` of them, evenly spread, as far as the sample has room."""
        x = x.float()
        self.count += len(x)
        self.total_abs += x.abs().sum(0)
        self.total_square += x.square().sum(0)
        self.highest = torch.maximum(self.highest, x.abs().amax(0))
        room = min(keep, _SAMPLE - len(self.sample), len(x))
        if room > 0:
            rows = torch.linspace(0, len(x) - 1, room).round().long()
            self.sample = torch.cat([self.sample, x[rows]])

    @property
    def mean_abs(self) -> Tensor:
        """Mean magnitude of each column `[K]`."""
        return self.total_abs / max(self.count, 1)

    @property
    def mean_square(self) -> Tensor:
        """Mean square of each column `[K]`."""
        return self.total_square / max(self.count, 1)


@dataclass(frozen=True)
class Rounded:
    """A rounded weight as it is stored. int4: `q` uint8 0..15 `[N, K]`, `scales` and `zeros` `[N, G]`; int8 and fp8: `scales [N, 1]`."""

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
            t.float().repeat_interleave(self.group, 1)[:, : self.q.shape[1]] for t in (self.scales, self.zeros)
        )
        return (self.q.float() - zeros) * scales


def _as_stored(scales: Tensor) -> Tensor:
    return scales.to(torch.bfloat16).float()


def round_int4(weight: Tensor, group: int, importance: Tensor | None = None) -> Rounded:
    """Round `weight [N, K]` to 4 bits in groups of `group` columns (it divides K), asymmetric.

    Of some ranges, each cut a little more, every group takes the one with the least squared error, columns weighted by
    `importance [K]` (the mean square of their inputs; None: all alike).
    """
    n, k = weight.shape
    w = weight.float().view(n, k // group, group)
    h = torch.ones(k) if importance is None else importance.float() / importance.mean().clamp_min(1e-30)
    h = h.view(1, k // group, group)
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    best = torch.full_like(low, torch.inf)
    scales, zeros = torch.ones_like(low), torch.zeros_like(low)
    for cut in range(_CUTS):
        scale = _as_stored((high - low) * (1 - _CUT_STEP * cut) / 15).clamp_min(1e-10)
        zero = (-low / ((high - low) / 15).clamp_min(1e-10)).round().clamp(0, 15)
        off = _codes(w, scale, zero).sub_(zero[..., None]).mul_(scale[..., None]).sub_(w)
        error = off.square_().mul_(h).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    q = _codes(w, scales, zeros).to(torch.uint8).view(n, k)
    return Rounded("int4", q, scales, zeros.to(torch.uint8), group)


def _codes(w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (w / scale[..., None]).round_().add_(zero[..., None]).clamp_(0, 15)


def round_rows(weight: Tensor, scheme: str) -> Rounded:
    """Round `weight [N, K]` to int8 or fp8 (e4m3), symmetric, a scale a row."""
    w = weight.float()
    most = 127.0 if scheme == "int8" else _FP8_MAX
    scales = _as_stored(w.abs().amax(1, keepdim=True) / most).clamp_min(1e-30)
    q = (w / scales).clamp(-most, most)
    return Rounded(scheme, q.round().to(torch.int8) if scheme == "int8" else q.to(torch.float8_e4m3fn), scales)


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
    """The weight that round-to-nearest makes of `weight [N, K]`, by the whole range of every group: what the search compares by."""
    w = weight.view(len(weight), -1, group)
    low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 15).clamp_min(1e-10)
    zero = (-low / scale).round()
    return ((w / scale).round_().add_(zero).clamp_(0, 15).sub_(zero)).mul_(scale).view_as(weight)
