"""What a compiler made of a Triton kernel, read from its machine code; no GPU is needed.

`capture` has the launchers of `pagemill.kernels.gpu` run on tensors without memory and keeps what they would have launched, so
that what is compiled is what a GPU would run: signature, known divisibility and constants are Triton's own choice. `build`
compiles one such launch for a target, and reads registers, spills, shared memory, matrix instructions, the width of loads, and
the instructions of the inner loop out of SASS (of AMD's: GCN assembly). Loads are told apart by the source line they come from.
"""

from __future__ import annotations

import linecache
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pagemill.kernels.gpu import configs


@dataclass(frozen=True)
class Target:
    """A GPU to compile for, with what one of its multiprocessors holds."""

    name: str
    gpu: GPUTarget
    card: configs.Card
    """The card whose launches are compiled."""
    shared: int
    """Bytes of shared memory that a program can have."""
    shared_all: int
    """Bytes of shared memory of a multiprocessor."""
    warps: int
    programs: int
    devices: tuple[str, ...] = ()
    """Ids in the reference data of cards with this instruction set."""

    @property
    def is_cuda(self) -> bool:
        return self.gpu.backend == "cuda"


def _cuda(arch: int, name: str, sizes: tuple[int, int, int, int, int], *devices: str) -> Target:
    processors, shared, shared_all, warps, programs = sizes
    card = configs.Card(name, arch, processors)
    return Target(
        f"sm_{arch}",
        GPUTarget("cuda", arch, 32),
        card,
        shared << 10,
        shared_all << 10,
        warps,
        programs,
        devices,
    )


