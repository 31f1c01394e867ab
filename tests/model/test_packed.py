"""Packed weights on disk: the same bits with and without them, and no file that is not whole is ever used."""

import dataclasses
import errno
import multiprocessing
import os
import random
import resource
import signal
import struct
import threading
import time
import warnings
from collections import namedtuple

import numpy as np
import pytest
import torch
from make_checkpoint import PRESETS, write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pagemill import Engine, Request, SamplingParams, kernels
from pagemill.config import EngineConfig
from pagemill.errors import ConfigError, PagemillError
from pagemill.model import packed
from pagemill.model.config import read_config
from pagemill.model.decoder import RaggedBatch
from pagemill.model.loader import load_model
from pagemill.model.weights import Checkpoint

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The cache folder of this test."""
    monkeypatch.setenv("PAGEMILL_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "packed"


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("micro"), *PRESETS["micro"], std=0.2)


def load(checkpoint, kind="auto", dtype=torch.float32, mode="on", quantize="none"):
    """Load a model that must not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_model(
            checkpoint,
            read_config(checkpoint),
            kernels.select(kind, CPU, dtype),
            CPU,
            dtype,
            quantize=quantize,
            weight_cache=mode,
        )


def outputs(model):
    """Embeddings of an image and logits of a prompt that shows it: every weight takes part."""
    patches = (torch.arange(16 * 588) * 7919 % 256).to(torch.uint8).view(16, 588)
    levels = torch.linspace(-1, 1, 256).expand(3, 256).contiguous()
    image = model.vision([(patches, levels, (1, 4, 4))])[0]
    text, dtype = model.config.text, model.vision.dtype
    shapes = kernels.kv_cache_shapes(1, text.num_kv_heads, text.head_dim, 16)
    caches = [tuple(torch.zeros(shape, dtype=dtype) for shape in shapes) for _ in range(text.num_layers)]
    batch = RaggedBatch(
        token_ids=torch.arange(7) * 97,
        positions=torch.arange(7).expand(3, 7).contiguous(),
        max_position=6,
        slots=torch.arange(7),
        query_start=torch.tensor([0, 7], dtype=torch.int32),
        context_lens=torch.tensor([7], dtype=torch.int32),
        block_tables=torch.zeros(1, 1, dtype=torch.int32),
        logit_rows=torch.arange(7),
        image_index=torch.tensor([-1, 0, 1, 2, 3, -1, -1], dtype=torch.int32),
        image_embeds=image,
    )
    return torch.cat([image.float().flatten(), model.decoder(batch, caches).flatten()])


def entries(folder):
    return sorted(folder.glob("pagemill-*.safetensors"))


def leftovers(folder):
    return [path for path in folder.iterdir() if path.suffix == ".part"]


