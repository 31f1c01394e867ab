"""How weights are rounded: against plain definitions, on inputs that make a difference."""

import pytest
import torch

from pagemill.quantize.search import (
    Inputs,
    Rounded,
    relative_error,
    round_inputs,
    round_int4,
    round_rows,
    search,
)


def correlated(rows, columns, seed=0):
    """Inputs whose columns move together, as hidden states do."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns // 4, columns, generator=random)
    return torch.randn(rows, columns // 4, generator=random) @ mix + 0.1 * torch.randn(
        rows, columns, generator=random
    )


def gathered(x, products=False, pages=3):
    inputs = Inputs(x.shape[1], torch.zeros(x.shape[1], x.shape[1]) if products else None)
    for page in x.chunk(pages):
        inputs.add(page, len(page) / len(x))
    return inputs


def test_inputs_count_every_row_and_keep_some_of_every_page():
    x = torch.cat([torch.full((5000, 4), float(page)) for page in range(1, 4)])
    x[777, 2] = -50.0
    inputs = gathered(x, products=True)
    assert inputs.count == 15000
    assert inputs.highest.tolist() == [3.0, 3.0, 50.0, 3.0]
    torch.testing.assert_close(inputs.mean_abs, x.abs().mean(0))
    assert len(inputs.sample) <= 1024
    pages = inputs.sample[:, 0].unique(return_counts=True)
    assert pages[0].tolist() == [1.0, 2.0, 3.0]
    assert pages[1].min() > 300
    few = gathered(x[::1000], products=True)
    torch.testing.assert_close(few.sample, x[::1000])
    torch.testing.assert_close(few.products, x[::1000].T @ x[::1000])


@pytest.mark.parametrize("group", [32, 64])
def test_int4_is_the_nearest_code_of_a_stored_scale(group):
    w = torch.randn(7, 128)
    w[3, 32:64] = 0.0
    w[4] = w[4].abs()
    rounded = round_int4(w, group)
    assert rounded.q.max() <= 15
    assert torch.equal(rounded.scales, rounded.scales.to(torch.bfloat16).float())
    scales, zeros = (t.float().repeat_interleave(group, 1) for t in (rounded.scales, rounded.zeros))
    codes = torch.arange(16.0)[:, None, None]
    nearest = ((codes - zeros) * scales - w).abs().amin(0)
    torch.testing.assert_close((rounded.weight() - w).abs(), nearest, rtol=1e-3, atol=1e-6)
    assert not rounded.weight()[3, 32:64].any()


def test_inputs_that_do_not_move_together_leave_nothing_to_make_up_for():
    w = torch.randn(9, 64)
    plain, made_up = round_int4(w, 32), round_int4(w, 32, 3.0 * torch.eye(64))
    assert torch.equal(plain.q, made_up.q)
    assert torch.equal(plain.scales, made_up.scales)


def test_errors_are_made_up_for_on_inputs_that_were_not_seen():
    x, w = correlated(3000, 128), torch.randn(40, 128)
    inputs = gathered(x[:2000], products=True)
    nearest, made_up = round_int4(w, 32), round_int4(w, 32, inputs.products)
    new = x[2000:]
    errors = [relative_error(new, w, r.weight(), "int4") for r in (nearest, made_up)]
    assert errors[1] < 0.6 * errors[0]


def test_products_of_fewer_rows_than_columns_are_no_obstacle():
    x = torch.randn(5, 64)
    x[:, 7] = 0.0
    rounded = round_int4(torch.randn(3, 64), 32, x.T @ x)
    assert rounded.weight().isfinite().all()


@pytest.mark.parametrize(("scheme", "step"), [("int8", 1 / 254), ("fp8", 1 / 16)])
def test_rows_are_rounded_to_8_bits(scheme, step):
    w = torch.randn(6, 50)
    w[2] = 0.0
    rounded = round_rows(w, scheme)
    off = (rounded.weight() - w).abs()
    limit = w.abs().amax(1, keepdim=True) if scheme == "int8" else w.abs().clamp_min(1e-3)
    assert (off <= 1.01 * step * limit + 1e-12).all()
    assert torch.equal(rounded.scales, rounded.scales.to(torch.bfloat16).float())


def test_inputs_are_rounded_a_token_at_a_time():
    x = torch.tensor([[1.0, -127.0, 0.4], [0.0, 0.0, 0.0], [1e-3, 5e-4, -1e-3]])
    torch.testing.assert_close(round_inputs(x, "int8")[0], torch.tensor([1.0, -127.0, 0.0]))
    assert not round_inputs(x, "int8")[1].any()
    assert round_inputs(x, "fp8").isfinite().all()
    assert round_inputs(x, "int4") is x


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_factors_lower_the_error_where_a_column_stands_out(scheme):
    x = torch.randn(500, 64)
    x[:, 5] *= 60.0
    w = [torch.randn(32, 64), torch.randn(16, 64)]
    inputs = gathered(x)
    s, error, without = search(inputs, w, scheme, 32)
    assert error < 0.5 * without
    # What was found is what there is.
    there = [round_rows(v * s, scheme) if scheme == "int8" else None for v in w]
    if scheme == "int8":
        fed = round_inputs(inputs.sample / s, scheme)
        wanted = [inputs.sample @ v.T for v in w]
        off = sum(
            (fed @ r.weight().T - y).square().sum()
            for r, y in zip(there, wanted, strict=True)
            if r is not None
        )
        assert (off / sum(y.square().sum() for y in wanted)).item() == pytest.approx(error, rel=1e-4)


def test_no_factors_are_taken_where_they_do_not_help():
    inputs = gathered(torch.ones(20, 32))
    s, error, without = search(inputs, [torch.ones(4, 32)], "int8", 32)
    assert error <= without
    assert torch.equal(s, torch.ones(32))


def test_a_rounded_weight_is_what_its_parts_say():
    q = torch.tensor([[0, 15, 8, 3]], dtype=torch.uint8)
    rounded = Rounded("int4", q, torch.tensor([[0.5, 2.0]]), torch.tensor([[8, 0]], dtype=torch.uint8), 2)
    assert rounded.weight().tolist() == [[-4.0, 3.5, 16.0, 6.0]]