# Of the CUDA C++ programming guide's table of technical specifications, and AMD's CDNA 3 white paper.
TARGETS = {
    target.name: target
    for target in (
        _cuda(80, "A100", (108, 163, 164, 64, 32), "a100-sxm-80"),
        _cuda(89, "L40S", (142, 99, 100, 48, 24), "l40s"),
        _cuda(90, "H100", (132, 227, 228, 64, 32), "h100-sxm", "h200-sxm"),
        _cuda(100, "B200", (148, 227, 228, 64, 32), "b200"),
        Target("gfx942", GPUTarget("hip", "gfx942", 64), configs.Card("MI300X", 942, 304), 64 << 10, 64 << 10, 32, 32),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A kernel as a launcher would have started it."""

    kernel: str
    fn: Any
    signature: Mapping[str, str]
    constants: Mapping[Any, Any]
    attributes: Mapping[Any, Any]
    options: Mapping[str, Any]

    @property
    def values(self) -> dict[str, Any]:
        """The constants by name."""
        return {self.fn.arg_names[path[0]]: value for path, value in self.constants.items() if len(path) == 1}

    @property
    def multiply_adds(self) -> int:
        """Of one step of the inner loop, by a whole program; 0 for a kernel without a product."""
        values = self.values
        depth = 2 * values["D"] if "D" in values else values.get("TILE_K") or values.get("GROUP")
        if not depth or not {"TILE_M", "TILE_N"} <= values.keys():
            return 0
        return values["TILE_M"] * values["TILE_N"] * depth * (2 if values.get("GATED") else 1)

    @property
    def key(self) -> str:
        """Equal for launches that are one compiled kernel."""
        return repr((self.kernel, self.signature, self.constants, self.attributes, self.options))


class _Driver:
    """Stands for a GPU's driver where launches are only looked at. Triton keeps what it compiled by the device: the target."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target.gpu

    def get_current_device(self) -> str:
        return self.target.name

    def get_current_stream(self, device: str) -> int:
        return 0


_KEPT = ("num_warps", "num_ctas", "num_stages")


@contextmanager
def capture(target: Target) -> Iterator[list[Launch]]:
    """Collect the kernels launched within, which are neither compiled nor run; the launchers get tensors of device meta."""
    launches: dict[str, Launch] = {}

    def hook(*, fn: Any, compile: Mapping[str, Any], **_: Any) -> bool:
        options = {name: compile[name] for name in _KEPT}
        jit = fn.jit_function
        launch = Launch(
            fn.name, jit, compile["signature"], compile["constants"], compile["configs"][0], options
        )
        launches.setdefault(launch.key, launch)
        return True  # Triton takes it as found, and launches nothing

    found: list[Launch] = []
    active = triton.runtime.driver
    before = active._active
    knobs = triton.knobs.runtime
    with mock.patch.object(configs, "card_of", return_value=target.card):
        active.set_active(_Driver(target))  # type: ignore[arg-type]
        hooked, knobs.jit_cache_hook = knobs.jit_cache_hook, hook
        try:
            yield found
        finally:
            knobs.jit_cache_hook = hooked
            active._active = before
    found += launches.values()


@dataclass(frozen=True)
class Figures:
    """What was read out of one compiled kernel."""

    kernel: str
    registers: int
    """Of a thread."""
    spills: int
    """Instructions that store registers to local memory or load them from there, and bytes of it."""
    shared: int
    """Bytes."""
    warps: int
    occupancy: float
    """Warps that fit on a multiprocessor at once, of those that it has room for."""
    matrix: str
    """The matrix instruction, as PTX calls it: mma, wgmma, tcgen05, mfma, or none."""
    widths: Mapping[str, Mapping[int, int]]
    """Global loads by what they read (`weights`, `other`), then by bytes of one thread's load: how many."""
    asynchronous: int
    """Copies from global to shared memory that no register waits for."""
    loop: Mapping[str, int]
    """Instructions of the inner loop by kind: the first innermost one with a matrix instruction, else the longest, else all."""
    per_matrix: float | None
    """Other instructions of the inner loop for each of its matrix instructions."""
    per_mma: float | None
    """The same, of all warps that run it, for each 2,048 multiply-adds of a tile: the work of one `mma` of 16 x 8 x 16."""
    stages: int
    in_flight: int | None
    """Groups of asynchronous copies that may be on their way when the inner loop waits for one; None without any."""

    @property
    def narrowest(self) -> int | None:
        """Bytes of the narrowest load of weights, or of keys and values."""
        return min(self.widths.get("weights", {}), default=None)


@dataclass(frozen=True)
class Code:
    """Instructions in order, and where each loop begins and ends (positions, both included)."""

    names: Sequence[str]
    loops: Sequence[tuple[int, int]] = field(default=())


_SASS = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_PENDING = re.compile(r"\s*SB0,\s*0x([0-9a-f]+)")
_GCN = re.compile(r"^\s+([a-z]\w+)\s*(.*)$")


def read_sass(text: str) -> Code:
    """The instructions of `cuobjdump -sass`; to a wait for copies the number that it leaves is added."""
    names: list[str] = []
    at: dict[int, int] = {}
    jumps: list[tuple[int, int]] = []
    for line in text.splitlines():
        if found := _SASS.match(line):
            address, name, rest = int(found[1], 16), found[2], found[3]
            at[address] = len(names)
            if name.startswith("BRA") and (goal := re.search(r"0x([0-9a-f]+)\s*$", rest.strip())):
                jumps.append((len(names), int(goal[1], 16)))
            if name == "DEPBAR.LE" and (pending := _PENDING.match(rest)):
                name += f".{int(pending[1], 16)}"
            names.append(name)
    loops = [(at[goal], here) for here, goal in jumps if goal in at and at[goal] < here]
    return Code(names, loops)


def read_gcn(text: str) -> Code:
    """The instructions of AMD's assembly."""
    names: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in text.splitlines():
        if label := re.match(r"^(\.L\w+):", line):
            labels[label[1]] = len(names)
        elif (found := _GCN.match(line)) and "_" in found[1]:
            goal = found[2].split(";")[0].strip()
            if "branch" in found[1] and goal in labels:
                loops.append((labels[goal], len(names)))
            names.append(found[1])
        if line.startswith(".Lfunc_end"):
            break
    return Code(names, loops)


_KINDS = (
    ("matrix", r"HMMA|IMMA|QMMA|OMMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA|v_mfma"),
    ("spill", r"LDL|STL|scratch_"),
    ("global load", r"LDG|UTMALDG|UBLKCP|global_load|buffer_load"),
    ("shared and tensor memory", r"LDS|STS|LDT|STT|ATOMS|UTCCP|ds_"),
    ("global store", r"STG|UTMASTG|RED|ATOM|global_store|buffer_store"),
    ("float", r"FFMA|FMUL|FADD|FMNMX|FSEL|FSETP|FCHK|HFMA2|HMUL2|HADD2|HMNMX2|MUFU|SHFL|FSWZADD|v_\w*_(b?f16|f32|f64)"),
    ("convert", r"F2F|F2I|I2F|I2I|F2FP|PRMT|I2FP|v_cvt|v_perm|v_pack"),
    ("control", r"U?BRA|U?BAR|DEPBAR|LDGDEPBAR|W?SYNC|WARP|BS|NOP|EXIT|FENCE|ELECT|VOTE|ERRBAR|MEMBAR|CCTL|UTCBAR|UTCATOM|CALL"),
    ("control", r"NANOSLEEP|RET|ARRIVES|UCGABAR|U?PLOP3|s_(waitcnt|barrier|c?branch|nop|endpgm|setprio)"),
    ("integer and address", r""),
)  # fmt: skip
_KIND = [(kind, re.compile(pattern)) for kind, pattern in _KINDS]


def kind_of(name: str) -> str:
    """What an instruction is counted as."""
    return next(kind for kind, pattern in _KIND if pattern.match(name))


def inner_loop(code: Code) -> Sequence[str]:
    """The instructions of the loop that matters; see `Figures.loop`."""
    spans = [code.names[first : last + 1] for first, last in code.loops]

    def multiplies(span: Sequence[str]) -> bool:
        return any(kind_of(name) == "matrix" for name in span)

    with_matrix = [loop for loop, span in zip(code.loops, spans, strict=True) if multiplies(span)]
    for first, last in sorted(with_matrix):
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in with_matrix):
            return code.names[first : last + 1]
    return max(spans, key=len, default=code.names)


def in_flight(loop: Sequence[str]) -> int | None:
    """See `Figures.in_flight`. Copies without registers report to scoreboard 0, if there are any."""
    if "LDGDEPBAR" not in loop:
        return None
    waits = [int(name.rpartition(".")[2]) for name in loop if re.fullmatch(r"DEPBAR\.LE\.\d+", name)]
    return min(waits, default=None)


# Loads, by source line. A thread's load or copy in PTX, and in AMD's assembly.
_PTX_LOAD = re.compile(r"\b(?:ld\.global|cp\.async\.c[ag]\.shared\.global)([\w.:]*)(.*)")
_PTX_TENSOR_COPY = re.compile(r"\bcp\.async\.bulk")
_GCN_LOAD = re.compile(r"\b(?:global|buffer)_load_(\w+)")
_GCN_BYTES = {
    "dwordx4": 16,
    "dwordx3": 12,
    "dwordx2": 8,
    "dword": 4,
    "ushort": 2,
    "short": 2,
    "ubyte": 1,
    "sbyte": 1,
    "u8": 1,
}
_LOC = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+)")
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?')
_WEIGHTS = re.compile(r"tl\.load\((?:w_at|up_at|[bkv]_(?:tail_)?at)|\bw\.load\(|_nibbles\(packed")
"""How kernels write a load of weights, or of keys and values; by a descriptor it counts as one of 16 bytes. What Triton loads
into registers a step ahead stands at the line that uses it."""


