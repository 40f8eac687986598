"""The schema of `chipmunk-config.yml`: every key of the original Chipmunk's file, with its meaning, and a few of ours.

Fractions are fractions of 1, steps and layers are counted from 0. What a key does in detail is in
`docs/configuration.md`, the exact arithmetic in `docs/architecture.md`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, WithJsonSchema, field_validator
from pydantic_core import PydanticCustomError


@dataclass(frozen=True)
class Allowed:
    """What a key takes, in the words of an error message: "mlp.top_keys is 30; it must be *a number from 0 to 1*"."""

    text: str


def _steps_as_tuple(value: Any) -> Any:
    """Take a list, a `!!set`, or a mapping to nothing (which is how `{0, 1, 10}` reads in YAML)."""
    if isinstance(value, dict) and all(item is None for item in value.values()):
        value = list(value)
    if not isinstance(value, list | tuple | set | frozenset):
        return value
    if any(type(step) is not int or step < 0 for step in value):
        raise PydanticCustomError("schedule", "not a schedule")
    return tuple(sorted(set(value)))


_STEPS_JSON: dict[str, Any] = {
    "anyOf": [
        {"type": "array", "items": {"type": "integer", "minimum": 0}},
        {"type": "object", "additionalProperties": {"type": "null"}, "propertyNames": {"pattern": "^[0-9]+$"}},
        {"type": "null"},
    ]
}

_FALSE: dict[str, Any] = {"const": False}

Flag = Annotated[bool, Allowed("true or false")]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), Allowed("a number from 0 to 1")]
FractionOrNone = Annotated[
    float | None, Field(gt=0, le=1, allow_inf_nan=False), Allowed("a number above 0 and up to 1, or null")
]
Threshold = Annotated[float, Field(ge=0, allow_inf_nan=False), Allowed("a number, 0 or more")]
Order = Annotated[int | None, Field(ge=0, le=3), Allowed("0, 1, 2, 3 or null")]
Count = Annotated[int, Field(ge=1), Allowed("a whole number, 1 or more")]
CountOrZero = Annotated[int, Field(ge=0), Allowed("a whole number, 0 or more")]
CountOrNone = Annotated[int | None, Field(ge=1), Allowed("a whole number, 1 or more")]
Every = Annotated[int | None, Field(ge=1), Allowed("a whole number, 1 or more, or null")]
Zero = Annotated[Literal[0], Allowed("0, because local windows are not part of Chipmunk on FLUX")]
Steps = Annotated[
    tuple[int, ...] | None,
    BeforeValidator(_steps_as_tuple),
    Allowed("a list or !!set of steps counted from 0, such as [0, 1, 10, 40], or null"),
    WithJsonSchema(_STEPS_JSON),
]


def _not_yet(feature: str, remedy: str) -> PydanticCustomError:
    return PydanticCustomError(
        "not_yet", "{feature} does not exist yet: {remedy}", {"feature": feature, "remedy": remedy}
    )


class Section(BaseModel):
    """What all parts of the file share: no unknown keys, no conversion, no change after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)


class Mlp(Section):
    """Sparse MLPs: the image MLP of double blocks and the whole MLP of single blocks."""

    is_enabled: Flag = Field(default=True, description="Run MLPs sparse on the steps between full steps.")
    is_fp8: Flag = Field(default=False, description="FP8 weights: not available yet.", json_schema_extra=_FALSE)
    top_keys: Fraction = Field(default=0.3, description="Fraction of neurons that a group of tokens computes anew.")
    random_keys: Fraction = Field(default=0.05, description="Fraction of neurons added at random.")
    full_step_every: Every = Field(
        default=None,
        description="Step 0 and every so many run in full and renew the caches; null: 0, 1, 3, 7, 15, 31, …",
    )
    block_mask_cache: Count = Field(default=1, description="From step 10 on, choose neurons anew every so many steps.")
    first_n_dense_layers: CountOrZero = Field(default=2, description="So many layers at the model's start stay dense.")
    counts_multiple_of: Count = Field(default=256, description="Neurons kept are rounded up to a multiple of this.")
    bm: Count = Field(default=128, description="Tokens in a group; a group shares its choice of neurons.")
    mbm: Count = Field(
        default=128, validate_default=True, description="Tokens in a part of a group whose means are compared."
    )

    @field_validator("is_fp8")
    @classmethod
    def _no_fp8(cls, value: bool) -> bool:
        if value:
            raise _not_yet("FP8", "set is_fp8 to false")
        return value

    @field_validator("mbm")
    @classmethod
    def _mbm_divides_bm(cls, value: int, info: ValidationInfo) -> int:
        bm = info.data.get("bm")
        if bm is not None and bm % value:
            raise PydanticCustomError("divides", "it must divide mlp.bm, which is {bm}", {"bm": bm})
        return value


