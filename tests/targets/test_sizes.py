"""Small sizes by the names of parameters: what shrinks, by how much, and what is left alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from chipmunk.target.sizes import HEAD_DIM, HEADS, shrunk


def test_what_is_no_size_is_left_alone() -> None:
    assert (
        shrunk({"pos_embed_max_size": 1024, "max_seq": 1024, "sample_size": 64, "theta": 10_000, "patch_size": 2}) == {}
    )
    assert shrunk({"guidance_embeds": True, "has_layers": True, "qk_norm": "rms", "num_heads": None}) == {}


def test_heads_stay_where_the_width_is_not_known() -> None:
    assert shrunk({"num_heads": 24, "num_layers": 19}) == {"num_layers": 5}


def test_widths_shrink_together_and_narrow_ones_not_at_all() -> None:
    small = shrunk({"num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 4096,
                    "caption_projection_dim": 3072, "in_channels": 64, "timestep_channels": 256})  # fmt: skip
    assert small == {
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "joint_attention_dim": 168,
        "caption_projection_dim": 128,  # as wide as the model before, and after
    }


def test_axes_share_a_head_as_before() -> None:
    values = {"hidden_size": 3584, "heads_num": 28, "rope_dim_list": [64, 64], "kernel": (3, 3)}
    assert shrunk(values) == {"hidden_size": 128, "heads_num": 2, "rope_dim_list": [32, 32]}
    axes = {"num_heads": 24, "head_dim": 128, "axes_dims_rope": (16, 56, 56)}
    assert shrunk(axes)["axes_dims_rope"] == (8, 28, 28)


def test_depths_leave_three_blocks_after_two_dense_ones() -> None:
    assert shrunk({"num_layers": 19, "num_single_layers": 38}) == {"num_layers": 5, "num_single_layers": 3}
    assert shrunk({"mm_double_blocks_depth": 20, "mm_single_blocks_depth": 40}) == {
        "mm_double_blocks_depth": 5,
        "mm_single_blocks_depth": 3,
    }
    # one that counts both kinds, beside the double ones
    assert shrunk({"n_layers": 36, "n_double_layers": 4}) == {"n_layers": 8, "n_double_layers": 4}
    assert shrunk({"num_refiner_layers": 2}) == {"num_refiner_layers": 2}


def test_the_width_of_an_mlp_keeps_its_type() -> None:
    assert shrunk({"mlp_ratio": 4.0, "mlp_width_ratio": 4, "ratio": "wide"}) == {"mlp_ratio": 2.0, "mlp_width_ratio": 2}


@given(heads=st.integers(1, 64), head=st.sampled_from([32, 64, 128, 256]), wide=st.integers(257, 30_000))
def test_nothing_grows_but_to_the_smallest_head(heads: int, head: int, wide: int) -> None:
    small = shrunk({"num_heads": heads, "head_dim": head, "hidden_dim": wide})
    assert small["num_heads"] == HEADS
    assert small["head_dim"] == HEAD_DIM
    assert 8 <= small["hidden_dim"] <= wide + 8
