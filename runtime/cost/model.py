"""The cost model: seconds and dollars a page, by stage, from shape, page statistics, precision and device.

A roofline (Williams et al., CACM 2009), one roof for each group of kernels, since they run one after another: a step's matrix
products take the longer of their arithmetic and of reading the weights, attention the longer of its arithmetic and of reading
keys and values. `StepCost` is the time of one step. The closed form (`predict`) sums it over a page's share of the steps of a
full batch, or over those of a run whose batch fills, is full and empties; the simulator calls it step by step. What a device
really reaches of its limits stands in `Efficiency`, with its origin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from pagemill.cost.devices import HOURS_A_MONTH, Device, Throughput, find_device, reference
from pagemill.errors import ConfigError
from pagemill.model.config import ModelConfig, TextConfig, VisionConfig, read_config
from pagemill.model.loader import find_checkpoint

_RESERVED = 0.08  # of device memory: what the allocator, the runtime and fragments take
_TEXT = dict(max_position_embeddings=128000, rms_norm_eps=1e-6, rope_theta=1e6, mrope_section=(16, 24, 24))
_VISION = VisionConfig(
    depth=32,
    hidden_size=1280,
    intermediate_size=3420,
    num_heads=16,
    in_channels=3,
    patch_size=14,
    spatial_merge_size=2,
    temporal_patch_size=2,
    window_size=112,
    full_attention_blocks=frozenset([7, 15, 23, 31]),
    out_hidden_size=2048,
    rope_theta=10000.0,
)


def _shape(tied: bool, **text: int) -> ModelConfig:
    config = TextConfig(**text, **_TEXT, tie_word_embeddings=tied)  # type: ignore[arg-type]
    vision = replace(_VISION, out_hidden_size=config.hidden_size)
    return ModelConfig(config, vision, 151655, frozenset({151643, 151645}), "bfloat16")


SHAPES = {
    "3b": _shape(
        True, hidden_size=2048, intermediate_size=11008, num_layers=36, num_heads=16, num_kv_heads=2, vocab_size=151936
    ),
    "7b": _shape(
        False, hidden_size=3584, intermediate_size=18944, num_layers=28, num_heads=28, num_kv_heads=4, vocab_size=152064
    ),
}  # fmt: skip
"""Qwen2.5-VL-3B (DharmaOCR Lite, Nanonets-OCR2) and 7B (DharmaOCR Full, olmOCR-2)."""


def find_shape(name: str) -> ModelConfig:
    """Return the shape called `3b` or `7b`, of pagemill-tiny, or of a folder with a `config.json`.

    Raises `ConfigError` for another name, `CheckpointError` for a folder that is no checkpoint.
    """
    if name in SHAPES:
        return SHAPES[name]
    if name == "pagemill-tiny":
        return read_config(find_checkpoint(name))
    if (Path(name) / "config.json").exists():
        return read_config(Path(name))
    raise ConfigError(
        f"unknown model shape {name!r}; give {', '.join(SHAPES)}, pagemill-tiny, or a folder with a config.json"
    )


@dataclass(frozen=True)
class Precision:
    """How numbers are stored and multiplied."""

    name: str
    weight_bytes: float
    """Bytes of one weight of the decoder's layers, scales included."""
    arithmetic: str
    """Which peak rate the decoder's layers run at."""
    vision_bytes: float = 2
    """Bytes of one weight of the vision tower, the embedding and the output layer."""
    vision_arithmetic: str = "bfloat16"
    attention: str = "bfloat16"
    """Which peak rate attention runs at: it is not quantised."""
    activation_bytes: float = 2
    """Bytes of one number between the matrix products."""
    kv_bytes: float = 2
    """Bytes of one element of the KV cache, scales included."""
    kv_dtype: str = "auto"
    """One of `KV_DTYPES`."""


