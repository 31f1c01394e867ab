"""A GPU made of the CPU, that is as strict as a real one about what a graph may use."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pagemill.gpu import Gpu


class Reads(TorchDispatchMode):
    """Which memory from outside a run's operations take."""

    def __init__(self):
        super().__init__()
        self.outside, self.made = {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                at = tensor.untyped_storage().data_ptr()
                if at not in self.made:
                    self.outside[at] = tensor  # kept, so that no other memory gets the address
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                at = tensor.untyped_storage().data_ptr()
                if at not in self.outside:
                    self.made[at] = tensor
        return out


class FakeGpu(Gpu):
    """A graph runs again what it recorded, and fails where that takes other memory than it did; pinned memory may not be
    written before its copy has been waited for.
    """

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.recorded = 0
        self.replayed = []
        """Number of the graph, in the order of recording."""
        self.copies = self.fetched = self.encoded = 0
        self.free, self.total = 1 << 30, 2 << 30
        self.peaks = [100 << 20, 10 << 20]
        """What the next runs take at their height."""
        self.num_tidied = 0
        self.dead = False

    def use(self):
        pass

    def memory(self):
        return self.free, self.total

    def alive(self):
        return not self.dead

    def tidy(self):
        self.num_tidied += 1

    def peak(self, run):
        run()
        return self.peaks.pop(0)

    def host_memory(self, num_bytes):
        return torch.full((num_bytes,), 0x55, dtype=torch.uint8)

    def copy(self, memory, to):
        to.copy_(memory)
        self.copies += 1
        sent = memory.clone()

        def wait():
            assert torch.equal(memory, sent), "pinned memory was written while it was copied"

        return wait

    def fetch(self, *tensors):
        copies = [tensor.clone() for tensor in tensors]
        self.fetched += 1
        return lambda: copies

    def beside(self, run):
        """Embeddings are not there until they are waited for: NaN, if somebody reads them before."""
        computed = list(run())
        found = [torch.full_like(tensor, torch.nan) for tensor in computed]
        self.encoded += len(found)

        def join(tensor):
            for given, there in zip(found, computed, strict=True):
                if given is tensor:
                    given.copy_(there)

        return found, join

    def capture(self, run):
        run()
        with Reads() as recorded:
            run()
        number = self.recorded
        self.recorded += 1

        def replay():
            with Reads() as now:
                run()
            assert set(now.outside) <= set(recorded.outside), (
                "a graph takes memory that it was not recorded with"
            )
            self.replayed.append(number)

        return replay
