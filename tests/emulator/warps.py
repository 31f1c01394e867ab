"""Lanes that execute a kernel together: one warp, or all of a block."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tests.emulator.formats import UNSIGNED, Array
from tests.emulator.instructions import EXECUTE, Mask, unsupported
from tests.emulator.memory import GlobalMemory, PtxError, SharedMemory, Unsupported, Window
from tests.emulator.ptx import Discard, Instruction, Module, Operand, Pair, Register, Vector

__all__ = ["Block", "Warps"]


@dataclass
class Block:
    """What the warps of one block share."""

    global_memory: GlobalMemory
    shared: SharedMemory
    params: dict[str, int]
    threads: int
    grid: tuple[int, int, int]
    program: tuple[int, int, int]


@dataclass
class Warps:
    """Lanes from `first` on, a multiple of 32, with their registers; poisoned at first."""

    module: Module
    block: Block
    first: int
    lanes: int
    limit: int
    """Instructions after which a loop is taken to be endless."""
    registers: dict[str, Array] = field(init=False)
    pending: list[tuple[Array, Array]] = field(default_factory=list)
    """Asynchronous copies (destinations, bytes) of the group not committed yet."""
    groups: list[list[tuple[Array, Array]]] = field(default_factory=list)
    """Committed groups that no wait has asked for."""

    def __post_init__(self) -> None:
        self.registers = {}
        for width, names in self.module.of_width.items():
            poison = True if width == 1 else 0xFFFFDEADFFFFDEAD & ((1 << width) - 1)
            file = np.full((len(names), self.lanes), poison, UNSIGNED[width])
            self.registers.update(zip(names, file, strict=True))
        thread = self.first + np.arange(self.lanes)
        self.lane = thread % 32
        self.local = Window(self.module.local * self.lanes)
        self.at = np.zeros(self.lanes, np.int64)
        self.alive = np.ones(self.lanes, bool)
        self.special: dict[str, Array | int] = {
            "tid.x": thread, "tid.y": 0, "tid.z": 0, "ntid.x": self.block.threads, "ntid.y": 1, "ntid.z": 1,
            "laneid": self.lane, "warpid": thread // 32, "warpsize": 32,
        }  # fmt: skip
        for axis, program, programs in zip("xyz", self.block.program, self.block.grid, strict=True):
            self.special |= {f"ctaid.{axis}": program, f"nctaid.{axis}": programs}

    def put(self, target: Operand, bits: Array, mask: Mask) -> None:
        """Write a result for the lanes in `mask`; narrower or wider registers take the low bits."""
        if isinstance(target, Register):
            register = self.registers[target.name]
            if mask is None:
                register[:] = bits
            else:
                np.copyto(register, bits, where=mask, casting="unsafe")
        elif isinstance(target, Vector):
            width = bits.dtype.itemsize * 8
            each = width // len(target.parts)
            low = UNSIGNED[width]((1 << each) - 1)
            for i, part in enumerate(target.parts):
                self.put(part, (bits >> UNSIGNED[width](i * each)) & low, mask)
        elif isinstance(target, Pair):
            self.put(target.first, bits, mask)
        elif not isinstance(target, Discard):
            raise Unsupported(f"not a target: {target}")

    def land(self, keep: int) -> None:
        """Let the oldest groups of copies arrive, until `keep` are left."""
        while len(self.groups) > keep:
            for destinations, data in self.groups.pop(0):
                self.block.shared.store(destinations, data, "the landing of a cp.async")

    def run(self) -> bool:
        """Until a barrier (True) or the end (False)."""
        self.block.shared.warp = self.first // 32
        left = self.limit
        while self.alive.any():
            at = int(self.at[self.alive].min())
            here = self.alive & (self.at == at)
            converged = bool(here.all())
            while True:
                if (left := left - 1) < 0:
                    raise PtxError("too many instructions: an endless loop?")
                instruction = self.module.instructions[at]
                instruction.count += 1
                mask = self._mask(instruction, None if converged else here)
                skipped = mask is not None and not mask.any()
                happens = (
                    None if skipped else EXECUTE.get(instruction.op, unsupported)(self, instruction, mask)
                )
                if converged and happens is None:
                    at += 1
                elif converged and mask is None and isinstance(happens, int):
                    at = happens
                else:
                    break
            # Lanes part, end, or wait; or are apart.
            self.at[here] = at + 1
            if happens == "barrier":
                return True
            taken = here if mask is None else mask
            if happens == "end":
                self.alive &= ~taken
            elif isinstance(happens, int):
                self.at[taken] = happens
        return False

    def _mask(self, instruction: Instruction, here: Mask) -> Mask:
        """Lanes that execute it; None: all."""
        if instruction.guard is None:
            return here
        guard = self.registers[instruction.guard]
        mask = ~guard if instruction.inverted else guard.copy()
        if here is not None:
            return mask & here
        return None if mask.all() else mask
