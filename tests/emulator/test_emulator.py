"""The emulator itself: strict where a GPU is lenient, and its numbers those of PTX."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.emulator.formats import numbers, raw
from tests.emulator.launch import execute
from tests.emulator.memory import PtxError, Unsupported
from tests.emulator.ptx import Module

PROGRAM = """
.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry kernel(.param .u64 .ptr .global .align 1 x, .param .u64 .ptr .global .align 1 out)
{
    .reg .pred %p<4>;
    .reg .b32 %r<20>;
    .reg .b64 %rd<10>;
    ld.param.u64 %rd1, [x];
    ld.param.u64 %rd2, [out];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    shl.b32 %r2, %r1, 2;
    mov.u32 %r3, memory;
    add.s32 %r4, %r3, %r2;       // this thread's word of shared memory
    xor.b32 %r5, %r2, 128;
    add.s32 %r6, %r3, %r5;       // that of a thread of another warp
    BODY
    st.global.u32 [%rd5], %r7;
    ret;
}
"""


def run(body: str, **how: object) -> Tensor:
    """What `body` leaves in %r7, for 64 threads, where x is 0, 1, ..."""
    x, out = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    execute(Module(PROGRAM.replace("BODY", body)), (1,), 2, [x, out], 256, **how)  # type: ignore[arg-type]
    return out


@pytest.mark.parametrize("seed", range(4))
def test_a_missing_barrier_is_a_race_in_every_order(seed: int) -> None:
    body = "st.shared.u32 [%r4], %r1; BARRIER ld.shared.u32 %r7, [%r6];"
    found = run(body.replace("BARRIER", "bar.sync 0;"), one_by_one=True, seed=seed)
    assert found.tolist() == [i ^ 32 for i in range(64)]
    with pytest.raises(PtxError, match="race"):
        run(body.replace("BARRIER", ""), one_by_one=True, seed=seed)


def test_a_missing_barrier_before_the_next_write_is_a_race() -> None:
    body = "st.shared.u32 [%r4], %r1; bar.sync 0; ld.shared.u32 %r7, [%r6]; BARRIER st.shared.u32 [%r4], 99;"
    run(body.replace("BARRIER", "bar.sync 0;"), one_by_one=True)
    with pytest.raises(PtxError, match="race"):
        run(body.replace("BARRIER", ""), one_by_one=True)


def test_an_asynchronous_copy_lands_when_it_is_waited_for() -> None:
    copy = "st.shared.u32 [%r4], 5; cp.async.ca.shared.global [%r4], [%rd4], 4, SIZE; cp.async.commit_group;"
    whole, nothing, part = (copy.replace("SIZE", size) for size in ("4", "0", "2"))
    read = "ld.shared.u32 %r7, [%r4];"
    assert run(f"{whole} cp.async.wait_group 0; {read}").tolist() == list(range(64))
    assert run(f"{nothing} cp.async.wait_group 0; {read}").tolist() == [0] * 64
    assert run(f"{part} cp.async.wait_all; {read}").tolist() == list(range(64))
    assert run(f"{whole} {read}").view(torch.float32).isnan().all()
    assert run(f"{whole} cp.async.wait_group 1; {read}").view(torch.float32).isnan().all()


def test_what_was_never_written_is_nan() -> None:
    assert run("ld.shared.u32 %r7, [%r4];").view(torch.float32).isnan().all()
    assert run("mov.u32 %r7, %r19;").view(torch.float32).isnan().all()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.u32 %r7, [%rd4+256];", "out of bounds"),
        ("ld.global.u32 %r7, [%rd4+-4];", "out of bounds"),
        ("ld.global.u32 %r7, [%rd4+2];", "misaligned"),
        ("ld.global.v2.u32 {%r7, %r8}, [%rd4];", "misaligned"),
        ("ld.shared.u32 %r7, [%r4+16];", "out of bounds"),
        ("setp.lt.u32 %p1, %r1, 5; @%p1 bar.sync 0;", "divergent"),
        ("LOOP: bra LOOP;", "endless"),
        ("trap;", "assertion"),
    ],
)
def test_what_a_program_must_not_do(body: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        run(body, limit=1000)


def test_what_the_emulator_cannot_do_is_no_fault_of_the_program() -> None:
    with pytest.raises(Unsupported, match="wgmma"):
        run("wgmma.fence.sync.aligned;")
    assert not issubclass(Unsupported, PtxError)


def test_lanes_part_and_meet() -> None:
    body = """
        mov.u32 %r7, 0;
        setp.lt.u32 %p1, %r1, 5;
        @!%p1 bra ELSE;
        add.s32 %r7, %r7, 10;
        bra JOIN;
        ELSE: add.s32 %r7, %r7, 20;
        JOIN: add.s32 %r7, %r7, %r1;
        setp.eq.s32 %p2, %r1, 63;
        @%p2 ret;
    """
    assert run(body).tolist() == [i + (10 if i < 5 else 20) for i in range(63)] + [0]


def test_bytes_bits_and_shuffles() -> None:
    assert run("prmt.b32 %r7, 0x33221100, 0x77665584, 0x3C40;").tolist() == [0x33FF8400] * 64
    assert run("lop3.b32 %r7, 0xF0, 0xCC, 0xAA, 0x96;").tolist() == [0xF0 ^ 0xCC ^ 0xAA] * 64
    assert run("shfl.sync.bfly.b32 %r7, %r1, 16, 31, -1;").tolist() == [i ^ 16 for i in range(64)]
    assert run("shfl.sync.up.b32 %r7, %r1, 1, 0, -1;").tolist() == [
        max(i - 1, i // 32 * 32) for i in range(64)
    ]
    assert run("bfe.s32 %r7, 0xF0, 4, 4;").tolist() == [-1] * 64
    assert run("shf.l.wrap.b32 %r7, 0x80000000, 1, 1;").tolist() == [3] * 64
    assert run("div.s32 %r7, -7, 2;").tolist() == [-3] * 64
    assert run("rem.s32 %r7, -7, 2;").tolist() == [-1] * 64
    assert run("mul.hi.u32 %r7, 0x80000000, 6;").tolist() == [3] * 64


@pytest.mark.parametrize(
    ("kind", "dtype", "width"),
    [("bf16", torch.bfloat16, 16), ("e4m3", torch.float8_e4m3fn, 8), ("e5m2", torch.float8_e5m2, 8)],
)
def test_small_floats(kind: str, dtype: torch.dtype, width: int) -> None:
    """Every one there and back, and rounding between them as torch does."""
    stored = {8: torch.uint8, 16: torch.uint16}[width]
    bits = np.arange(2**width, dtype=f"uint{width}")
    values = numbers(bits, kind)
    assert np.array_equal(values, torch.from_numpy(bits).view(dtype).float().numpy(), equal_nan=True)
    finite = np.isfinite(values)
    assert np.array_equal(raw(values[finite], kind), bits[finite])
    random = torch.randn(4096) * torch.tensor(10.0).pow(torch.randint(-6, 3, (4096,)))
    clipped = random.clamp(-448, 448)
    assert np.array_equal(raw(clipped.numpy(), kind), clipped.to(dtype).view(stored).numpy())


def test_a_float64_is_rounded_once() -> None:
    """1 + 2^-8 + 2^-40 is a little more than half way to the next bfloat16; as float32 it would be a tie, which goes down."""
    assert raw(np.array([1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8]), "bf16").tolist() == [0x3F81, 0x3F80]