@pytest.mark.parametrize(
    ("kind", "dtype", "tied"),
    [
        ("native", torch.float32, True),
        ("native", torch.bfloat16, False),
        ("reference", torch.float32, False),
        ("reference", torch.bfloat16, True),
    ],
    ids=str,
)
def test_a_second_start_has_the_same_bits_and_reads_no_weight(
    tmp_path, folder, monkeypatch, kind, dtype, tied
):
    text, vision = PRESETS["micro"]
    checkpoint = write_checkpoint(tmp_path, dict(text, tie_word_embeddings=tied), vision, std=0.2)
    without = outputs(load(checkpoint, kind, dtype, "off"))
    assert not folder.exists()
    first = load(checkpoint, kind, dtype)
    (entry,) = entries(folder)
    assert first.weights == f"packed at start, kept in {entry}"
    assert first.mapped_bytes == 0

    def refuse(self, name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(Checkpoint, "read", refuse)
    second = load(checkpoint, kind, dtype)
    assert second.weights == f"mapped from {entry}"
    assert 0 < second.mapped_bytes < entry.stat().st_size
    assert (second.decoder.lm_head is second.decoder.embed_tokens) == tied
    assert torch.equal(without, outputs(first))
    assert torch.equal(without, outputs(second))
    assert not leftovers(folder)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantised_weights_are_kept_apart_and_whole(micro, folder, quantize):
    plain, without = outputs(load(micro)), outputs(load(micro, mode="off", quantize=quantize))
    assert not torch.equal(plain, without)
    first, second = (load(micro, quantize=quantize) for _ in range(2))
    assert len(entries(folder)) == 2
    assert first.weights.startswith("packed")
    assert second.weights.startswith("mapped")
    assert torch.equal(without, outputs(first))
    assert torch.equal(without, outputs(second))


def test_the_file_is_plain_safetensors_with_aligned_tensors(micro, folder):
    model = load(micro)
    mapped = load(micro)
    weight = mapped.decoder.layers[1].gate_up.weight
    (entry,) = entries(folder)
    with safe_open(entry, "pt") as file:
        name = next(n for n in file.keys() if "layers.1.mlp.gate" in n and n.endswith(".weight"))  # noqa: SIM118
        assert torch.equal(file.get_tensor(name), model.decoder.layers[1].gate_up.weight)
    for block in (*mapped.vision.blocks, *mapped.decoder.layers):
        for item in vars(block).values():
            parts = [item] if isinstance(item, torch.Tensor) else [item.weight, item.bias]
            assert all(part.data_ptr() % 64 == 0 for part in parts if part is not None)
    assert weight.untyped_storage().data_ptr() == mapped.vision.merger_norm.untyped_storage().data_ptr()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wider(kernels.PackedLinear):
    clip: float | None
    odd: torch.Tensor
    none: int | None


def test_a_packed_form_of_more_fields(folder, monkeypatch):
    """Whatever fields a packed weight has, they come back: tensors of any dtype and size, and scalars."""
    monkeypatch.setattr(packed, "PackedLinear", Wider)
    item = Wider(
        weight=torch.arange(33, dtype=torch.uint8).view(3, 11),
        bias=None,
        out_features=3,
        in_features=22,
        scales=torch.tensor(0.5, dtype=torch.float16),
        scheme="int4",
        group=64,
        clip=0.1,
        none=None,
        odd=torch.empty(0, 4, dtype=torch.int64),
    )
    packed.save(folder / "pagemill-x.safetensors", {"a": item, "b.c": torch.tensor([True])})
    back = packed.load(folder / "pagemill-x.safetensors")
    assert back.keys() == {"a", "b.c"}
    for field in dataclasses.fields(Wider):
        got, expected = getattr(back["a"], field.name), getattr(item, field.name)
        if isinstance(expected, torch.Tensor):
            assert got.dtype == expected.dtype
            assert torch.equal(got, expected)
        else:
            assert (type(got), got) == (type(expected), expected)
    monkeypatch.undo()
    with pytest.raises(PagemillError, match="has the fields"):  # it is not today's form
        packed.load(folder / "pagemill-x.safetensors")
    with pytest.raises(TypeError, match="cannot be stored"):
        packed.save(folder / "pagemill-y.safetensors", {"a": kernels.PackedLinear(item.weight, None, CPU, 2)})


def key(checkpoint, kind="native", dtype=torch.float32, scheme="plain"):
    config = read_config(checkpoint)
    k = kernels.select(kind, CPU, dtype)
    return packed.entry(Checkpoint(checkpoint, config), config, k, dtype, scheme).name


def test_what_the_name_covers(tmp_path, micro, monkeypatch):
    plain = key(micro)
    others = [
        key(micro, dtype=torch.bfloat16),
        key(micro, kind="reference"),
        key(micro, scheme="int8"),
        key(write_checkpoint(tmp_path / "seed", *PRESETS["micro"], std=0.2, seed=1)),
    ]
    original = kernels.linear.pack_native

    def other_layout(*args, **options):
        item = original(*args, **options)
        return dataclasses.replace(item, weight=item.weight.flip(0))

    monkeypatch.setattr(kernels.linear, "pack_native", other_layout)
    others.append(key(micro))
    assert len({plain, *others}) == 1 + len(others)
    monkeypatch.undo()
    assert key(micro) == plain


def rewrite(path, at, data):
    path.chmod(0o600)
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def test_the_digest_of_a_checkpoint(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1 << 20)}, path)
    os.truncate(path, 130 << 20)  # sparse: two stripes and a bit
    os.utime(path, ns=(1, 10**18))
    digests = [packed.content_digest([path])]

    def changed(at):
        rewrite(path, at, b"\1")
        os.utime(path, ns=(1, 10**18))
        digests.append(packed.content_digest([path]))
        return digests[-1] != digests[-2]

    assert changed(20)  # the header
    assert changed(64 << 20)
    assert changed((130 << 20) - 1)
    assert not changed(30 << 20)  # between the pieces: only its time tells
    os.utime(path, ns=(1, 10**18 + 1))
    assert packed.content_digest([path]) != digests[-1]