def _width(match: re.Match[str]) -> int:
    suffix, rest = match[1], match[2]
    if "cp.async" in match[0]:
        return int(rest.split(",")[2].strip(" ;"), 0)
    count = int(found[1]) if (found := re.search(r"\.v(\d)", suffix)) else 1
    return count * int(re.search(r"\.[busf](\d+)", suffix)[1]) // 8  # type: ignore[index]


def loads(assembly: str) -> tuple[dict[str, Counter[int]], int]:
    """Global loads by what they read and by width, and how many copies are asynchronous."""
    files: dict[str, str] = {}
    for line in assembly.splitlines():
        if found := _FILE.match(line):
            files[found[1]] = f"{found[2]}/{found[3]}" if found[3] else found[2]
    counts = {"weights": Counter[int](), "other": Counter[int]()}
    asynchronous, source = 0, ""
    for line in assembly.splitlines():
        if found := _LOC.match(line):
            source = linecache.getline(files.get(found[1], ""), int(found[2]))
        elif _PTX_TENSOR_COPY.search(line):
            asynchronous += 1
            counts["weights" if _WEIGHTS.search(source) else "other"][16] += 1
        else:
            width = 0
            if found := _PTX_LOAD.search(line):
                width = _width(found)
                asynchronous += "cp.async" in line
            elif found := _GCN_LOAD.search(line):
                width = next((size for name, size in _GCN_BYTES.items() if found[1].startswith(name)), 4)
            if width:
                counts["weights" if _WEIGHTS.search(source) else "other"][width] += 1
    return counts, asynchronous


