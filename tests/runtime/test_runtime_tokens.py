"""The order of image tokens: stated as a sort, checked on odd grids, undone in every output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flux_model import Flux, build, denoise, error, grid_ids, inputs, small
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import chipmunk
from chipmunk.config import Patchify
from chipmunk.runtime.token_order import TokenOrder, find_grid, find_order, patch_order

EVERYTHING = small(mlp__top_keys=1.0, attn__top_keys=1.0)
CPU = torch.device("cpu")


@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from([1, 2, 3, 8]), st.sampled_from([1, 2, 4]))
def test_patch_order(height: int, width: int, outer: int, inner: int) -> None:
    def key(index: int) -> tuple[int, ...]:
        r, c = divmod(index, width)
        return r // outer, c // outer, r % outer // inner, c % outer // inner, r, c

    assert patch_order(height, width, outer, inner).tolist() == sorted(range(height * width), key=key)


def test_patch_order_by_hand() -> None:
    assert patch_order(3, 4, 2, 1).tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 10, 11]
    assert patch_order(5, 3, 1, 1).tolist() == list(range(15))


def test_consecutive_tokens_fill_a_patch() -> None:
    order = patch_order(16, 16, 8, 4)
    for patch in order.reshape(16, 16):
        rows, columns = patch // 16, patch % 16
        assert int(rows.max() - rows.min()) == 3
        assert int(columns.max() - columns.min()) == 3


def four_columns(ids: Tensor) -> Tensor:
    return torch.cat((ids, torch.zeros(len(ids), 1)), dim=1)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (grid_ids(3, 5), (3, 5)),
        (grid_ids(3, 5)[None].expand(2, -1, -1), (3, 5)),
        (four_columns(grid_ids(3, 5)), (3, 5)),
        (grid_ids(3, 5) + torch.tensor([0, 10, 20]), (3, 5)),
        (four_columns(grid_ids(30, 50).float() * torch.tensor(1.1, dtype=torch.float32)), (30, 50)),  # as FLUX.3 scales
        (grid_ids(3, 5) * torch.tensor([1, 2, 3]), (3, 5)),
        (grid_ids(1, 5), (1, 5)),
        (grid_ids(5, 1), (5, 1)),
        (torch.cat((grid_ids(3, 5), grid_ids(2, 2, image=1))), (3, 5)),
        (torch.cat((grid_ids(3, 5), grid_ids(3, 5))), (3, 5)),  # a reference with the image's own ids
        (torch.cat((grid_ids(3, 5), grid_ids(2, 2) + torch.tensor([0, 0, 5]))), "the ids are not a grid"),
        (grid_ids(3, 5)[:-1], "the ids are not a grid"),
        (grid_ids(3, 5)[torch.randperm(15, generator=torch.Generator().manual_seed(0))], "the ids are not a grid"),
        (grid_ids(4, 5)[[*range(10), *range(15, 20)]], "the ids are not a grid"),  # a row is left out
        (grid_ids(5, 3)[:, [0, 2, 1]], "the ids are not a grid"),
        (torch.stack((grid_ids(3, 5), grid_ids(3, 5) + 1)), "the ids differ between batch elements"),
        (grid_ids(3, 5)[:, 1:], "the ids are not (tokens, axes) with three axes or more"),
        (torch.zeros(15), "the ids are not (tokens, axes) with three axes or more"),
    ],
)
def test_find_grid(ids: Tensor, expected: tuple[int, int] | str) -> None:
    found = find_grid(ids)
    if expected == "the ids are not a grid" and isinstance(found, tuple):
        pytest.fail(f"took it for a grid of {found}")
    assert found == expected


def test_all_ids_equal_is_a_grid_of_one_token_and_moves_nothing() -> None:
    assert find_order(torch.zeros(15, 3), 15, Patchify(), CPU)[0] is None


def test_reference_tokens_keep_their_place() -> None:
    ids = torch.cat((grid_ids(10, 10), grid_ids(4, 4)))
    order, what = find_order(ids, 116, Patchify(), CPU)
    assert what == "reordered"
    assert order is not None
    assert order.image_tokens == 100
    assert order.order[100:].tolist() == list(range(100, 116))
    assert sorted(order.order.tolist()) == list(range(116))


@pytest.mark.parametrize("rows", [100, 104, 116, 120])
def test_undo_takes_outputs_with_and_without_reference_tokens(rows: int) -> None:
    order, _ = find_order(torch.cat((grid_ids(10, 10), grid_ids(4, 4))), 116, Patchify(), CPU)
    assert order is not None
    x = torch.arange(2 * 120 * 3).reshape(2, 120, 3)
    moved = torch.cat((order.apply(x[:, :116], "reference"), x[:, 116:]), dim=1)
    assert not torch.equal(moved, x)
    assert torch.equal(order.undo(moved[:, :rows], "reference"), x[:, :rows])


def run(model: Any, given: dict[str, Tensor]) -> str:
    """Everything kept, so equal to dense; says what happened to the order."""
    with torch.no_grad():
        chipmunk.disable(model)
        dense = denoise(model, 9, **given)
        chipmunk.enable(model, EVERYTHING)
        assert error(denoise(model, 9, **given), dense) < 1e-5
    (what,) = chipmunk.statistics(model).token_order
    return what


@pytest.mark.parametrize("two_dimensional", [False, True])
def test_model_with_reordered_tokens(two_dimensional: bool) -> None:
    given = inputs(9, 13)
    if two_dimensional:
        given.update(img_ids=given["img_ids"][0], txt_ids=given["txt_ids"][0])
    assert run(build(), given) == "reordered"


@pytest.mark.parametrize("image", [0, 1])
def test_model_with_reference_image(image: int) -> None:
    given = inputs(9, 7)
    given["img_ids"] = torch.cat((grid_ids(9, 7), grid_ids(4, 5, image)))[None]
    given["img"] = torch.randn(1, 83, 4, generator=torch.Generator().manual_seed(2))
    assert run(build(), given) == "reordered"


def test_ids_that_differ_between_batch_elements_move_nothing() -> None:
    given = inputs(8, 8, batch=2)
    given["img_ids"] = torch.stack((grid_ids(8, 8), grid_ids(8, 8) + torch.tensor([0, 3, 0])))
    assert run(build(), given) == "kept: the ids differ between batch elements"


@pytest.mark.parametrize("where", ["single_blocks.1", "double_blocks.0.img_mlp", "out", "everywhere"])
def test_a_hook_sees_the_tokens_where_they_lay(where: str) -> None:
    """What it keeps is for code that takes rows for places in the picture: an attention map, features."""
    model, seen, on = build(), [], False

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.extend(x.clone() for x in args[:1] if on)

    if where == "everywhere":
        handle = nn.modules.module.register_module_forward_pre_hook(hook)
    else:
        handle = model.get_submodule(where).register_forward_pre_hook(hook)
    kept = f"kept: a hook of {'all modules' if where == 'everywhere' else where} may read its tokens"
    try:
        assert run(model, inputs(9, 13)) == kept
        with torch.no_grad():
            on = True
            denoise(model, 9, **inputs(9, 13))
            given, seen = seen, []
            chipmunk.disable(model)
            denoise(model, 9, **inputs(9, 13))
    finally:
        handle.remove()
    assert len(seen) == len(given) > 0
    assert max(error(got, was) for got, was in zip(given, seen, strict=True)) < 1e-5
    assert run(model, inputs(9, 13)) == "reordered"


def test_hooks_of_the_model_itself_and_of_torch_do_not_matter() -> None:
    model = build()
    model.register_forward_hook(lambda module, args, result: None)
    torch.nn.utils.spectral_norm(model.out)
    assert len(model.out._forward_pre_hooks) == 1
    assert run(model, inputs(9, 13)) == "reordered"


def test_patchify_off() -> None:
    model = build()
    chipmunk.enable(model, small(patchify__is_enabled=False))
    with torch.no_grad():
        denoise(model, 9, **inputs())
    assert chipmunk.statistics(model).token_order == {"kept: patchify is not enabled": 1}


def test_order_is_found_once_for_each_generation_and_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    from chipmunk.runtime import token_order

    calls, original = [], token_order.find_grid
    monkeypatch.setattr(token_order, "find_grid", lambda ids: calls.append(ids.shape) or original(ids))
    model = build()
    chipmunk.enable(model, small())
    with torch.no_grad():
        denoise(model, 9, **inputs())
        assert len(calls) == 1
        denoise(model, 9, **inputs(6, 7))
    assert len(calls) == 2


class TupleFlux(Flux):
    @chipmunk.model_forward(double="double_blocks", single="single_blocks", image="img", ids="img_ids")
    def forward(self, img: Tensor, img_ids: Tensor, **rest: Any) -> Any:
        inner = Flux.forward.__wrapped__  # type: ignore[attr-defined]
        return inner(self, img, img_ids, **rest), {"info": 1}


class PictureFlux(Flux):
    """Its output is not rows of tokens."""

    @chipmunk.model_forward(double="double_blocks", single="single_blocks", image="img", ids="img_ids")
    def forward(self, img: Tensor, img_ids: Tensor, **rest: Any) -> Any:
        inner = Flux.forward.__wrapped__  # type: ignore[attr-defined]
        return inner(self, img, img_ids, **rest).transpose(1, 2)


def call_every_step(model: Any, given: dict[str, Tensor], steps: int = 9) -> list[Any]:
    with torch.no_grad():
        return [
            model(**given, timesteps=torch.full((1,), 1 - step / 20)) for step in chipmunk.steps(model, range(steps))
        ]


def test_tuple_outputs() -> None:
    model, given = build(kind=TupleFlux), inputs()
    dense = call_every_step(model, given)
    chipmunk.enable(model, EVERYTHING)
    got = call_every_step(model, given)
    assert error([out for out, _ in got], [out for out, _ in dense]) < 1e-5
    assert all(info == {"info": 1} for _, info in got)


def test_an_output_that_is_not_tokens_is_computed_again_without_reordering() -> None:
    model, given = build(kind=PictureFlux), inputs()
    dense = call_every_step(model, given)
    chipmunk.enable(model, EVERYTHING)
    assert error(call_every_step(model, given), dense) < 1e-5
    statistics = chipmunk.statistics(model)
    assert statistics.token_order == {"reordered": 1, "kept: the model's output is not (B, tokens, …)": 1}
    assert statistics.layers[2].attention["main"].sparse == 7


class ResidualFlux(Flux):
    """Adds one residual a token, as from a ControlNet."""

    @chipmunk.model_forward(double="double_blocks", single="single_blocks", image="img", ids="img_ids")
    def forward(self, img: Tensor, img_ids: Tensor, residuals: Any, **rest: Any) -> Any:
        inner = Flux.forward.__wrapped__  # type: ignore[attr-defined]
        if isinstance(residuals, dict):
            residuals = [*residuals.values()]
        return inner(self, img + (residuals if isinstance(residuals, Tensor) else residuals[0]), img_ids, **rest)


@pytest.mark.parametrize("container", ["tensor", "list", "dict"])
def test_other_inputs_by_token_forbid_reordering(container: str) -> None:
    model, given = build(kind=ResidualFlux), inputs()
    residual = torch.randn(1, 63, 4, generator=torch.Generator().manual_seed(3))
    residuals = {"tensor": residual, "list": [residual], "dict": {"first": residual}}
    given["residuals"] = residuals[container]  # type: ignore[assignment]
    dense = call_every_step(model, given)
    chipmunk.enable(model, EVERYTHING)
    assert error(call_every_step(model, given), dense) < 1e-5
    what = "kept: another input belongs to the image tokens one by one"
    assert chipmunk.statistics(model).token_order == {what: 1}


@pytest.mark.parametrize(
    ("shape", "dtype", "moves"),
    [
        ((1, 63, 4), torch.float32, True),
        ((1, 5, 63, 4), torch.float32, True),
        ((2, 63), torch.float32, True),
        ((1, 70, 70), torch.float32, True),
        ((1, 1, 70, 70), torch.float32, True),
        ((1, 1, 1, 70), torch.bool, True),
        ((1, 70), torch.bool, True),
        ((1, 62, 4), torch.float32, False),
        ((63,), torch.float32, False),
        ((1, 19, 63), torch.float32, False),  # text as wide as the image has tokens
        ((1, 100, 4096), torch.float32, False),  # more text than image
        ((63, 19, 4), torch.float32, False),  # a batch of 63
        ((1, 62), torch.bool, False),
    ],
)
def test_which_inputs_belong_to_the_image_tokens(shape: tuple[int, ...], dtype: torch.dtype, moves: bool) -> None:
    from chipmunk.runtime.call_order import _has_rows_for

    assert _has_rows_for(torch.zeros(shape, dtype=dtype), 63) == moves


def test_token_order_applies_to_2d_and_3d_ids() -> None:
    order = TokenOrder(torch.tensor([2, 0, 1]), 3)
    ids = grid_ids(1, 3)
    assert torch.equal(order.apply_to_ids(ids), ids[[2, 0, 1]])
    assert torch.equal(order.apply_to_ids(ids[None]), ids[None, [2, 0, 1]])