def test_a_blob_of_the_hub_is_its_name(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots").mkdir()
    digests = []
    for name in ("a" * 64, "b" * 64, "a" * 64):
        blob, link = tmp_path / "blobs" / name, tmp_path / "snapshots" / "model.safetensors"
        blob.write_bytes(b"weights")
        link.unlink(missing_ok=True)
        link.symlink_to(blob)
        digests.append(packed.content_digest([link]))
    assert digests[0] == digests[2] != digests[1]


def test_changed_weights_are_packed_again(tmp_path, folder):
    checkpoint = write_checkpoint(tmp_path, *PRESETS["micro"], std=0.2)
    before = outputs(load(checkpoint))
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] *= 2
    save_file(tensors, path)
    after = outputs(load(checkpoint))
    assert not torch.equal(before, after)
    assert torch.equal(after, outputs(load(checkpoint, mode="off")))
    assert len(entries(folder)) == 2


def test_an_item_that_is_missing_is_packed_and_the_file_completed(micro, folder):
    whole = load(micro)
    (entry,) = entries(folder)
    items = packed.load(entry)
    packed.save(entry, {name: item for name, item in items.items() if "merger" not in name})
    part = load(micro)
    assert "kept in" in part.weights
    assert torch.equal(outputs(part), outputs(whole))
    assert packed.load(entry).keys() == items.keys()


def cut(keep):
    return lambda data: data[:keep]


def flip(at):
    def change(data):
        data = bytearray(data)
        data[at] ^= 4
        return bytes(data)

    return change


def middle_of_the_header(data):
    return flip(data.index(b"data_offsets") + 16)(data)