def _matrix(names: Sequence[str], ptx: str) -> str:
    if any(name.startswith("v_mfma") for name in names):
        return "mfma"
    found = {name.split(".")[0] for name in names if kind_of(name) == "matrix"}
    if any(name.startswith("UTC") for name in found):
        return "tcgen05"
    if found & {"HGMMA", "IGMMA", "QGMMA"}:
        return "wgmma"
    return "mma" if found else "none"


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _sass(cubin: bytes) -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        asked = [[_tool("cuobjdump"), option, file.name] for option in ("-sass", "-res-usage")]
        text, usage = (
            subprocess.run(command, check=True, capture_output=True, text=True).stdout for command in asked
        )
    return text, usage


def occupancy(target: Target, registers: int, shared: int, warps: int) -> float:
    """Share of a multiprocessor's warps that can be there at once, by registers, shared memory and programs."""
    wave = target.gpu.warp_size
    step, file = (8 * wave, 65536) if target.is_cuda else (8 * wave, 512 * wave * 4)
    of_warp = -(-registers * wave // step) * step
    by_registers = file // of_warp // warps if of_warp else target.programs
    reserved = 1024 if target.is_cuda else 0
    by_shared = target.shared_all // (shared + reserved) if shared + reserved else target.programs
    return min(by_registers, by_shared, target.programs, target.warps // warps) * warps / target.warps


def build(launch: Launch, target: Target) -> Figures:
    """Compile a launch and read the result."""
    source = ASTSource(launch.fn, launch.signature, launch.constants, launch.attributes)
    # Triton keeps what it compiled without regard to line numbers, by which loads are told apart here.
    with mock.patch.object(triton.knobs.compilation, "always_compile", True):
        compiled = triton.compile(source, target=target.gpu, options=dict(launch.options))
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    if target.is_cuda:
        text, usage = _sass(compiled.asm["cubin"])
        code = read_sass(text)
        registers = int(re.search(r"REG:(\d+)", usage)[1])  # type: ignore[index]
        local = int(re.search(r"LOCAL:(\d+)", usage)[1]) + int(re.search(r"STACK:(\d+)", usage)[1])  # type: ignore[index]
        spills = local + sum(kind_of(name) == "spill" for name in code.names)
        assembly = compiled.asm["ptx"]
    else:
        assembly = compiled.asm["amdgcn"]
        code = read_gcn(assembly)
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1])  # type: ignore[index]
        spills = sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", assembly)))
    names = inner_loop(code)
    loop = Counter(map(kind_of, names))
    others, work = loop.total() - loop["matrix"], launch.multiply_adds / 2048
    widths, asynchronous = loads(assembly)
    return Figures(
        kernel=launch.kernel.rpartition(".")[2],
        registers=registers,
        spills=spills,
        shared=shared,
        warps=warps,
        occupancy=occupancy(target, registers, shared, warps),
        matrix=_matrix(code.names, assembly),
        widths={name: dict(sorted(counts.items())) for name, counts in widths.items() if counts},
        asynchronous=asynchronous,
        loop=dict(loop),
        per_matrix=others / loop["matrix"] if loop["matrix"] else None,
        per_mma=others * launch.options["num_warps"] / work if loop["matrix"] and work else None,
        stages=launch.options["num_stages"],
        in_flight=in_flight(names),
    )
