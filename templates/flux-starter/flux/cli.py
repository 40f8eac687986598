import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from flux.sampling import denoise, get_noise, get_schedule, prepare, unpack
from flux.util import configs, load_ae, load_clip, load_flow_model, load_t5, save_image


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Turn a prompt into PNG files; returns their paths."""
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(prog="python -m flux", description="Turn a prompt into PNG files.")
    parser.add_argument("--name", choices=sorted(configs), default="flux-mini")
    parser.add_argument("--prompt", help="without one, the model's own example")
    parser.add_argument("--width", type=int, help="pixels, rounded down to whole tokens of 8 or, in flux-tiny, 16")
    parser.add_argument("--height", type=int, help="likewise")
    parser.add_argument("--num-steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--seed", type=int, help="of the first image; the next ones count on")
    parser.add_argument("--num-images", type=int, default=1)
    parser.add_argument("--device", default=default_device)
    parser.add_argument("--output-dir", type=Path, default=Path("output"))
    args = parser.parse_args(argv)

    spec = configs[args.name]
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    prompt = spec.prompt if args.prompt is None else args.prompt
    height = (args.height or spec.height) // spec.token_size * spec.token_size
    width = (args.width or spec.width) // spec.token_size * spec.token_size
    num_steps = args.num_steps or spec.num_steps
    guidance = spec.guidance if args.guidance is None else args.guidance
    seed = torch.seed() % 2**32 if args.seed is None else args.seed
    args.output_dir.mkdir(parents=True, exist_ok=True)

    t5 = load_t5(args.name)
    clip = load_clip(args.name)
    model = load_flow_model(args.name, device=device, dtype=dtype)
    ae = load_ae(args.name, device=device)

    paths = []
    for index in range(args.num_images):
        start = time.perf_counter()
        x = get_noise(1, height, width, device, dtype, seed + index, spec.token_size)
        inp = prepare(t5, clip, x, prompt=prompt)
        timesteps = get_schedule(num_steps, inp["img"].shape[1])
        x = denoise(model, **inp, timesteps=timesteps, guidance=guidance)
        pixels = ae.decode(unpack(x.float(), height, width, spec.token_size))

        paths.append(args.output_dir / f"img_{seed + index}.png")
        save_image(pixels[0], paths[-1])
        print(f"{paths[-1]}: {width}x{height}, {num_steps} steps, {time.perf_counter() - start:.1f} s")
    return paths


if __name__ == "__main__":
    main()
