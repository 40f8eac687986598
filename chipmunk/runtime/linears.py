"""Which linear layers, activations and MLPs are understood well enough to take over.

The question is asked at every call: LoRA, quantisation and hooks come and go after a model is loaded. An MLP is known
by the exact types of its parts; where the repository has a class of its own for it, the patch has read that class, and
names the parts and the classes that it has seen.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as all_modules

from chipmunk.runtime.guards import is_cast

GELUS = {"gelu_tanh": "tanh", "gelu": "none"}
"""Names of activations → `approximate` of `torch.nn.functional.gelu`."""
GATED = {"swiglu": 0, "swiglu_value_first": 1}
"""Names of gated activations → which half of the first linear's rows is the gate: `silu(gate) · value`."""

_PLAIN = (nn.Sequential, nn.ModuleList, nn.Identity, nn.GELU, nn.SiLU)
_CASTING = {"comfy.ops": ("disable_weight_init.Linear", "manual_cast.Linear")}
"""Linear layers that bring their weight to the input's dtype and device, and change it by functions given to them."""

HOOKED = "a hook watches or changes the MLP"


class MlpForm(NamedTuple):
    """What an MLP is made of."""

    first: tuple[nn.Linear, ...]
    """One, or the gate's and the value's."""
    activation: str
    """A key of GELUS or GATED."""
    second: nn.Linear

    @property
    def neurons(self) -> int:
        return sum(linear.weight.shape[0] for linear in self.first) // rows_per_neuron(self.activation)

    def activated(self, x: Tensor) -> Tensor:
        """(B, N, F): what the second linear is given."""
        if len(self.first) == 1:
            return activate(self.activation, self.first[0](x))
        gate, value = self.first
        out: Tensor = functional.silu(gate(x)) * value(x)
        return out


def rows_per_neuron(activation: str) -> int:
    """How many rows of the first linear belong to one neuron."""
    return 2 if activation in GATED else 1


def activate(activation: str, hidden: Tensor) -> Tensor:
    """The activation of that name, of (…, F) or, where it is gated, (…, 2F): (…, F)."""
    if activation in GELUS:
        return functional.gelu(hidden, approximate=GELUS[activation])
    halves = hidden.chunk(2, dim=-1)
    gate = GATED[activation]
    return functional.silu(halves[gate]) * halves[1 - gate]


def why_not_linear(linear: nn.Module, x: Tensor, width: int) -> str | None:
    """Why `linear` cannot be replaced by its weight and bias, applied to (…, width) of x's dtype and device.

    None if it can.
    """
    if type(linear) is not nn.Linear and not _is_casting(linear):
        return f"the linear layer is a {name_of(linear)}"
    if type(linear) is not nn.Linear and _changes_weight(linear):
        return "the linear layer changes its weight at each call, for a LoRA or an offloaded weight"
    if is_hooked(linear):
        return "a hook watches or changes the linear layer"
    weight, bias = linear.weight, linear.bias
    if type(weight) is not nn.Parameter and type(weight) is not Tensor:
        return f"the weight is a {type(weight).__name__}"
    if weight.dtype != x.dtype or not x.dtype.is_floating_point or (bias is not None and bias.dtype != x.dtype):
        return "the weight's dtype is not that of the activations"
    if is_cast(x):
        return "autocast to another dtype is on"
    if weight.dim() != 2 or weight.shape[1] != width or (bias is not None and bias.shape != weight.shape[:1]):
        return "the weight's shape is not (out, in)"
    if weight.device != x.device:
        return "the weight is on another device"
    return None


def _is_casting(linear: object) -> bool:
    """Whether it is ComfyUI's linear layer: an `nn.Linear` where the weight is as the input and no function is given.

    Asked by the exact class and the origin of its forward: others inherit from it, or put another in its place.
    """
    kind: Any = type(linear)
    known = kind.__qualname__ in _CASTING.get(kind.__module__, ())
    return known and isinstance(linear, nn.Linear) and kind.forward.__module__ == kind.__module__


def _changes_weight(linear: Any) -> bool:
    """Whether a casting layer does more to its weight than to bring it to a dtype and device."""
    functions = ("weight_function", "bias_function", "weight_lowvram_function", "bias_lowvram_function")
    return any(getattr(linear, name, None) for name in functions) or hasattr(linear, "_v")


