"""What the configuration holds: the defaults, the file that ships, the original's file, and the JSON schema."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

from chipmunk import config
from chipmunk.config import Config

ROOT = Path(__file__).parents[2]

# The keys and values that the original Chipmunk ships for FLUX.
ORIGINAL = """\
mlp: {is_enabled: true, is_fp8: false, top_keys: 0.3, random_keys: 0.05, full_step_every: 10, block_mask_cache: 2,
      first_n_dense_layers: 2, counts_multiple_of: 256, bm: 128, mbm: 128}
patchify: {is_enabled: true, chunk_size_1: 8, chunk_size_2: 4}
attn:
  is_enabled: true
  top_keys: 0.165
  full_step_every: 10
  full_step_schedule: ~
  first_n_dense_layers: 2
  recompute_mask: false
  should_compress_indices: false
  counts_multiple_of: 112
  pad_qkv_before_kernel: false
  mbm: 192
offloading:
  global_disable_offloading: true
  mlp.out_cache: false
  mlp.indices: false
  mlp.counts: false
  mlp.sparse_act_T: false
  mlp.blockmean_mid_cache: false
  attn.out_cache: false
  attn.indices: false
  attn.counts: false
  attn.lse_constants: false
  text_encoders: false
"""
REST_OF_ORIGINAL = """\
steps: 50
num_model_invocations_per_inference_step: 1
world_size: 1
attn: {full_step_schedule: !!set {0, 1, 10, 40}, full_step_every: 10, local_voxels: 0, local_1d_window: 0}
step_caching: {is_enabled: false, skip_step_schedule: !!set {7, 11, 13}}
"""


def test_defaults_are_the_documented_ones() -> None:
    defaults = Config()
    assert (defaults.implementation, defaults.compile, defaults.min_steps) == ("auto", "auto", 8)
    mlp, attn = defaults.mlp, defaults.attn
    assert (mlp.is_enabled, mlp.is_fp8, mlp.top_keys, mlp.random_keys, mlp.full_step_every) == (
        True,
        False,
        0.3,
        0.05,
        None,
    )
    assert (mlp.block_mask_cache, mlp.first_n_dense_layers) == (1, 2)
    assert (mlp.counts_multiple_of, mlp.bm, mlp.mbm) == (256, 128, 128)
    assert (attn.is_enabled, attn.top_keys, attn.random_keys, attn.full_step_every) == (True, 0.165, 0.0, None)
    assert (attn.full_step_schedule, attn.first_n_dense_layers, attn.recompute_mask) == (None, 2, True)
    assert (attn.counts_multiple_of, attn.mbm) == (112, 128)
    patchify = defaults.patchify
    assert (patchify.is_enabled, patchify.chunk_size_1, patchify.chunk_size_2) == (True, 8, 4)
    assert not any(value for key, value in defaults.offloading)
    assert not defaults.step_caching.is_enabled


def test_the_file_that_ships_holds_the_defaults_and_names_every_key_that_has_an_effect() -> None:
    shipped = config.load(ROOT / "chipmunk-config.yml")
    assert shipped.model_copy(update={"offloading": Config().offloading}) == Config()
    assert config.notes(shipped) == ()
    silent = {"should_compress_indices", "pad_qkv_before_kernel", "local_voxels", "local_1d_window"}
    assert shipped.mlp.model_fields_set == set(config.Mlp.model_fields)
    assert shipped.attn.model_fields_set == set(config.Attention.model_fields) - silent
    assert shipped.patchify.model_fields_set == set(config.Patchify.model_fields)
    assert shipped.step_caching.model_fields_set == set(config.StepCaching.model_fields)


def test_the_original_file_loads_with_its_own_values() -> None:
    original = config.parse(ORIGINAL)
    assert (original.mlp.block_mask_cache, original.attn.recompute_mask, original.attn.mbm) == (2, False, 192)
    assert [note.key for note in config.notes(original)] == [
        "attn.should_compress_indices",
        "attn.pad_qkv_before_kernel",
    ]


def test_keys_without_effect_are_reported() -> None:
    rest = config.parse(REST_OF_ORIGINAL)
    assert rest.attn.full_step_schedule == (0, 1, 10, 40)
    assert rest.step_caching.skip_step_schedule == (7, 11, 13)
    assert {note.key for note in config.notes(rest)} == {
        "steps",
        "num_model_invocations_per_inference_step",
        "world_size",
        "attn.full_step_every",
        "step_caching.skip_step_schedule",
    }
    assert config.notes(Config()) == ()


@pytest.mark.parametrize(
    ("section", "static", "without_effect"),
    [
        ("{is_enabled: true}", False, set()),
        ("{is_enabled: true, skip_step_schedule: !!set {7, 11}}", True, set()),
        ("{is_enabled: true, skip_step_schedule: []}", True, set()),
        ("{is_enabled: true, mode: static}", True, set()),
        ("{is_enabled: true, mode: adaptive, skip_step_schedule: [7, 11]}", False, {"skip_step_schedule"}),
        ("{is_enabled: true, mode: static, threshold: 0.3, keep: 0.5}", True, {"threshold", "keep"}),
        ("{is_enabled: true, keep: 0.5, threshold: 0.3}", False, {"threshold"}),
        ("{is_enabled: true, keep: 0.5}", False, set()),
        ("{keep: 0.5, skip_step_schedule: [7]}", True, {"skip_step_schedule"}),
    ],
)
def test_step_caching_is_static_where_there_is_a_schedule(section: str, static: bool, without_effect: set[str]) -> None:
    loaded = config.parse(f"step_caching: {section}".replace(", skip", ",\n skip"))
    assert loaded.step_caching.is_static is static
    assert {note.key for note in config.notes(loaded)} == {f"step_caching.{name}" for name in without_effect}


@pytest.mark.parametrize("enabled", [True, False])
def test_steps_says_what_the_schedule_is_written_for(enabled: bool) -> None:
    loaded = config.parse(f"steps: 28\nstep_caching: {{is_enabled: {str(enabled).lower()}, mode: static}}")
    assert loaded.steps == 28
    assert [note.key for note in config.notes(loaded)] == ([] if enabled else ["steps"])


def test_offloading_that_is_disabled_as_a_whole_is_no_error_but_reported() -> None:
    loaded = config.parse("offloading: {attn.out_cache: true, global_disable_offloading: true}".replace(", ", ",\n"))
    assert [note.key for note in config.notes(loaded)] == ["offloading.attn.out_cache"]


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "mlp:\n# all of it commented out\nattn: {}\n"])
def test_empty_files_and_sections_are_the_defaults(text: str) -> None:
    assert config.parse(text) == Config()


@pytest.mark.parametrize(
    ("written", "steps"),
    [
        ("[40, 0, 1, 1]", (0, 1, 40)),
        ("!!set {0, 1}", (0, 1)),
        ("{0, 1}", (0, 1)),
        ("[]", ()),
        ("null", None),
    ],
)
def test_a_schedule_is_a_list_a_set_or_nothing(written: str, steps: tuple[int, ...] | None) -> None:
    assert config.parse(f"attn: {{full_step_schedule: {written}}}").attn.full_step_schedule == steps


def test_a_configuration_can_be_built_in_code_and_never_changes() -> None:
    built = Config(mlp=config.Mlp(top_keys=1, random_keys=0), attn=config.Attention(full_step_schedule=(0, 5)))
    assert (built.mlp.top_keys, built.attn.full_step_schedule) == (1.0, (0, 5))
    assert hash(built) == hash(built.model_copy(deep=True))
    with pytest.raises(ValidationError):
        built.mlp.top_keys = 0.5  # type: ignore[misc]


def plain(text: str) -> object:
    """What an editor's JSON schema validator sees of a YAML text: a set is a mapping to nothing, keys are strings."""

    def convert(value: object) -> object:
        if isinstance(value, set):
            return {str(item): None for item in value}
        return {str(key): convert(item) for key, item in value.items()} if isinstance(value, dict) else value

    return convert(yaml.safe_load(text))


