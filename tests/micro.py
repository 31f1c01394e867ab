"""A random model of a few thousand weights, and requests to throw at it: what the tests of the engine's inside share."""

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from make_checkpoint import PRESETS, write_checkpoint

from pagemill import kernels
from pagemill.config import EngineConfig
from pagemill.core import EngineCore
from pagemill.decode.sampler import SamplingParams, Want, sample
from pagemill.kernels.pixels import normalisation, pixel_values_reference
from pagemill.model.config import read_config
from pagemill.model.loader import load_model
from pagemill.model.prompt import Prompter
from pagemill.pages.preprocess import PreparedImage
from pagemill.runner import block_bytes

IMAGE = 2046
LEVELS = normalisation((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def shown(image, moments=2):
    """What a tower reads of a prepared image: float32 `[patches, 3 * moments * patch_size**2]`."""
    patches = torch.from_numpy(image.patches)
    out = torch.empty(len(patches), moments * patches.shape[1])
    pixel_values_reference(patches, torch.arange(len(patches)), torch.tensor(image.levels), moments, out)
    return out


def look_alikes():
    """Images of two sizes; those of one size differ in a single patch."""
    random = np.random.default_rng(0)
    images = []
    for h, w, copies in ((4, 6, 3), (2, 2, 2), (6, 4, 1)):
        base = random.integers(0, 256, (h * w, 588), dtype=np.uint8)
        for copy in range(copies):
            patches = base.copy()
            patches[1] = random.integers(0, 256, 588)
            key = f"{h}x{w} {copy}".encode().ljust(16)
            images.append(PreparedImage(patches, LEVELS, (1, h, w), h * w // 4, key))
    return images


IMAGES = look_alikes()


@dataclass(frozen=True)
class Ask:
    prompt: tuple[int, ...]
    """Token ids; 2046 stands for an image."""
    images: tuple[int, ...]
    max_new: int


class World:
    def __init__(self, folder, kind="auto", chosen=None):
        folder = write_checkpoint(folder, *PRESETS["micro"], std=0.25, dtype=torch.float32)
        config = read_config(folder)
        device = torch.device("cpu")
        chosen = chosen or kernels.select(kind, device, torch.float32)
        self.model = load_model(folder, config, chosen, device, torch.float32)
        self.prompter = Prompter(folder, config.text.vocab_size, config.image_token_id)
        self.alone: dict[Ask, list[int]] = {}
        t = self.model.config.text
        self.bytes_of_token = block_bytes(t.num_layers, t.num_kv_heads, t.head_dim, 1, torch.float32)

    def core(self, *, num_blocks=200, block_size=16, **options):
        options = {"kv_cache_bytes": num_blocks * block_size * self.bytes_of_token, **options}
        config = EngineConfig(block_size=block_size, **options)
        return EngineCore(self.model, self.prompter, config, torch.float32)

    def add(self, core, ask, priority=0, page=None, **params):
        prompt = core.tokenize(list(ask.prompt), [IMAGES[i] for i in ask.images])
        return core.add(prompt, SamplingParams(max_new_tokens=ask.max_new, **params), 99, priority, page)

    def reference(self, ask):
        """The request alone, whole prompt in one chunk, no sharing."""
        if ask not in self.alone:
            core = self.core(prefix_sharing=False)
            seq = self.add(core, ask)
            drain(core)
            self.alone[ask] = seq.output_ids
        return self.alone[ask]


def take(core, plan):
    """What `EngineCore.step` does with a plan, without its steering."""
    wants = [Want(work.seq.control.sampling, work.seq.token_ids) for work in plan.wanting()]
    tokens, logprobs = sample(core.runner.execute(plan), wants, core.model.decoder.kernels.greedy)
    for seq, reason in core.scheduler.update(plan, tokens, logprobs):
        core.scheduler.finish(seq, reason)


def drain(core, limit=5000):
    for _ in range(limit):
        if not core.scheduler.has_work:
            break
        core.step()
        core.scheduler.check()
    assert not core.scheduler.has_work
    assert core.blocks.num_free == core.blocks.num_blocks
    assert core.images.used_tokens == 0


texts = st.lists(st.integers(0, 5), max_size=9)


@st.composite
def asks(draw):
    images = draw(st.lists(st.integers(0, len(IMAGES) - 1), max_size=2))
    prompt: list[int] = []
    for _ in images:
        prompt += [*draw(texts), IMAGE]
    prompt += draw(texts)
    return Ask(tuple(prompt or [1]), tuple(images), draw(st.integers(1, 12)))