def activation_name(activation: Any, kind: str = "", of: str = "") -> str | None:
    """The name of an activation, a key of GELUS or GATED; None if it is not understood.

    activation: a module, or the name itself where the code called a function. kind, of: what the patch has read in the
    classes `of` (names, separated by commas) of an activation of the repository's own.
    """
    if isinstance(activation, str):
        return activation if activation in GELUS or activation in GATED else None
    if kind:
        return kind if isinstance(activation, nn.Module) and _why_unseen(activation, of) is None else None
    if type(activation) is not nn.GELU or is_hooked(activation):
        return None
    return "gelu_tanh" if activation.approximate == "tanh" else "gelu"


def gate_name(activation: object, value_first: bool) -> str | None:
    """The name of a gated activation, of which the code calls the gate's part; None if that is not understood."""
    if activation is not functional.silu and (type(activation) is not nn.SiLU or is_hooked(activation)):
        return None
    return "swiglu_value_first" if value_first else "swiglu"


def why_not_pair(gate: nn.Linear, value: nn.Linear) -> str | None:
    """Why two linears, each as it should be, cannot be the gate and the value of one MLP; None if they can."""
    biases = (gate.bias is None) == (value.bias is None)
    alike = gate.weight.shape == value.weight.shape and gate.weight.stride() == value.weight.stride() and biases
    return None if alike else "the gate's and the value's linear layers are not of the same shape"


def mlp_form(mlp: Any, x: Tensor, parts: str = "", of: str = "") -> MlpForm | str:
    """What `mlp` is made of, if it is a Linear, an activation and a Linear on x (B, N, C); otherwise why it is not.

    parts: where they are in the module, as in "net.0.proj, gelu_tanh, net.2" (the activation's name, or its place) or,
    with a gate's and a value's linear, "w1 + w3, swiglu, w2"; without it, a Sequential of them. of: the repository's
    own classes among the module and its sub-modules.
    """
    found: list[Any]
    if parts:
        places = parts.split(", ")
        activation = places[1]
        first = tuple(_at(mlp, place) for place in places[0].split(" + "))
        found = [first, None, _at(mlp, places[2])]
        if activation not in GELUS and activation not in GATED:
            found[1] = _at(mlp, activation)
    else:
        if type(mlp) is not nn.Sequential:
            return f"the MLP is a {name_of(mlp)} that is not understood"
        activation = ""
        found = [part for part in mlp if type(part) is not nn.Identity and not _is_idle_dropout(part)]
        if len(found) != 3:
            return "the MLP is a Sequential that is not understood"
        found[0] = (found[0],)
    first, module, second = found
    if module is not None:
        name = activation_name(module)
        if name is None:
            return f"the activation is a {name_of(module)} that is not understood"
        activation = name
    if None in first or second is None:
        return "the MLP has lost a part that the patch has seen"
    if x.dim() != 3:
        return "the MLP's input is not (B, N, C)"
    reason = None
    for linear in first:  # not a generator: Dynamo of PyTorch 2.11 breaks the graph there
        reason = reason or why_not_linear(linear, x, x.shape[-1])
    if reason is None and len(first) > 1:
        reason = why_not_pair(*first)
    form = MlpForm(first, activation, second)
    if reason is None:
        reason = why_not_linear(second, x, form.neurons) or _why_unseen(mlp, of)
    return form if reason is None else reason


def _why_unseen(module: nn.Module, of: str) -> str | None:
    """Why the module may do something else than the patch has read, apart from linear layers; None if it does not."""
    seen = of.split(", ")
    for part in module.modules():
        if is_hooked(part):
            return HOOKED
        if type(part) in (*_PLAIN, nn.Linear) or _is_casting(part) or type(part).__name__ in seen:
            continue
        if type(part) is nn.Dropout:
            if not _is_idle_dropout(part):
                return "dropout is active in the MLP"
            continue
        return f"the MLP holds a {name_of(part)}, which is not understood"
    return None


def _is_idle_dropout(module: nn.Module) -> bool:
    return type(module) is nn.Dropout and (module.p == 0 or not module.training)


def _at(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def name_of(module: object) -> str:
    """The class's name; with its module where it is not the one of that name in torch."""
    kind = type(module)
    is_torch = getattr(nn, kind.__name__, kind) is kind
    return kind.__name__ if is_torch else f"{kind.__module__}.{kind.__name__}"


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class's forward, or something else."""
    own = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    return bool(own or all_modules._global_forward_hooks or all_modules._global_forward_pre_hooks)