@pytest.mark.parametrize(
    "text", [ORIGINAL, REST_OF_ORIGINAL, (ROOT / "chipmunk-config.yml").read_text("utf-8"), "mlp:\n"]
)
def test_the_json_schema_takes_what_the_loader_takes(text: str) -> None:
    schema = config.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    config.parse(text)
    jsonschema.Draft202012Validator(schema).validate(plain(text))


@pytest.mark.parametrize(
    "text",
    [
        "mlp: {top_keys: 30}",
        "mlp: {top_keys: '0.3'}",
        "mlp: {is_fp8: true}",
        "mlp: {topkeys: 0.3}",
        "mlps: {}",
        "attn: {full_step_schedule: [-1]}",
        "attn: {full_step_every: 0}",
        "attn: {full_step_every: 1.5}",
        "step_caching: {mode: sometimes}",
        "step_caching: {keep: 0}",
        "step_caching: {threshold: -0.1}",
        "step_caching: {extrapolation: 4}",
        "step_caching: {max_consecutive: 0}",
        "step_caching: {first_steps: 0}",
        "implementation: cuda",
        "compile: sometimes",
    ],
)
def test_the_json_schema_refuses_what_the_loader_refuses(text: str) -> None:
    with pytest.raises(config.ConfigError):
        config.parse(text)
    assert not jsonschema.Draft202012Validator(config.json_schema()).is_valid(plain(text))


def test_the_runtime_can_import_the_configuration_without_the_tools_libraries() -> None:
    code = "import sys, chipmunk.config; print(*sorted({'torch', 'libcst', 'typer', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""
