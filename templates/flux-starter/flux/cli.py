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
    parser.add_argument("--name", choices=sorted(configs), default="flux-tiny")
    parser.add_argument("--prompt", default="a chipmunk in a red scarf reads the morning paper")
    parser.add_argument("--width", type=int, default=640, help="pixels, rounded down to a multiple of 16")
    parser.add_argument("--height", type=int, default=448, help="pixels, rounded down to a multiple of 16")
    parser.add_argument("--num-steps", type=int, default=12)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--seed", type=int, help="of the first image; the next ones count on")
    parser.add_argument("--num-images", type=int, default=1)
    parser.add_argument("--device", default=default_device)
    parser.add_argument("--output-dir", type=Path, default=Path("output"))
    args = parser.parse_args(argv)

    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    height = 16 * (args.height // 16)
    width = 16 * (args.width // 16)
    seed = torch.seed() % 2**32 if args.seed is None else args.seed
    args.output_dir.mkdir(parents=True, exist_ok=True)

    t5 = load_t5(args.name)
    clip = load_clip(args.name)
    model = load_flow_model(args.name, device=device, dtype=dtype)
    ae = load_ae(args.name, device=device)

    paths = []
    for index in range(args.num_images):
        start = time.perf_counter()
        x = get_noise(1, height, width, device=device, dtype=dtype, seed=seed + index)
        inp = prepare(t5, clip, x, prompt=args.prompt)
        timesteps = get_schedule(args.num_steps, inp["img"].shape[1])
        x = denoise(model, **inp, timesteps=timesteps, guidance=args.guidance)
        pixels = ae.decode(unpack(x.float(), height, width))

        paths.append(args.output_dir / f"img_{seed + index}.png")
        save_image(pixels[0], paths[-1])
        print(f"{paths[-1]}: {width}x{height}, {args.num_steps} steps, {time.perf_counter() - start:.1f} s")
    return paths


if __name__ == "__main__":
    main()