PRECISIONS = {
    p.name: p
    for p in (
        Precision("float32", 4, "float32", 4, "float32", "float32", 4, 4),
        Precision("bfloat16", 2, "bfloat16"),
        # What `EngineConfig.quantize` makes: int8 everywhere; or 4 bits in the decoder, with a scale of 32 and a zero of 8 for
        # every 128 weights, multiplied in int8, and int8 in the tower and the output layer. A scale a row counts for nothing.
        Precision("int8", 1, "int8", 1, "int8"),
        Precision("int4", 0.5 + 5 / 128, "int8", 1, "int8"),
        # What published checkpoints mostly are: the decoder alone is quantised.
        Precision("fp8", 1, "fp8"),
        Precision("w8a8", 1, "int8"),
        Precision("w4a16", 0.5 + 2.5 / 128, "bfloat16"),
    )
}
_KV_BYTES = dict.fromkeys(("int8", "fp8"), 1 + 4 / 128)  # a scale of 32 bits for each head of a token
KV_DTYPES = ("auto", *_KV_BYTES)
"""Of the KV cache, as `EngineConfig.kv_cache_dtype`; auto is as the activations."""


def find_precision(name: str, kv_cache_dtype: str = "auto") -> Precision:
    """Return a precision by its name, with another KV cache if asked for. Raises `ConfigError`, naming those there are."""
    if name not in PRECISIONS:
        raise ConfigError(f"unknown precision {name!r}; known are {', '.join(PRECISIONS)}")
    if kv_cache_dtype not in KV_DTYPES:
        raise ConfigError(f"unknown kv_cache_dtype {kv_cache_dtype!r}; known are {', '.join(KV_DTYPES)}")
    found = PRECISIONS[name]
    if kv_cache_dtype == "auto":
        return found
    name, kv_bytes = f"{name}, KV {kv_cache_dtype}", _KV_BYTES[kv_cache_dtype]
    return replace(found, name=name, kv_bytes=kv_bytes, kv_dtype=kv_cache_dtype)


@dataclass(frozen=True)
class PageStats:
    """What pages are like. Lengths scatter log-normally around their means; sigma is the deviation of the logarithm."""

    image_tokens: float = 1518
    """924 x 1288 pixels, an A4 page as olmOCR-2 and DharmaOCR see it."""
    output_tokens: float = 700
    text_tokens: int = 40
    """Prompt tokens beside the image's."""
    output_sigma: float = 0.4
    """Scatter of output tokens at a given number of image tokens."""
    image_sigma: float = 0.0

    def __post_init__(self) -> None:
        lows = dict(image_tokens=1, output_tokens=1, text_tokens=1, output_sigma=0, image_sigma=0)
        for name, low in lows.items():
            value = getattr(self, name)
            if not (isinstance(value, int | float) and low <= value < 1e6):
                raise ConfigError(f"{name} of a page should be at least {low}, got {value!r}")

    @property
    def prompt_tokens(self) -> float:
        """All tokens before the output."""
        return self.image_tokens + self.text_tokens

    @property
    def output_square(self) -> float:
        """Mean of the squared output length."""
        return self.output_tokens**2 * math.exp(self.output_sigma**2 + self.image_sigma**2)


@dataclass(frozen=True)
class Efficiency:
    """What a device reaches of its limits, and what a step costs besides. `origin` says where the numbers are from."""

    matmul: float
    """Share of peak arithmetic in the decoder's matrix products."""
    vision: float
    """Share of peak arithmetic in the vision tower's matrix products."""
    attention: float
    """Share of peak arithmetic in attention."""
    bandwidth: float
    """Share of peak bandwidth, reading weights and the KV cache."""
    half_rows: float = 0.0
    """Rows at which a matrix product reaches half of that share."""
    activation_s: float = 0.0
    """Seconds for each byte that norms, rotary embedding, gates and sums read or write; 0 counts them among matrix products."""
    step_s: float = 0.0
    """Seconds a step: launches, scheduling, what happens whatever the batch."""
    row_s: float = 0.0
    """Seconds for each new token's choice: masks, sampling, loop guard."""
    image_s: float = 0.0
    """Seconds for each image besides its arithmetic."""
    prepare_s: float = 0.0
    """Seconds of one core to decode and patch a page."""
    origin: str = "stated"

    def __post_init__(self) -> None:
        for name in ("matmul", "vision", "attention", "bandwidth"):
            if not 0 < getattr(self, name) <= 1.5:
                raise ConfigError(
                    f"the {name} efficiency should be a share above 0, got {getattr(self, name)!r}"
                )
        for name in ("half_rows", "activation_s", "step_s", "row_s", "image_s", "prepare_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(
                    f"the {name} of an efficiency should be at least 0, got {getattr(self, name)!r}"
                )