def middle_of_the_data(data):
    return flip((len(data) + 65536) // 2)(data)


DAMAGE = {
    "empty": cut(0),
    "seven bytes": cut(7),
    "cut in the header": cut(5000),
    "cut in the data": cut(-100000),
    "a byte short": cut(-1),
    "a byte more": lambda data: data + b"\0",
    "length": flip(1),
    "absurd length": lambda data: struct.pack("<Q", 1 << 62) + data[8:],
    "header": middle_of_the_header,
    "first number": flip(65536),
    "data": middle_of_the_data,
    "a hole": lambda data: data[:100000] + bytes(4096) + data[104096:],
    "digest": flip(-1),
    "text": lambda data: b"not weights\n" * 10000,
    "json, but another's": lambda data: data.replace(b"pagemill packed weights", b"somebody elses weights!"),
    "deep json": lambda data: struct.pack("<Q", 65528) + b"[" * 65528 + data[65536:],
}


@pytest.mark.parametrize("damage", DAMAGE, ids=str)
def test_a_damaged_file_is_made_again(micro, folder, damage):
    expected = outputs(load(micro))
    (entry,) = entries(folder)
    good = entry.read_bytes()
    bad = DAMAGE[damage](good)
    assert bad != good
    entry.chmod(0o600)
    entry.write_bytes(bad)
    config = read_config(micro)
    with pytest.warns(UserWarning, match="cannot be used") as said:
        model = load_model(
            micro, config, kernels.select("auto", CPU, torch.float32), CPU, torch.float32, weight_cache="on"
        )
    assert len(said) == 1
    assert "\n" not in str(said[0].message)
    assert torch.equal(outputs(model), expected)
    assert entry.read_bytes() == good
    assert load(micro).weights.startswith("mapped")


def test_another_file_of_the_format_is_refused(micro, folder):
    load(micro)
    (entry,) = entries(folder)
    entry.chmod(0o600)
    save_file({"a": torch.zeros(40000)}, entry)
    with pytest.raises(PagemillError):
        packed.load(entry)


def test_no_flipped_bit_is_missed(folder):
    rng = random.Random(0)
    path = folder / "pagemill-x.safetensors"
    items = {"a": torch.randn(70000), "b": torch.arange(13, dtype=torch.int8)}
    packed.save(path, items)
    good = path.read_bytes()
    data_end = len(good) - 32 - 64
    for at in [rng.randrange(data_end) for _ in range(60)] + [rng.randrange(65536) for _ in range(60)]:
        rewrite(path, at, bytes([good[at] ^ 1 << rng.randrange(8)]))
        with pytest.raises(PagemillError):
            packed.load(path)
        rewrite(path, at, good[at : at + 1])
    assert torch.equal(packed.load(path)["a"], items["a"])


def _load_into(file, checkpoint):
    model = load(checkpoint)
    torch.save((model.weights, outputs(model)), file)


def _load_and_die(checkpoint, writes):
    """Be killed in the midst of a write, after so many of them."""
    write = os.write

    def dying(fd, data):
        nonlocal writes
        writes -= 1
        if writes < 0:
            write(fd, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(fd, data)

    packed.os.write = dying
    load(checkpoint)


def _forked(work, *args):
    pid = os.fork()
    if not pid:
        try:
            work(*args)
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def _drama(checkpoint, where, kills):
    """Two processes at once, and some that are killed; in a process of its own, whose forks find no threads to miss."""
    os.environ["PAGEMILL_CACHE_DIR"] = str(where / "race")
    both = [_forked(_load_into, where / str(i), checkpoint) for i in range(2)]
    codes = [os.waitpid(pid, 0)[1] for pid in both]
    for writes in kills:
        os.environ["PAGEMILL_CACHE_DIR"] = str(where / f"killed {writes}")
        codes.append(os.waitpid(_forked(_load_and_die, checkpoint, writes), 0)[1])
    os._exit(codes != [0, 0, *[signal.SIGKILL] * len(kills)])


def test_two_processes_at_once_and_writers_that_are_killed(tmp_path, micro, folder, monkeypatch):
    expected = outputs(load(micro))
    (entry,) = entries(folder)
    calls = []
    write = packed._write
    monkeypatch.setattr(packed, "_write", lambda fd, data: (calls.append(len(data)), write(fd, data)))
    packed.save(entry, packed.load(entry))
    kills = [0, 40, sum(map(bool, calls)) - 1]  # in the header, in the data, in the digest
    process = multiprocessing.get_context("spawn").Process(target=_drama, args=(micro, tmp_path, kills))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    for i in range(2):
        assert torch.equal(torch.load(tmp_path / str(i))[1], expected)
    assert [path.name for path in (tmp_path / "race" / "packed").iterdir()] == [entry.name]
    for writes in kills:
        monkeypatch.setenv("PAGEMILL_CACHE_DIR", str(tmp_path / f"killed {writes}"))
        here = tmp_path / f"killed {writes}" / "packed"
        (left,) = here.iterdir()
        assert left.suffix == ".part"
        os.utime(left, (time.time() - 60,) * 2)
        model = load(micro)
        assert model.weights.startswith("packed at start, kept in")
        assert torch.equal(outputs(model), expected)
        assert [path.name for path in here.iterdir()] == [entry.name]


def test_a_reader_beside_a_writer_sees_whole_files(folder):
    path = folder / "pagemill-x.safetensors"
    packed.save(path, {"a": torch.zeros(50000)})
    done = threading.Event()

    def write():
        for number in range(1, 20):
            packed.save(path, {"a": torch.full((50000,), float(number))})
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not done.is_set():
        values = packed.load(path)["a"].unique()
        assert len(values) == 1
        seen.add(float(values))
    writer.join()
    assert len(seen) > 1
    assert not leftovers(folder)


def not_kept(checkpoint, match):
    """Load, expecting the one warning that nothing is kept; the model is whole all the same."""
    config = read_config(checkpoint)
    with pytest.warns(UserWarning, match=match) as said:
        model = load_model(
            checkpoint,
            config,
            kernels.select("auto", CPU, torch.float32),
            CPU,
            torch.float32,
            weight_cache="on",
        )
    assert len(said) == 1
    assert model.weights.startswith("packed at start, not kept: ")
    assert torch.equal(outputs(model), outputs(load(checkpoint, mode="off")))


def test_a_cache_folder_that_cannot_be_made(tmp_path, micro, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PAGEMILL_CACHE_DIR", str(tmp_path / "file"))
    not_kept(micro, "not kept.*NotADirectory.*PAGEMILL_CACHE_DIR")


def test_a_cache_folder_that_cannot_be_written(micro, folder, monkeypatch):
    if os.geteuid():
        folder.mkdir(parents=True)
        folder.chmod(0o500)
    else:  # root may write anywhere but into the kernel's own files
        monkeypatch.setattr(packed, "cache_folder", lambda: packed.Path("/proc"))
    not_kept(micro, "not kept")


def test_an_entry_is_used_where_nothing_can_be_written(micro, folder, monkeypatch):
    load(micro)

    def read_only(*args, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("utime", "unlink", "replace"):
        monkeypatch.setattr(packed.os, name, read_only)
    monkeypatch.setattr(packed.tempfile, "mkstemp", read_only)
    assert load(micro).weights.startswith("mapped")


Usage = namedtuple("Usage", "total used free")


def test_a_disk_without_room(micro, folder, monkeypatch):
    """Nothing is written, and what was there stays."""
    load(micro, dtype=torch.bfloat16)
    monkeypatch.setattr(packed.shutil, "disk_usage", lambda path: Usage(10**11, 10**11, packed._LEAVE_FREE))
    not_kept(micro, "not kept.* GB free")
    assert len(entries(folder)) == 1


def test_a_write_that_fails_midway(micro, folder):
    """The system refuses the second half of the file, as it does on a full disk."""
    load(micro)
    (entry,) = entries(folder)
    size = entry.stat().st_size
    entry.unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        not_kept(micro, "not kept.*File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert not list(folder.iterdir())


def test_a_file_that_is_being_written_is_left_alone(folder):
    packed.save(folder / "pagemill-a.safetensors", {"a": torch.zeros(9)})
    part = folder / "pagemill-b.x.part"
    with open(part, "wb") as file:
        packed.fcntl.flock(file, packed.fcntl.LOCK_EX)
        os.utime(part, (1, 1))
        packed.save(folder / "pagemill-a.safetensors", {"a": torch.zeros(9)})
        assert part.exists()
    packed.save(folder / "pagemill-a.safetensors", {"a": torch.zeros(9)})
    assert not part.exists()


def test_old_entries_go_and_strangers_stay(folder, monkeypatch):
    def write(name, days=0.0):
        path = folder / f"pagemill-{name}.safetensors"
        packed.save(path, {"a": torch.zeros(100000)})
        os.utime(path, (time.time() - days * 86400,) * 2)
        return path

    write("recent")
    stranger = folder / "model.safetensors"
    stranger.write_bytes(b"somebody's")
    os.utime(stranger, (1, 1))
    write("old", 31)
    write("new")
    assert {path.stem for path in folder.iterdir()} == {"pagemill-recent", "pagemill-new", "model"}
    # By size, the least recently used first.
    size = write("third", 3).stat().st_size
    write("second", 2)
    monkeypatch.setattr(packed, "_LARGEST_CACHE", 4 * size)
    write("last")
    assert {path.stem for path in entries(folder)} == {
        f"pagemill-{n}" for n in ("last", "new", "recent", "second")
    }
    # And so for the room on the disk.
    monkeypatch.setattr(packed.shutil, "disk_usage", lambda path: Usage(10**11, 1, packed._LEAVE_FREE))
    os.utime(folder / "pagemill-new.safetensors", (1e9, 1e9))
    monkeypatch.setattr(packed, "_UNUSED_S", 1e12)
    write("another")
    assert {path.stem for path in entries(folder)} == {
        f"pagemill-{n}" for n in ("another", "last", "recent", "second")
    }


def test_use_is_remembered(micro, folder):
    load(micro)
    (entry,) = entries(folder)
    os.utime(entry, (1e9, 1e9))
    load(micro)
    assert entry.stat().st_mtime > time.time() - 3600


def test_where_files_go(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("PAGEMILL_CACHE_DIR", "~/here")
    assert str(packed.cache_folder()) == "/home/somebody/here/packed"
    monkeypatch.delenv("PAGEMILL_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert str(packed.cache_folder()) == "/xdg/pagemill/packed"
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert str(packed.cache_folder()) == "/home/somebody/.cache/pagemill/packed"


def test_when_files_are_kept(micro, folder, monkeypatch):
    checkpoint = Checkpoint(micro, read_config(micro))
    small = [packed.is_wanted(mode, checkpoint, CPU) for mode in ("auto", "on", "off")]
    assert small == [False, True, False]
    assert not packed.is_wanted("on", checkpoint, torch.device("cuda"))
    monkeypatch.setattr(packed, "_SMALL", 1000)
    assert packed.is_wanted("auto", checkpoint, CPU)
    with pytest.raises(ConfigError, match="weight_cache should be auto, on or off"):
        EngineConfig(weight_cache="yes")


def test_an_engine_says_where_its_weights_came_from(folder, monkeypatch):
    monkeypatch.setattr("pagemill.core.free_memory", lambda gpu: 1 << 30)
    said, kv = [], []
    for _ in range(2):
        with Engine.from_pretrained("pagemill-tiny", weight_cache="on", max_num_seqs=4096) as engine:
            said.append(engine.describe()["weights"])
            kv.append(engine.core.kv_cache_bytes)
            mapped = engine.core.model.mapped_bytes
    (entry,) = entries(folder)
    assert said == [f"packed at start, kept in {entry}", f"mapped from {entry}"]
    # Mapped weights are memory that the system calls free: the KV cache must not take it.
    assert kv == [int(0.3 * (1 << 30)), int(0.3 * ((1 << 30) - mapped))]
    with Engine.from_pretrained("pagemill-tiny") as engine:
        assert engine.describe()["weights"] == "packed at start"


def test_an_engine_reads_no_page_from_damaged_weights(folder, monkeypatch):
    """The check runs beside the start: a page waits for it, and is read from weights that are packed again."""
    page = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)

    def read():
        with Engine.from_pretrained("pagemill-tiny", weight_cache="on", dtype="float32") as engine:
            prompt = engine.page_prompt
            (output,) = engine.generate([Request(prompt, [page])], SamplingParams(max_new_tokens=8))
            return output, engine.describe()["weights"]

    expected, _ = read()
    (entry,) = entries(folder)
    good = entry.read_bytes()
    entry.unlink()
    bad = bytearray(good)
    bad[65536 : len(bad) - 4096 : 4099] = bytes(len(range(65536, len(bad) - 4096, 4099)))
    entry.write_bytes(bad)
    sums = packed._block_sums

    def late(*args):
        time.sleep(0.3)  # longer than the rest of the start and the page's preparation take
        return sums(*args)

    monkeypatch.setattr(packed, "_block_sums", late)
    with pytest.warns(UserWarning, match="cannot be used .its data changed.: packing again"):
        output, weights = read()
    assert output.token_ids == expected.token_ids
    assert weights == f"packed at start, kept in {entry}"
    assert entry.read_bytes() == good
    output, weights = read()
    assert output.token_ids == expected.token_ids
    assert weights == f"mapped from {entry}"


def test_a_second_form_and_an_order_of_columns_are_kept(tmp_path):
    ops = kernels.select("native", CPU, torch.bfloat16)
    q, scales = torch.randint(-127, 128, (40, 64), dtype=torch.int8), torch.rand(40)
    narrow = ops.pack_linear(torch.randn(40, 64), None, scheme="int4")
    items = {
        "both": dataclasses.replace(narrow, wide=ops.pack_quantized(q, scales, None, None)),
        "sorted": ops.pack_quantized(q, scales, None, None, order=torch.randperm(64)),
    }
    packed.save(tmp_path / "file", items)
    found = packed.load(tmp_path / "file")
    assert found.keys() == items.keys()
    x = torch.randn(100, 64).bfloat16()
    for name, item in items.items():
        for rows in (3, 100):
            assert torch.equal(ops.linear(x[:rows], found[name]), ops.linear(x[:rows], item))
    assert not torch.equal(ops.linear(x, found["both"])[:3], ops.linear(x[:3], found["both"]))
