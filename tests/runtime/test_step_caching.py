"""Step caching: which steps are skipped, what takes the place of the blocks, and that nothing else changes."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import flux_model
import pytest
import torch
from flux_model import Flux, denoise, error, inputs, same, small
from torch import Tensor, nn
from torch._dynamo.utils import counters

import chipmunk
from chipmunk.bench.model_calls import model_calls
from chipmunk.runtime.step_caching import NO_PLACE, UPSTREAM_SCHEDULE, scaled

pytestmark = pytest.mark.usefixtures("no_gradients")

DENSE = {"attn": {"is_enabled": False}, "mlp": {"is_enabled": False}}


def build(kind: type[Flux] = Flux) -> Flux:
    """Two blocks of each kind, whose predictions change slowly."""
    model = flux_model.build(0, kind, double=2, single=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.7)
    return model


def caching(**keys: Any) -> dict[str, Any]:
    return {"step_caching": {"is_enabled": True, **keys}}


def enabled(config: dict[str, Any], kind: type[Flux] = Flux) -> Flux:
    model = build(kind)
    chipmunk.enable(model, config)
    return model


def skipped(model: Any, slot: str = "main") -> tuple[int, ...]:
    return chipmunk.statistics(model).skipped_steps[slot]


def dense(steps: int, **given: Tensor) -> list[Tensor]:
    model = build()
    chipmunk.disable(model)
    return denoise(model, steps, **given)


# What the model then computes.


@pytest.mark.parametrize("config", [small(), DENSE], ids=["sparse", "nothing sparse"])
def test_a_threshold_of_zero_skips_nothing(config: dict[str, Any]) -> None:
    given, model = inputs(), enabled({**config, **caching(threshold=0)})
    assert same(denoise(model, 12, **given), denoise(enabled(config), 12, **given))
    assert skipped(model) == ()


@pytest.mark.parametrize("extrapolation", [None, 0])
def test_the_static_schedule_equals_a_plain_statement_of_it(extrapolation: int | None) -> None:
    given, steps = inputs(batch=2), 28
    model = enabled({**DENSE, **caching(mode="static", extrapolation=extrapolation)})
    got = denoise(model, steps, **given)
    listed = scaled(UPSTREAM_SCHEDULE, 50, steps)
    assert set(skipped(model)) == listed

    plain, times, img = build(), torch.linspace(1, 0, steps + 1).tolist(), given["img"]
    chipmunk.disable(plain)
    state: dict[str, Tensor] = {}
    plain.double_blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: state.update(before=kwargs["img"]), with_kwargs=True
    )
    plain.out.register_forward_pre_hook(lambda module, args: state.update(hidden=args[0]))
    for step, (now, then) in enumerate(itertools.pairwise(times)):
        entering = plain.img_in(img)
        if step not in listed:
            expected = plain(**{**given, "img": img}, timesteps=torch.full((2,), now))
            last = dict(state)
        elif extrapolation is None:
            expected = plain.out(last["hidden"])
        else:
            expected = plain.out(entering + (last["hidden"] - last["before"]))
        torch.testing.assert_close(got[step], expected, rtol=1e-5, atol=1e-6)
        img = img + (then - now) * expected


def test_adaptive_is_better_than_static_at_equal_cost() -> None:
    given, steps = inputs(), 50
    truth = dense(steps, **given)

    def off(**keys: Any) -> float:
        model = enabled({**DENSE, **caching(**keys)})
        got = denoise(model, steps, **given)
        assert len(skipped(model)) >= 25
        return error(got, truth)

    static = off(mode="static")
    assert off(keep=0.5) < static / 4
    assert off(threshold=0.02) < static / 4


def test_it_composes_with_sparse_layers() -> None:
    given = inputs()
    model = enabled({**small(), **caching(keep=0.6)})
    got = denoise(model, 20, **given)
    assert error(got, dense(20, **given)) < 0.3
    assert skipped(model)
    counted = chipmunk.statistics(model).layers[2]
    assert counted.attention["main"].sparse > 3
    assert counted.attention["main"].total == counted.mlp["main"].total == 20 - len(skipped(model))


def test_a_full_step_that_is_skipped_is_made_up_for() -> None:
    skips = caching(skip_step_schedule=[10, 11, 20])
    model = enabled({**small(), **skips, "steps": 30})
    denoise(model, 30, **inputs())
    # 0, 1, 12 for 10, 21 for 20; MLPs have no 1
    assert chipmunk.statistics(model).layers[2].attention["main"].full == 4
    assert chipmunk.statistics(model).layers[2].mlp["main"].full == 3


def test_the_second_image_is_as_the_first() -> None:
    model, given = enabled({**small(), **caching(threshold=0.5)}), inputs()
    first = denoise(model, 16, **given)
    assert skipped(model)
    other = denoise(model, 11, **inputs(6, 5, seed=3))
    assert same(first, denoise(model, 16, **given))
    assert same(other, denoise(enabled({**small(), **caching(threshold=0.5)}), 11, **inputs(6, 5, seed=3)))


def test_slots_have_steps_of_their_own() -> None:
    config = {**DENSE, **caching(keep=0.5, max_consecutive=1)}
    first, second, steps = inputs(), inputs(seed=4), 16

    def call(model: Any, given: dict[str, Tensor], step: int) -> Tensor:
        out: Tensor = model(**given, timesteps=torch.full((1,), 1 - step / steps))
        return out

    model = enabled(config)
    both = []
    for step in chipmunk.steps(model, range(steps)):
        both.append(call(model, first, step))
        if step >= 5:
            both.append(call(chipmunk.slot(model, "other"), second, step))
    lists = skipped(model), skipped(model, "other")
    assert lists[0]
    assert lists[1]
    assert min(lists[1]) >= 7  # two steps have to be known for a line

    alone = enabled(config)
    expected = [call(alone, first, step) for step in chipmunk.steps(alone, range(steps))]
    assert same(both[:5] + both[5::2], expected)


def test_caches_are_freed_at_break_and_the_next_image_starts_clean() -> None:
    model, given = enabled({**DENSE, **caching(keep=0.5)}), inputs()
    for step in chipmunk.steps(model, range(20)):
        model(**given, timesteps=torch.full((1,), 1 - step / 20))
        if step == 9:
            assert chipmunk.statistics(model).cache_bytes > 0
            break
    assert chipmunk.statistics(model).cache_bytes == 0
    assert chipmunk.statistics(model).peak_cache_bytes > 0
    assert "_chipmunk_step" not in model.__dict__
    fresh = enabled({**DENSE, **caching(keep=0.5)})
    assert same(denoise(model, 12, **given), denoise(fresh, 12, **given))


def test_a_loop_of_unknown_length_uses_the_schedule_as_it_is_written() -> None:
    model, given = enabled({**DENSE, **caching(mode="static")}), inputs()
    for step in chipmunk.steps(model, (step for step in range(12))):
        model(**given, timesteps=torch.full((1,), 1 - step / 20))
    assert skipped(model) == (7, 11)


def test_short_loops_skip_nothing() -> None:
    model, given = enabled({**small(), **caching(keep=0.2), "min_steps": 8}), inputs()
    assert same(denoise(model, 7, **given), dense(7, **given))
    assert chipmunk.statistics(model).skipped_model_calls == 0


def test_a_change_of_shape_starts_over() -> None:
    model = enabled({**DENSE, **caching(skip_step_schedule=[3, 4, 5]), "steps": 12})
    for step in chipmunk.steps(model, range(12)):
        given = inputs() if step < 4 else inputs(6, 5)
        out = model(**given, timesteps=torch.full((1,), 1 - step / 20))
        assert out.shape[1] == given["img"].shape[1]
    assert skipped(model) == (3, 5)  # step 4 had nothing to use again


def test_inference_mode_and_reference_tokens() -> None:
    given = inputs()
    given["img"] = torch.cat((given["img"], torch.randn(1, 12, 4)), dim=1)
    given["img_ids"] = torch.cat((given["img_ids"], flux_model.grid_ids(4, 3, 1)[None]), dim=1)
    config = {**small(), **caching(keep=0.5)}
    with torch.inference_mode():
        got = denoise(enabled(config), 16, **given)
    assert same(got, denoise(enabled(config), 16, **given))
    assert error(got, dense(16, **given)) < 0.3


def test_bfloat16_stays_bfloat16() -> None:
    model = enabled({**DENSE, **caching(keep=0.5)}).bfloat16()
    given = {name: x.bfloat16() if "ids" not in name else x for name, x in inputs().items()}
    assert {x.dtype for x in denoise(model, 12, **given)} == {torch.bfloat16}
    assert skipped(model)


@pytest.mark.parametrize("keys", [{"mode": "static"}, {"keep": 0.5}])
def test_what_the_final_layer_does_to_the_hidden_state_reaches_no_cache(keys: dict[str, Any]) -> None:
    given = inputs()
    expected = denoise(enabled({**DENSE, **caching(**keys)}), 30, **given)
    model = enabled({**DENSE, **caching(**keys)})
    model.out.register_forward_pre_hook(lambda module, args: (args[0].clone(),))
    model.out.register_forward_hook(lambda module, args, out: out)
    original = model.out.forward

    def destructive(x: Tensor) -> Tensor:
        out = original(x)
        x.zero_()
        return out

    model.out.forward = destructive  # type: ignore[method-assign]
    assert same(denoise(model, 30, **given), expected)


def test_the_statistics_list_the_skipped_steps() -> None:
    model, given = enabled({**small(), **caching(mode="static")}), inputs()
    for _ in range(2):
        denoise(model, 50, **given)
    counted = chipmunk.statistics(model)
    assert counted.skipped_steps == {"main": UPSTREAM_SCHEDULE}
    assert counted.skipped_model_calls == 50
    assert counted.model_calls == 100
    assert "skipped steps of the last image: 7 11 13 14" in " ".join(str(counted).split())


def test_a_benchmark_tells_skipped_steps_from_others() -> None:
    model, given = enabled({**small(), **caching(keep=0.5)}), inputs()
    with model_calls(model, model.__dict__["_chipmunk_session"], cuda=False) as calls:
        denoise(model, 16, **given)
    assert tuple(step for step, kind in enumerate(calls.kinds) if kind == "skipped") == skipped(model)
    assert set(calls.kinds) == {"skipped", "dense/full", "full/sparse", "full/full", "sparse/sparse"}


# Forwards that are no place for it.


class Old(Flux):
    """Patched before there was step caching."""

    @chipmunk.model_forward(double="double_blocks", single="single_blocks", image="img", ids="img_ids")
    def forward(
        self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, timesteps: Tensor, **options: Any
    ) -> Tensor:
        pe = flux_model.rotary_table(torch.cat((txt_ids, img_ids), dim=1), self.size // self.count)
        vec = self.vec_in(timesteps[:, None]).tanh()
        img, txt = self.img_in(img), self.txt_in(txt)
        for block in self.double_blocks:
            img, txt = block(img=img, txt=txt, vec=vec, pe=pe)
        img = torch.cat((txt, img), dim=1)
        for block in self.single_blocks:
            img = block(img, vec=vec, pe=pe)
        return self.out(img[:, txt.shape[1] :])


class Early(Old):
    """Returns before the hidden state is asked for, in some calls."""

    leaves = False

    @chipmunk.model_forward(double="double_blocks", single="single_blocks", image="img")
    def forward(self, img: Tensor, **given: Any) -> Tensor:
        if self.leaves:
            return Old.forward.__wrapped__(self, img, **given)  # type: ignore[attr-defined, no-any-return]
        return Flux.forward.__wrapped__(self, img, **given)  # type: ignore[attr-defined, no-any-return]


class Narrow(Old):
    """Its hidden state has more tokens than entered the blocks."""

    @chipmunk.model_forward(double="double_blocks", single="single_blocks", image="img")
    def forward(self, img: Tensor, **given: Any) -> Tensor:
        for _ in chipmunk.blocks(self.double_blocks, self, img[:, 1:]):
            pass
        for _ in chipmunk.blocks(self.single_blocks, self):
            pass
        return Old.forward.__wrapped__(self, chipmunk.hidden(self, img), **given)  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("kind", [Old, Narrow])
def test_a_forward_without_a_place_says_so_once_and_skips_nothing(kind: type[Flux]) -> None:
    model, given = enabled({**small(), **caching(keep=0.5)}, kind), inputs()
    with pytest.warns(RuntimeWarning, match="no steps are skipped") as caught:
        got = denoise(model, 12, **given)
    assert len(caught) == 1
    assert same(got, denoise(enabled(small(), kind), 12, **given))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(got, denoise(model, 12, **given))
    counted = chipmunk.statistics(model)
    assert counted.skipped_model_calls == 0
    assert counted.no_step_caching is not None
    assert (counted.no_step_caching == NO_PLACE) == (kind is Old)
    assert f"no steps are skipped: {counted.no_step_caching}" in " ".join(str(counted).split())


def test_a_forward_that_leaves_early_on_a_skipped_step_is_run_again() -> None:
    given, truth = inputs(), dense(16, **inputs())
    model = enabled({**DENSE, **caching(keep=0.5)}, Early)

    def leave(step: int) -> None:
        model.leaves = step >= 8  # type: ignore[assignment]

    with pytest.warns(RuntimeWarning, match="no steps are skipped"):
        got = denoise(model, 16, each=leave, **given)
    assert max(skipped(model)) < 8
    assert error(got[8:], truth[8:]) < 0.02
    assert len(skipped(model)) == chipmunk.statistics(model).skipped_model_calls > 0


class TwoCuts(Old):
    """As FLUX.2 of diffusers: what is cut off hangs on what the call is for."""

    keeps = 0

    @chipmunk.model_forward(double="double_blocks", single="single_blocks", image="img", ids="img_ids")
    def forward(
        self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, timesteps: Tensor, **options: Any
    ) -> Tensor:
        pe = flux_model.rotary_table(torch.cat((txt_ids, img_ids), dim=1), self.size // self.count)
        vec = self.vec_in(timesteps[:, None]).tanh()
        img, txt = self.img_in(img), self.txt_in(txt)
        for block in chipmunk.blocks(self.double_blocks, self, img):
            img, txt = block(img=img, txt=txt, vec=vec, pe=pe)
        img = torch.cat((txt, img), dim=1)
        for block in chipmunk.blocks(self.single_blocks, self):
            img = block(img, vec=vec, pe=pe)
        if self.keeps:
            img = chipmunk.hidden(self, img[:, -self.keeps :])
        else:
            img = chipmunk.hidden(self, img[:, txt.shape[1] :])
        return self.out(img)


@pytest.mark.parametrize("keys", [{"keep": 0.5}, {"mode": "static"}], ids=["adaptive", "static"])
def test_where_less_than_what_entered_leaves_the_blocks_steps_are_not_skipped(keys: dict[str, Any]) -> None:
    whole = enabled({**DENSE, **caching(**keys)}, TwoCuts)
    usual = denoise(whole, 20, **inputs())
    assert chipmunk.statistics(whole).skipped_model_calls > 0
    assert same(usual, denoise(enabled({**DENSE, **caching(**keys)}), 20, **inputs()))

    def run(model: Any, narrow: frozenset[int]) -> list[Tensor]:
        given, found = inputs(), []
        for step in chipmunk.steps(model, range(20)):
            model.keeps = 20 if step in narrow else 0
            found.append(model(timesteps=torch.full((1,), 1 - step / 20), **given))
        return found

    for narrow in (frozenset({0}), frozenset(skipped(whole)[:1])):  # one that would be kept, one that is skipped
        model, plain = enabled({**DENSE, **caching(**keys)}, TwoCuts), build(TwoCuts)
        chipmunk.disable(plain)
        with pytest.warns(RuntimeWarning, match="no steps are skipped"):
            got = run(model, narrow)
        assert same(got, run(plain, narrow))
        assert chipmunk.statistics(model).skipped_model_calls == 0


def test_a_copy_made_during_a_call_carries_no_state() -> None:
    model, given = enabled({**DENSE, **caching(keep=0.5)}), inputs()
    copies: list[Any] = []
    model.out.register_forward_hook(
        lambda module, args, out: copies.append(copy.deepcopy(model)) if not copies else None
    )
    denoise(model, 12, **given)
    assert getattr(copies[0], "_chipmunk_step", None) is None
    assert isinstance(copies[0], nn.Module)


def test_skipped_steps_compile_nothing() -> None:
    torch._dynamo.reset()
    counters.clear()
    model, plain, given = flux_model.build(double=2, single=1), flux_model.build(double=2, single=1), inputs()
    for block in (*model.double_blocks, *model.single_blocks):
        block.compile(fullgraph=True, backend="eager")
    config = {**small(), **caching(keep=0.5)}
    chipmunk.enable(model, config)
    chipmunk.enable(plain, config)
    assert error(denoise(model, 20, **given), denoise(plain, 20, **given)) < 1e-5
    assert skipped(model)
    # as many as without step caching: four kinds of step for either block class, and one for the layer that is dense
    assert counters["stats"]["unique_graphs"] == 9
    denoise(model, 13, **given)
    assert counters["stats"]["unique_graphs"] == 9
    torch._dynamo.reset()


class Clocked(Flux):
    forward = chipmunk.model_forward(
        double="double_blocks", single="single_blocks", image="img", ids="img_ids", timesteps="timesteps"
    )(Flux.forward.__wrapped__)  # type: ignore[attr-defined]


def test_steps_counted_by_the_timestep_are_skipped_too() -> None:
    """Where no sampling loop is marked; the number of steps is not known then."""
    given, steps = inputs(), 14
    config = {**small(), **caching(skip_step_schedule=[4, 6, 7, 11])}
    model, loop = enabled(config, Clocked), enabled(config)

    def call(model: Flux, step: int) -> Tensor:
        out: Tensor = model(**given, timesteps=torch.full((1,), 1 - step / steps))
        return out

    expected = [call(loop, step) for step in chipmunk.steps(loop, (step for step in range(steps)))]
    for _ in range(2):
        assert same([call(model, step) for step in range(steps)], expected)
        assert skipped(model) == (4, 6, 7, 11)