GPU_EFFICIENCY = Efficiency(
    matmul=0.6,
    vision=0.45,
    attention=0.35,
    bandwidth=0.75,
    step_s=2e-3,
    row_s=4e-6,
    image_s=1e-3,
    prepare_s=0.03,
    origin="assumed for a well-tuned engine, not measured: dense matrix products at 60 % of peak, the tower's at 45 %, "
    "attention at 35 %, 75 % of the bandwidth, 2 ms a step on the host, 4 us a row, 30 ms of a core to prepare a page",
)
LIMIT = Efficiency(1, 1, 1, 1, origin="the hardware's limits: nothing lost anywhere")


@dataclass(frozen=True)
class Work:
    """Operations of one page (two a multiply-add), by stage."""

    vision: float
    prefill: float
    decode: float
    decode_attention: float
    """Over the cache, on top of `decode`."""

    @property
    def total(self) -> float:
        """Without the attention of decoding, as the table of the published shapes counts."""
        return self.vision + self.prefill + self.decode


class Shape:
    """Sizes that follow from a model's configuration: parameters, operations, bytes."""

    def __init__(self, config: ModelConfig) -> None:
        text, vision = config.text, config.vision
        self.config = config
        kv_width = text.num_kv_heads * text.head_dim
        self.layer_params = text.num_layers * (
            2 * text.hidden_size**2 + 2 * text.hidden_size * kv_width + 3 * text.hidden_size * text.intermediate_size
        )  # fmt: skip
        self.head_params = text.vocab_size * text.hidden_size
        self.embedding_params = 0 if text.tie_word_embeddings else self.head_params
        """Beside the output layer's; looked up, not multiplied."""
        block = 4 * vision.hidden_size**2 + 3 * vision.hidden_size * vision.intermediate_size
        self.unit = vision.spatial_merge_size**2
        """Patches an image token."""
        merged = vision.hidden_size * self.unit
        self.vision_params = vision.depth * block + vision.hidden_size * vision.patch_dim
        self.merger_params = merged**2 + merged * vision.out_hidden_size
        self.kv_elements = 2 * text.num_layers * kv_width
        """Numbers in the KV cache a token."""
        self.attention_flops = 4 * text.num_layers * text.hidden_size
        """Operations for one query and one key, all heads and layers."""
        self.activations = text.num_layers * (
            10 * text.hidden_size + 4 * kv_width + 3 * text.intermediate_size
        )
        """Numbers that norms, rotary embedding, gates and sums read or write for one token of the decoder."""
        self.vision_activations = vision.depth * (12 * vision.hidden_size + 3 * vision.intermediate_size)
        """Likewise for one patch of the tower."""

    @property
    def params(self) -> int:
        """All matrix parameters (norms and biases are some millionths)."""
        return (
            self.layer_params
            + self.head_params
            + self.embedding_params
            + self.vision_params
            + self.merger_params
        )

    def vision_flops(self, image_tokens: float) -> float:
        """Matrix products of the tower for one image."""
        return 2 * image_tokens * (self.unit * self.vision_params + self.merger_params)

    def vision_attention_flops(self, image_tokens: float) -> float:
        """Attention of the tower for one image: most blocks in windows, a few over the whole page."""
        vision, patches = self.config.vision, self.unit * image_tokens
        whole = len(vision.full_attention_blocks)
        window = min(self.unit * vision.window_cells**2, patches)
        pairs = patches * (whole * patches + (vision.depth - whole) * window)
        return 4 * vision.hidden_size * pairs

    def chunk_attention_flops(self, start: float, count: float) -> float:
        """Causal attention of `count` tokens after `start` others, the diagonal counted half, as the kernels' tiles do."""
        return self.attention_flops * count * (start + count / 2)

    def work(self, image_tokens: float, output_tokens: float, text_tokens: float = 0) -> Work:
        """Operations of one page, every output token through all weights."""
        prompt = image_tokens + text_tokens
        return Work(
            vision=self.vision_flops(image_tokens) + self.vision_attention_flops(image_tokens),
            prefill=2 * self.layer_params * prompt + self.chunk_attention_flops(0, prompt),
            decode=2 * (self.layer_params + self.head_params) * output_tokens,
            decode_attention=self.attention_flops * output_tokens * (prompt + output_tokens / 2),
        )

    def weight_bytes(self, precision: Precision) -> float:
        """Bytes of all weights as they lie in memory."""
        others = self.params - self.layer_params
        return precision.weight_bytes * self.layer_params + precision.vision_bytes * others

    def kv_bytes(self, precision: Precision) -> float:
        """Bytes of the KV cache a token."""
        return precision.kv_bytes * self.kv_elements


