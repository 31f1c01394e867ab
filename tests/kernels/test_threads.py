import os
import signal
import threading
import time

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
        os._exit(0 if KERNELS.linear(x, packed).numpy().tobytes() == wanted else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert KERNELS.linear(x, packed).numpy().tobytes() == wanted


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
