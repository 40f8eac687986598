"""From a prompt to a picture with what the official FLUX.1 repository has for it, for `chipmunk fidelity`.

Its `util.py` holds text encoders, autoencoder and published models, its `sampling.py` schedule and packing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


class Pipeline:
    """What the repository itself draws pictures with: its text encoders, its schedule, its decoder.

    load: imports a file of the repository. Raises CannotRun where a part is asked for that this repository has not.
    """

    def __init__(self, load: Callable[[str], Any], model_file: str, autoencoder: str | None = None) -> None:
        folder = model_file.rpartition("/")[0]
        self._util, self._sampling = load(f"{folder}/util.py"), load(f"{folder}/sampling.py")
        self.name: str = next(iter(self._util.configs))
        self._autoencoder = autoencoder
        encoders = inspect.signature(self._util.load_t5).parameters
        self.encodes = list(encoders) == ["name"]
        """Whether prompts can be encoded without a download, and the model has weights of its own: the starter."""
        self.decodes = self.encodes or autoencoder is not None
        spec = self._util.configs[self.name]
        self.prompts: tuple[str, ...] = tuple(getattr(self._util, "example_prompts", ())) or _PROMPTS
        self.size: tuple[int, int] = (getattr(spec, "width", 512), getattr(spec, "height", 512))
        """Width and height, pixels."""
        self.token_size: int = getattr(spec, "token_size", 16)
        """Pixels along one side of a token."""
        self._guidance: float = getattr(spec, "guidance", 3.5)
        self._sized = {"token_size": self.token_size} if hasattr(spec, "token_size") else {}
        self.weights = "random" if getattr(spec, "ckpt_path", None) is None else "of the repository"

    def model(self, device: str) -> nn.Module:
        """The repository's model with the weights that it comes with, in float32."""
        model: nn.Module = self._util.load_flow_model(self.name, device=device)
        return model

    def inputs(self, model: nn.Module, prompt: str, seed: int, width: int, height: int) -> dict[str, Any]:
        """Arguments of the sampling loop for a picture of `width` x `height` pixels."""
        weight = model.get_parameter("img_in.weight")
        given = (height, width, weight.device, weight.dtype)
        noise = self._sampling.get_noise(1, *given, seed=seed, **self._sized)
        encoders = (self._util.load_t5(self.name), self._util.load_clip(self.name))
        arguments: dict[str, Any] = self._sampling.prepare(*encoders, noise, prompt=prompt)
        return {**arguments, "guidance": self._guidance}

    def times(self, steps: int, tokens: int) -> list[float]:
        """From 1 (noise) to 0 (picture)."""
        times: list[float] = self._sampling.get_schedule(steps, tokens)
        return times

    def decode(self, latents: Tensor, width: int, height: int) -> Tensor:
        """Pictures (batch, height, width, 3) uint8, on the CPU, of the loop's latents."""
        import torch

        if self._autoencoder is None:
            autoencoder = self._util.load_ae(self.name, device=latents.device)
        else:
            from safetensors.torch import load_file

            params = self._util.configs[self.name].ae_params
            autoencoder = self._util.AutoEncoder(params)
            autoencoder.load_state_dict(load_file(self._autoencoder), strict=True)
            autoencoder = autoencoder.to(latents.device).eval()
        with torch.no_grad():
            unpacked = self._sampling.unpack(latents.float(), height, width, **self._sized)
            pixels = autoencoder.decode(unpacked).float()
        levels: Tensor = pixels.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
        return levels.permute(0, 2, 3, 1).contiguous().cpu()


_PROMPTS = (
    "a happy chipmunk with a red scarf on a meadow",
    "a white boat on the sea with hills at night clear sky the moon in the middle",
    "a big blue ball and a small yellow cube and a big red vase on a wooden table before a grey wall",
    "a sleepy fox with a blue scarf and glasses in the snow",
    "a big red house on the left and two pine trees on a meadow with mountains by day cloudy sky",
    "two big striped orange fish swimming left in the clear sea with seaweed and bubbles",
    "three green apples on a checked table before a striped pink wall",
    "a photograph of a cat",
)
"""In the words that the starter's model was trained with."""


def pipeline(load: Callable[[str], Any], model_file: str, autoencoder: str | None = None) -> Pipeline | None:
    """The repository's own way from a prompt to a picture; None where its files are not those of FLUX.

    autoencoder: a checkpoint of the user's own, to decode with.
    """
    try:
        found = Pipeline(load, model_file, autoencoder)
    except Exception:  # another fork's util.py: whatever its import needs or its names are, latents can be compared
        if autoencoder is not None:
            raise
        return None
    return found