class StepCost:
    """Seconds of the parts of one step. While a batch only decodes, a step is linear in its total context."""

    def __init__(
        self, shape: Shape, precision: Precision, device: Device, efficiency: Efficiency = GPU_EFFICIENCY
    ) -> None:
        e = self.efficiency = efficiency
        self.shape, self.precision, self.device = shape, precision, device
        bandwidth = device.bandwidth * e.bandwidth
        if precision.kv_dtype == "fp8":
            device.rate("fp8")  # raises: a device without the arithmetic has no conversions either
        vision_rate = device.rate(precision.vision_arithmetic)
        self._layer_s = 2 * shape.layer_params / (device.rate(precision.arithmetic) * e.matmul)
        self._layer_read_s = precision.weight_bytes * shape.layer_params / bandwidth
        self._head_s = 2 * shape.head_params / (vision_rate * e.matmul)
        self._head_read_s = precision.vision_bytes * shape.head_params / bandwidth
        self._activation_s = precision.activation_bytes * e.activation_s
        self._vision_rate = vision_rate * e.vision
        self._vision_read_s = precision.vision_bytes * (shape.vision_params + shape.merger_params) / bandwidth
        attention_rate = device.attention.get(precision.attention) or device.rate(precision.attention)
        self._attention_rate = attention_rate * e.attention
        self._kv_read_s = shape.kv_bytes(precision) / bandwidth
        self.context_s = max(shape.attention_flops / self._attention_rate, self._kv_read_s)
        """Seconds for each token of context that a decoding row attends to."""

    def matmul_s(self, rows: float, wanting: float) -> float:
        """Matrix products of the decoder and what lies between them.

        `rows` tokens go through its layers, `wanting` of them through the output layer.
        """
        half = self.efficiency.half_rows
        seconds = rows * self.shape.activations * self._activation_s
        if rows:
            seconds += max((rows + half) * self._layer_s, self._layer_read_s)
        return seconds + (max((wanting + half) * self._head_s, self._head_read_s) if wanting else 0.0)

    def chunk_s(self, start: float, count: float) -> float:
        """Attention of a prefill chunk of `count` tokens after `start` others."""
        return max(
            self.shape.chunk_attention_flops(start, count) / self._attention_rate,
            (start + count) * self._kv_read_s,
        )

    def vision_s(self, images: Sequence[float]) -> float:
        """Images, given as their tokens, encoded in one call; on a device that prepares pages itself, that too."""
        if not images:
            return 0.0
        matmul = sum(map(self.shape.vision_flops, images)) / self._vision_rate
        attention = sum(map(self.shape.vision_attention_flops, images)) / self._attention_rate
        between = sum(images) * self.shape.unit * self.shape.vision_activations * self._activation_s
        return max(matmul, self._vision_read_s) + between + attention + len(images) * self.efficiency.image_s

    @property
    def prepare_s(self) -> float:
        """Seconds that preparing a page takes from the device: none if the host does it beside."""
        return self.efficiency.prepare_s if self.device.host else 0.0


