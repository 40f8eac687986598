import argparse
import inspect
import time
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flux.sampling import denoise, get_noise, get_schedule, prepare, unpack
from flux.util import configs, load_ae, load_clip, load_flow_model, load_t5, save_image


@torch.inference_mode()
def main(
    name: str = "flux-tiny",
    prompt: str = "a chipmunk in a red scarf reads the morning paper",
    width: int = 640,
    height: int = 448,
    num_steps: int = 12,
    guidance: float = 3.5,
    seed: int | None = None,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    output_dir: str = "output",
    num_images: int = 1,
) -> list[Path]:
    """Turn a prompt into PNG files and return their paths. Sizes are in pixels and rounded down to multiples of 16."""
    if name not in configs:
        raise ValueError(f"Unknown model {name}; there are: {', '.join(configs)}")

    torch_device = torch.device(device)
    dtype = torch.bfloat16 if torch_device.type == "cuda" else torch.float32
    height = 16 * (height // 16)
    width = 16 * (width // 16)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)

    t5 = load_t5(name)
    clip = load_clip(name)
    model = load_flow_model(name, device=torch_device).to(dtype)
    ae = load_ae(name, device=torch_device)

    if seed is None:
        seed = torch.seed() % 2**32
    paths = []
    for index in range(num_images):
        start = time.perf_counter()
        x = get_noise(1, height, width, device=torch_device, dtype=dtype, seed=seed + index)
        inp = prepare(t5, clip, x, prompt=prompt)
        timesteps = get_schedule(num_steps, inp["img"].shape[1])
        x = denoise(model, **inp, timesteps=timesteps, guidance=guidance)
        x = unpack(x.float(), height, width)
        pixels = ae.decode(x)

        paths.append(folder / f"img_{seed + index}.png")
        save_image(pixels[0], paths[-1])
        print(f"{paths[-1]}: {width}x{height}, {num_steps} steps, {time.perf_counter() - start:.1f} s")
    return paths


def command_line(function: Callable[..., Any]) -> dict[str, Any]:
    """Read the function's parameters from the command line: `num_steps: int = 12` becomes `--num-steps 12`."""
    parser = argparse.ArgumentParser(prog="python -m flux", description=function.__doc__)
    hints = typing.get_type_hints(function)
    for parameter in inspect.signature(function).parameters.values():
        # `int | None` reads an int
        options = [hint for hint in typing.get_args(hints[parameter.name]) if hint is not type(None)]
        parser.add_argument(
            "--" + parameter.name.replace("_", "-"),
            type=options[0] if options else hints[parameter.name],
            default=parameter.default,
            metavar="X",
            help=f"default: {parameter.default}",
        )
    return vars(parser.parse_args())


def run() -> None:
    main(**command_line(main))


if __name__ == "__main__":
    run()
