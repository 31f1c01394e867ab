import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import pagemill._native as _native
from pagemill.kernels import select
from pagemill.kernels.dlpack import dl

KERNELS = select("native", torch.device("cpu"), torch.float32)


def test_set_num_threads() -> None:
    for n in (1, 3, 2):
        _native.set_num_threads(n)
        assert _native.num_threads() == n
    for n in (0, -1, 1025):
        with pytest.raises(ValueError, match="threads: expected"):
            _native.set_num_threads(n)


def test_many_callers_at_once_get_their_own_results() -> None:
    packed = KERNELS.pack_linear(torch.randn(256, 64), None)
    inputs = [torch.randn(128, 64) for _ in range(4)]
    wanted = [KERNELS.linear(x, packed) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for step in range(60):
            if not torch.equal(KERNELS.linear(inputs[i], packed), wanted[i]):
                wrong.append(i)
            if i == 0 and step % 20 == 0:
                _native.set_num_threads(1 + step // 20)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own() -> None:
    _native.set_num_threads(2)
    packed = KERNELS.pack_linear(torch.randn(512, 64), None)
    x = torch.randn(256, 64)
    wanted = KERNELS.linear(x, packed).numpy().tobytes()
    child = os.fork()
    if child == 0:  # only the exit status speaks; bytes, since torch's own threads do not survive a fork
        signal.alarm(30)
        os._exit(
            0 if _native.num_threads() == 2 and KERNELS.linear(x, packed).numpy().tobytes() == wanted else 1
        )
    assert os.waitpid(child, 0)[1] == 0
    assert KERNELS.linear(x, packed).numpy().tobytes() == wanted


def test_an_idle_pool_takes_no_processor_time() -> None:
    """A loop leaves its workers awake for some microseconds, not for the whole time until the next."""
    _native.set_num_threads(4)
    _native.parallel_for(64, 1, lambda begin, end: None)
    begin = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - begin < 0.1


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor")
def test_the_default_is_what_the_affinity_allows() -> None:
    code = "import pagemill._native as n; print(n.num_threads(), n.parallel_for(9, 1, lambda a, b: None))"
    allowed = min(os.sched_getaffinity(0))
    ran = subprocess.run(
        [sys.executable, "-c", code],
        preexec_fn=lambda: os.sched_setaffinity(0, {allowed}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == "1 None\n"


@pytest.mark.parametrize(
    ("membership", "files", "cpus"),
    [
        ("0::/\n", {"cpu.max": "150000 100000"}, 1),
        ("0::/\n", {"cpu.max": "50000 100000"}, 1),
        ("0::/\n", {"cpu.max": "max 100000"}, 0),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "200000 100000", "a/cpu.max": "300000 100000"}, 2),
        ("0::/of/the/host\n", {"cpu.max": "400000 100000"}, 4),
        ("2:cpu,cpuacct:/a\n1:cpuset:/c\n0::/\n", {"cpu/a/cpu.cfs_quota_us": "500000", "cpu/a/cpu.cfs_period_us": "100000"}, 5),
        ("3:cpu:/\n0::/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 0),
        ("1:cpuset:/a\n", {"cpuset/a/cpu.cfs_quota_us": "500000"}, 0),
        ("0::/\n", {"cpu.max": ""}, 0),
        ("junk\n0:\n\n", {}, 0),
        ("", {}, 0),
    ],
)  # fmt: skip
def test_cgroup_quotas(tmp_path: Path, membership: str, files: dict[str, str], cpus: int) -> None:
    """Version 2 and 1, the least of all ancestors; inside a container the path may not be there, but the top is."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "membership").write_text(membership)
    assert _native.cgroup_quota(str(tmp_path), str(tmp_path / "membership")) == cpus
    assert _native.cgroup_quota(str(tmp_path), str(tmp_path / "missing")) == 0


def test_unknown_isa_is_refused() -> None:
    with pytest.raises(ValueError, match=r"isa: expected one of .*portable, found sse9"):
        _native.set_isa("sse9")


def test_arrays_come_as_capsules_or_by_protocol_and_are_not_consumed() -> None:
    x, out = torch.randn(2, 16), torch.empty(2, 16)
    capsule = dl(x)
    for _ in range(2):
        _native.gelu(capsule, dl(out))
    again = torch.empty(2, 16)
    _native.gelu(x, again)
    assert torch.equal(out, again)
    with pytest.raises(TypeError):
        _native.gelu([[1.0]], dl(out))
    with pytest.raises(ValueError, match="x: expected"):
        _native.gelu(torch.zeros(2, 16, dtype=torch.float16), dl(out))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_an_empty_array_is_contiguous_whatever_its_strides(shape: tuple[int, int]) -> None:
    x = torch.empty(shape[1], shape[0], 7).permute(1, 0, 2)[:, :, 3]
    assert x.shape == shape
    assert KERNELS.gelu(x).shape == shape
    ids = torch.empty(0, 2, dtype=torch.int64)[:, 0]
    assert KERNELS.embed(ids, KERNELS.pack_linear(torch.randn(8, 4), None)).shape == (0, 4)


@pytest.mark.parametrize("threads", [1, 3])
def test_parallel_for_covers_every_item_once(threads: int) -> None:
    _native.set_num_threads(threads)
    for n, chunk in [(0, 1), (1, 1), (100, 1), (100, 7), (5, 100)]:
        seen: list[int] = []
        _native.parallel_for(n, chunk, lambda begin, end, seen=seen: seen.extend(range(begin, end)))
        assert sorted(seen) == list(range(n)), (n, chunk)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_an_exception_of_any_thread_reaches_the_caller_and_leaves_the_pool_sound(threads: int) -> None:
    """Whichever thread it strikes: the caller of the loop, a worker, or all of them at once."""
    _native.set_num_threads(threads)
    caller = threading.get_ident()
    for struck in ("caller", "worker", "any") * 20:
        begun: list[int] = []
        thrown: list[int] = []

        def work(
            begin: int, end: int, struck: str = struck, begun: list[int] = begun, thrown: list[int] = thrown
        ) -> None:
            begun.append(begin)
            here = "caller" if threading.get_ident() == caller else "worker"
            if struck in (here, "any"):
                thrown.append(begin)
                raise MemoryError(begin)
            time.sleep(1e-4)

        caught = None
        try:
            _native.parallel_for(16, 1, work)
        except MemoryError as error:
            caught = error.args[0]
        assert caught in thrown if thrown else caught is None
        assert thrown or struck != "any"
        assert len(set(begun)) == len(begun)
        done: list[int] = []
        _native.parallel_for(64, 1, lambda begin, end, done=done: done.extend(range(begin, end)))
        assert sorted(done) == list(range(64))


@pytest.mark.parametrize("threads", [1, 3])
def test_loops_nest_and_threads_are_not_changed_inside_one(threads: int) -> None:
    _native.set_num_threads(threads)
    seen: list[tuple[int, int]] = []
    refused: list[int] = []

    def outer(begin: int, end: int) -> None:
        for i in range(begin, end):
            _native.parallel_for(5, 1, lambda a, b, i=i: seen.extend((i, j) for j in range(a, b)))
            if threads > 1:
                try:
                    _native.set_num_threads(2)
                except RuntimeError:
                    refused.append(i)

    _native.parallel_for(6, 1, outer)
    assert sorted(seen) == [(i, j) for i in range(6) for j in range(5)]
    assert threads == 1 or sorted(refused) == list(range(6))
    assert _native.num_threads() == threads


def test_a_chunk_has_at_least_one_item() -> None:
    for chunk in (0, -1, -(2**63)):
        with pytest.raises(ValueError, match="chunk: expected"):
            _native.parallel_for(4, chunk, lambda begin, end: None)