@dataclass(frozen=True)
class Memory:
    """Bytes on the device, and how many pages they let run."""

    weights: float
    workspace: float
    kv: float
    """What is left for keys and values."""
    kv_per_page: float
    """Prompt, and output as admission predicts it (mean and two mean deviations)."""

    @property
    def max_concurrency(self) -> int:
        """Pages that fit at once; 0 if not even the weights do."""
        return max(int(self.kv / self.kv_per_page), 0)


def memory(
    shape: Shape, precision: Precision, device: Device, pages: PageStats, max_step_tokens: int = 2048
) -> Memory:
    """How the device's memory divides."""
    text, vision = shape.config.text, shape.config.vision
    weights = shape.weight_bytes(precision)
    step = max_step_tokens * (2 * text.intermediate_size + 4 * text.hidden_size)
    image = (
        shape.unit * max(pages.image_tokens, 4096) * (2 * vision.intermediate_size + 5 * vision.hidden_size)
    )
    workspace = _RESERVED * device.memory + precision.activation_bytes * (step + image)
    # The mean deviation of a log-normal of this sigma, as a share of the mean.
    deviation = 2 * math.erf(pages.output_sigma / math.sqrt(8))
    tokens = pages.prompt_tokens + pages.output_tokens * (1 + deviation)
    return Memory(
        weights, workspace, max(device.memory - weights - workspace, 0.0), tokens * shape.kv_bytes(precision)
    )


@dataclass(frozen=True)
class Prediction:
    """What a full batch does, pages arriving as fast as they are read, or a run of some. Seconds are the device's for a page."""

    concurrency: int
    prepare_s: float
    vision_s: float
    prefill_s: float
    decode_weights_s: float
    decode_kv_s: float
    overhead_s: float
    """Of steps and rows: launches, scheduling, masks, choice."""
    pages_per_s: float
    output_tokens_per_s: float
    latency_s: float
    """A page's time in the batch."""
    memory: Memory
    host_bound: bool
    """Pages are prepared more slowly than they could be read."""

    @property
    def device_s(self) -> float:
        """Seconds of the device for one page, all stages."""
        return sum(self.stages().values())

    def stages(self) -> dict[str, float]:
        """Seconds for one page by stage."""
        names = ("prepare", "vision", "prefill", "decode_weights", "decode_kv", "overhead")
        return {name: float(getattr(self, f"{name}_s")) for name in names}


@dataclass(frozen=True)
class _Stretch:
    """Steps of a run that are alike. Numbers are means, and need not be whole."""

    steps: float
    rows: float
    """Pages that decode in each."""
    prefilled: float = 0.0
    """Prompt tokens in each, beside them."""
    ended: float = 0.0
    """Prompts that end in each."""

    def matmul_s(self, cost: StepCost) -> float:
        return self.steps * cost.matmul_s(self.rows + self.prefilled, self.rows + self.ended)


def _full(pages: float, decodes: float, prompt: float, places: int, room: int) -> list[_Stretch]:
    """A full batch that takes in so many pages and makes `decodes` tokens of any page's; a step holds `room` tokens.

    A page's life in steps: chunks of its prefill beside the others' decoding, then one step a token.
    """
    chunks = pages * max(prompt / (room - places + 1), 1.0)
    steps = (chunks + decodes) / places
    if steps > chunks:  # some steps carry a prefill, the others only decode
        rows = decodes / steps
        mixed = [_Stretch(chunks, rows, pages * prompt / chunks, pages / chunks)] if chunks else []
        return [*mixed, _Stretch(steps - chunks, rows)]
    if steps := max(steps, (pages * prompt + decodes) / room):
        return [_Stretch(steps, decodes / steps, pages * prompt / steps, pages / steps)]
    return []