class Attention(Section):
    """Sparse attention over the joint sequence of text and image tokens."""

    is_enabled: Flag = Field(default=True, description="Run attention sparse on the steps between full steps.")
    top_keys: Fraction = Field(default=0.165, description="Fraction of the keys that a group of queries attends to.")
    random_keys: Fraction = Field(default=0.0, description="Fraction of keys added at random.")
    full_step_every: Every = Field(
        default=None, description="Steps 0, 1 and every so many run in full; null: 0, 1, 3, 7, 15, 31, …"
    )
    full_step_schedule: Steps = Field(default=None, description="The full steps, instead of full_step_every.")
    first_n_dense_layers: CountOrZero = Field(default=2, description="So many layers at the model's start stay dense.")
    recompute_mask: Flag = Field(
        default=True, description="Choose keys anew on every full step, not on the first only."
    )
    should_compress_indices: Flag = Field(default=False, description="No effect: tuned the original's kernels.")
    counts_multiple_of: Count = Field(default=112, description="Keys kept are rounded to a multiple of this.")
    pad_qkv_before_kernel: Flag = Field(default=False, description="No effect: tuned the original's kernels.")
    mbm: Count = Field(default=128, description="Queries in a group; a group shares its choice of keys.")
    local_voxels: Zero = Field(default=0, description="Video models of the original only; 0.")
    local_1d_window: Zero = Field(default=0, description="Video models of the original only; 0.")


class Patchify(Section):
    """The order of image tokens: tokens of a patch of the picture stand together, so that a group is compact."""

    is_enabled: Flag = Field(default=True, description="Reorder image tokens inside the model.")
    chunk_size_1: Count = Field(default=8, description="Side of the outer patch in tokens; 1 turns this level off.")
    chunk_size_2: Count = Field(default=4, description="Side of the inner patch in tokens; 1 turns this level off.")