def _run(count: int, stats: PageStats, places: int, room: int) -> list[_Stretch]:
    """A run of `count` pages that are all there at the start: the batch fills, is full, and empties.

    It fills in steps full of prefill, beside which the first pages already decode. It empties from the moment when no page waits:
    how many of its pages still run follows from the distribution of their lengths L, log-normal. Of pages that all began
    together, a share P(L > t) has more than t tokens to go; in a batch long under way, where a page is met at any age (a renewal
    process in equilibrium), E[max(L - t, 0)] / E[L]. As long as fewer pages waited than there are places, it is between the two.
    """
    decodes, prompt = max(stats.output_tokens - 1, 0.0), stats.prompt_tokens
    # A page that ends before the batch is full makes room for another: then it never is.
    places = min(count, places, math.ceil(1 + decodes * room / prompt))
    steps = max(places * (prompt - 0.5) / (room - places / 2), 1.0)
    sigma = math.hypot(stats.output_sigma, stats.image_sigma)

    def above(t: float) -> tuple[float, float]:
        """P(L > t) and E[max(L - t, 0)]."""
        if t <= 0 or not sigma:
            return float(t < decodes), max(decodes - t, 0.0)
        z = math.log(t / decodes) / sigma
        longer = math.erfc((z + sigma / 2) / math.sqrt(2)) / 2
        return longer, decodes * math.erfc((z - sigma / 2) / math.sqrt(2)) / 2 - t * longer

    begun = min(
        (steps - 1) / 2, decodes
    )  # tokens that a page of any length has when the batch is full, on average
    made = places * (decodes - above(begun)[1])
    filling = _Stretch(steps, made / steps, places * prompt / steps, places / steps)
    mixed = min(count / places - 1, 1.0)

    def left(t: float) -> float:
        """Share of the pages with more than `t` tokens to go when no page waits."""
        together, at_any_age = above(t + begun)[0], above(t)[1] / decodes
        return (1 - mixed) * together + mixed * at_any_age

    emptying = []
    end = decodes * math.exp(5 * sigma)  # hardly any page is longer
    for low, high in pairwise(end * (i / 200) ** 2 for i in range(201)) if decodes else ():
        share = left((low + high) / 2)
        # The chance that any page does; exact for a share that is hardly any.
        runs = 1.0 if share >= 1 else -math.expm1(places * math.log1p(-share))
        if runs:
            emptying.append(_Stretch((high - low) * runs, places * share / runs))
    rest = count * decodes - made - sum(s.steps * s.rows for s in emptying)
    return [filling, *_full(count - places, max(rest, 0.0), prompt, places, room), *emptying]


def predict(
    cost: StepCost,
    pages: PageStats,
    concurrency: int | None = None,
    *,
    count: int | None = None,
    max_step_tokens: int = 2048,
    host_cores: int = 8,
) -> Prediction:
    """Predict steady state, or a run of `count` pages, its beginning and end included.

    `concurrency` None takes what fits, at most 256. Raises `ConfigError` if the model, or that many pages, do not fit the
    device's memory.
    """
    room = memory(cost.shape, cost.precision, cost.device, pages, max_step_tokens)
    if not room.max_concurrency:
        raise ConfigError(
            f"the model takes {room.weights / 1e9:.1f} GB of the {cost.device.memory / 1e9:.1f} GB of {cost.device.id} "
            "and leaves no room for a page; take a smaller precision, a smaller model or a larger device"
        )
    if concurrency is None:
        concurrency = min(room.max_concurrency, 256)
    if not 1 <= concurrency <= 1 << 16:
        raise ConfigError(f"concurrency should be from 1 to {1 << 16}, got {concurrency}")
    if concurrency > room.max_concurrency:
        raise ConfigError(
            f"{concurrency} pages at once do not fit {cost.device.id}; {room.max_concurrency} do at this page size"
        )
    if max_step_tokens <= concurrency:
        raise ConfigError(f"a step of {max_step_tokens} tokens has no room beside {concurrency} pages")
    if count is not None and count < 1:
        raise ConfigError(f"a run has at least one page, got {count}")
    e, prompt, outputs = cost.efficiency, pages.prompt_tokens, pages.output_tokens
    decodes = max(outputs - 1, 0.0)  # the first token comes with the prefill
    if count is None:
        n, stretches = 1, _full(1, decodes, prompt, concurrency, max_step_tokens)
    else:
        n, stretches = count, _run(count, pages, concurrency, max_step_tokens)
    matmul = sum(s.matmul_s(cost) for s in stretches) / n
    of_prefill = (
        sum(s.matmul_s(cost) * s.prefilled / (s.prefilled + s.rows) for s in stretches if s.prefilled) / n
    )
    steps = sum(s.steps for s in stretches) / n
    chunks = max(prompt / (max_step_tokens - concurrency + 1), 1.0)
    chunk_s = chunks * cost.chunk_s(prompt / chunks * (chunks - 1) / 2, prompt / chunks)
    context = prompt * decodes + max(pages.output_square - outputs, 0.0) / 2
    stages = dict(
        prepare_s=cost.prepare_s,
        vision_s=cost.vision_s([pages.image_tokens]),
        prefill_s=of_prefill + chunk_s,
        decode_weights_s=matmul - of_prefill,
        decode_kv_s=context * cost.context_s,
        overhead_s=steps * e.step_s + outputs * e.row_s,
    )
    device_s = sum(stages.values())
    host_s = 0.0 if cost.device.host else e.prepare_s / host_cores
    first_s = 0.0 if count is None else host_s / count  # the device waits for the first page
    page_s = max(device_s, host_s) + first_s
    running = concurrency if count is None else min(concurrency, (decodes + chunks) / steps)
    return Prediction(
        concurrency=concurrency,
        **stages,
        pages_per_s=1 / page_s,
        output_tokens_per_s=outputs / page_s,
        latency_s=running * device_s,
        memory=room,
        host_bound=host_s > device_s,
    )


@dataclass(frozen=True)
class Money:
    """What pages cost on rented devices. `utilisation` is the share of paid time in which pages are read."""

    usd_per_hour: float
    pages_per_s: float
    utilisation: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.utilisation <= 1:
            raise ConfigError(f"utilisation should be above 0 and at most 1, got {self.utilisation!r}")
        if not (0 <= self.usd_per_hour < math.inf and 0 < self.pages_per_s < math.inf):
            raise ConfigError(
                f"dollars an hour and pages a second should be positive, got {self.usd_per_hour!r} and {self.pages_per_s!r}"
            )

    @property
    def usd_per_page(self) -> float:
        """Dollars for one page."""
        return self.usd_per_hour / (3600 * self.pages_per_s * self.utilisation)

    @property
    def usd_per_million_pages(self) -> float:
        """Dollars for a million pages."""
        return 1e6 * self.usd_per_page

    @property
    def pages_per_month(self) -> float:
        """What one device reads in a month at this utilisation."""
        return 3600 * HOURS_A_MONTH * self.pages_per_s * self.utilisation

    def devices_for(self, pages_per_month: float) -> int:
        """Devices that read so many pages a month."""
        return math.ceil(pages_per_month / self.pages_per_month)

    def monthly_usd(self, pages_per_month: float) -> float:
        """Dollars a month for whole devices, rented all month."""
        return self.devices_for(pages_per_month) * self.usd_per_hour * HOURS_A_MONTH

    def break_even(self, api_usd_per_page: float) -> float | None:
        """Pages a month from which one device, rented all month, is cheaper than an API; None if it never is."""
        pages = self.usd_per_hour * HOURS_A_MONTH / api_usd_per_page
        return pages if pages <= self.pages_per_month else None