class Offloading(Section):
    """Caches in CPU memory. Not available yet: every switch is off, or all of them are disabled together."""

    global_disable_offloading: Flag = Field(default=False, description="Turn all of the switches below off.")
    mlp_out_cache: Flag = Field(default=False, alias="mlp.out_cache")
    mlp_indices: Flag = Field(default=False, alias="mlp.indices")
    mlp_counts: Flag = Field(default=False, alias="mlp.counts")
    mlp_sparse_act_T: Flag = Field(default=False, alias="mlp.sparse_act_T")
    mlp_blockmean_mid_cache: Flag = Field(default=False, alias="mlp.blockmean_mid_cache")
    attn_out_cache: Flag = Field(default=False, alias="attn.out_cache")
    attn_indices: Flag = Field(default=False, alias="attn.indices")
    attn_counts: Flag = Field(default=False, alias="attn.counts")
    attn_lse_constants: Flag = Field(default=False, alias="attn.lse_constants")
    text_encoders: Flag = False

    @field_validator("*")
    @classmethod
    def _none_enabled(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.field_name != "global_disable_offloading" and not info.data.get("global_disable_offloading"):
            raise _not_yet("offloading", "set it to false, or global_disable_offloading to true")
        return value


class StepCaching(Section):
    """Steps on which no block runs: the hidden state is made of those of earlier steps."""

    is_enabled: Flag = Field(default=False, description="Run no block on some of the steps.")
    mode: Annotated[Literal["static", "adaptive"] | None, Allowed("static, adaptive or null")] = Field(
        default=None,
        description="static: by skip_step_schedule; adaptive: by the error expected; null: by the schedule if given.",
    )
    skip_step_schedule: Steps = Field(
        default=None, description="Static mode: the steps to skip of `steps` (50); null is the original's list."
    )
    threshold: Threshold = Field(
        default=0.05,
        description="Adaptive mode: skip while the errors expected, relative to the hidden state, add up to less.",
    )
    keep: FractionOrNone = Field(
        default=None, description="Adaptive mode: compute this fraction of the steps instead, spread evenly."
    )
    max_consecutive: Count = Field(default=4, description="Adaptive mode: at most so many skipped steps in a row.")
    first_steps: Count = Field(default=4, description="Adaptive mode: so many steps at the start are never skipped.")
    last_steps: Count = Field(default=2, description="Adaptive mode: so many steps at the end are never skipped.")
    extrapolation: Order = Field(
        default=None,
        description="Order of extrapolation of the blocks' residual: 0 reuses it, 1 is linear; null: 1 in adaptive "
        "mode, while static mode then reuses the hidden state, as the original does.",
    )

    @property
    def is_static(self) -> bool:
        """Whether the steps to skip are listed."""
        return self.skip_step_schedule is not None if self.mode is None else self.mode == "static"


class Config(Section):
    """The whole file. `Config()` is the default configuration."""

    implementation: Annotated[Literal["auto", "reference", "triton"], Allowed("auto, reference or triton")] = Field(
        default="auto", description="Operators: PyTorch's (reference), Triton's, or the best that runs here (auto)."
    )
    compile: Annotated[Literal["auto"] | bool, Allowed("auto, true or false")] = Field(
        default="auto",
        description="Compile the blocks with torch.compile; auto: where it pays and you have not done so.",
    )
    min_steps: CountOrZero = Field(default=8, description="A sampling loop known to be shorter than this runs dense.")
    mlp: Mlp = Mlp()
    attn: Attention = Attention()
    patchify: Patchify = Patchify()
    offloading: Offloading = Offloading()
    step_caching: StepCaching = StepCaching()
    steps: CountOrNone = Field(
        default=None, description="The number of steps that step_caching.skip_step_schedule is written for; null: 50."
    )
    num_model_invocations_per_inference_step: CountOrNone = Field(
        default=None, description="No effect: model calls of a step are told apart without it."
    )
    world_size: CountOrNone = Field(default=None, description="No effect: one process drives one model.")

    @field_validator("mlp", "attn", "patchify", "offloading", "step_caching", mode="before")
    @classmethod
    def _empty_section(cls, value: Any) -> Any:
        return {} if value is None else value  # a section whose keys are all commented out


@dataclass(frozen=True)
class Note:
    """A key that was set and changes nothing, and why."""

    key: str
    reason: str


def notes(config: Config) -> tuple[Note, ...]:
    """List the keys that were set in `config` (the file, or the constructor) but have no effect."""
    return tuple(_notes(config))


def _notes(config: Config) -> Iterator[Note]:
    top, attn, off = config.model_fields_set, config.attn.model_fields_set, config.offloading
    caching = config.step_caching
    if "steps" in top and not (caching.is_enabled and caching.is_static):
        yield Note("steps", "the number of steps is that of the sampling loop")
    if "num_model_invocations_per_inference_step" in top:
        yield Note("num_model_invocations_per_inference_step", "each place that calls the model is counted by itself")
    if "world_size" in top:
        yield Note("world_size", "one process drives one model")
    for name in ("should_compress_indices", "pad_qkv_before_kernel"):
        if name in attn:
            yield Note(f"attn.{name}", "it tuned the original's CUDA kernels")
    if config.attn.full_step_schedule is not None and "full_step_every" in attn:
        yield Note("attn.full_step_every", "attn.full_step_schedule takes its place")
    for name, value in off.model_dump(by_alias=True).items():
        if value and name != "global_disable_offloading":
            yield Note(f"offloading.{name}", "global_disable_offloading turns it off")
    if caching.skip_step_schedule is not None and not caching.is_enabled:
        yield Note("step_caching.skip_step_schedule", "step caching is not enabled")
    elif caching.is_enabled:
        unused = _ADAPTIVE_ONLY if caching.is_static else ("skip_step_schedule",)
        for name in StepCaching.model_fields:
            if name in unused and getattr(caching, name) != StepCaching.model_fields[name].default:
                yield Note(f"step_caching.{name}", f"mode is {'static' if caching.is_static else 'adaptive'}")
        if not caching.is_static and caching.keep is not None and "threshold" in caching.model_fields_set:
            yield Note("step_caching.threshold", "step_caching.keep takes its place")


_ADAPTIVE_ONLY = ("threshold", "keep", "max_consecutive", "first_steps", "last_steps")


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of the file, for editors (`chipmunk config schema`)."""
    schema = Config.model_json_schema(by_alias=True)
    for name, field in schema["properties"].items():
        if "$ref" in field:  # a section may be left empty, as the loader takes it
            schema["properties"][name] = {"anyOf": [{"$ref": field["$ref"]}, {"type": "null"}]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "chipmunk-config.yml",
        **{key: value for key, value in schema.items() if key != "title"},
    }