@dataclass(frozen=True)
class Check:
    """A published speed beside the model's. `note` says what was assumed, or why the row cannot be held against it."""

    row: Throughput
    predicted: float | None
    """Pages a second with `GPU_EFFICIENCY`."""
    limit: float | None
    """Pages a second if nothing were lost anywhere."""
    note: str

    @property
    def ratio(self) -> float | None:
        """Predicted over published."""
        return self.predicted / self.row.pages_per_s if self.predicted else None

    @property
    def share_of_limit(self) -> float | None:
        """What the published system reaches of the hardware's limit."""
        return self.row.pages_per_s / self.limit if self.limit else None

    def to_dict(self) -> dict[str, Any]:
        """Return the row with its comparison, as plain data."""
        return asdict(self.row) | {
            "predicted_pages_per_s": self.predicted,
            "ratio": self.ratio,
            "limit_pages_per_s": self.limit,
            "share_of_limit": self.share_of_limit,
            "assumed": self.note,
        }


def check_published(efficiency: Efficiency = GPU_EFFICIENCY) -> list[Check]:
    """Hold the model against every published speed. What a row leaves open is assumed, and said in its note."""
    return [_check(row, efficiency) for row in reference().throughputs]


def _check(row: Throughput, efficiency: Efficiency) -> Check:
    try:
        device = find_device(row.gpu)
    except ConfigError:
        return Check(row, None, None, f"no data for the card {row.gpu}")
    said = f"{row.system} {row.note}".lower()
    name = next((word for word in ("fp8", "w8a8", "w4a16") if word in said), "bfloat16")
    precision, notes = PRECISIONS[name], [name]
    shape, of = _stand_in(row.params_b)
    notes.append(of)
    pages = PageStats()
    if "4,800 visual tokens" in row.note:
        pages = PageStats(4800, 128, 64, output_sigma=0.0)
        notes.append("4,800 image and 128 output tokens as stated")
    else:
        outputs = 1000.0
        if row.output_tokens_per_s:
            outputs = row.output_tokens_per_s / row.pages_per_s
        pages = replace(pages, output_tokens=outputs)
        origin = "as published" if row.output_tokens_per_s else "assumed"
        notes.append(f"1,518 image tokens assumed, {outputs:,.0f} output tokens {origin}")
    concurrency = 96 if "96 concurrent" in row.engine else None
    best = predict(StepCost(shape, precision, device, efficiency), pages, concurrency)
    limit = predict(StepCost(shape, precision, device, LIMIT), pages, best.concurrency)
    notes.append(f"{best.concurrency} pages at once")
    return Check(row, best.pages_per_s, limit.pages_per_s, "; ".join(notes))


def _stand_in(params_b: float) -> tuple[Shape, str]:
    """A shape of so many parameters: the 3B or 7B where it is one, else the 3B with its widths scaled."""
    for name, config in SHAPES.items():
        shape = Shape(config)
        if abs(shape.params / 1e9 - params_b) < 0.1:
            return shape, f"shape of the {name}"
    base = SHAPES["3b"]
    low, high = 0.05, 4.0
    while high - low > 1e-4:
        scale = (low + high) / 2
        low, high = (scale, high) if Shape(_scaled(base, scale)).params < 1e9 * params_b else (low, scale)
    return Shape(_scaled(base, low)), f"stand-in of {params_b} B parameters, not its own architecture"


def _scaled(base: ModelConfig, scale: float) -> ModelConfig:
    """A model whose every matrix has about `scale` times the parameters; heads keep their width."""
    width = math.sqrt(scale)
    heads = max(round(base.text.num_heads * width), base.text.num_kv_heads)
    text = replace(
        base.text,
        hidden_size=128 * heads,
        intermediate_size=round(base.text.intermediate_size * scale * base.text.num_heads / heads),
        num_heads=heads,
    )
    heads = max(round(base.vision.num_heads * min(width, 1.0)), 1)
    vision = replace(
        base.vision,
        hidden_size=80 * heads,
        intermediate_size=round(base.vision.intermediate_size * min(width, 1.0)),
        num_heads=heads,
        out_hidden_size=text.hidden_size,
    )
    return replace(base, text=text, vision=vision)
