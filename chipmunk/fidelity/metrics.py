"""How alike two pictures, or two latents, are."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chipmunk.apply.errors import quoted
from chipmunk.fidelity.report import FidelityError

if TYPE_CHECKING:
    from torch import Tensor

INSTALL = f"{quoted(Path(sys.executable))} -m pip install 'chipmunk-flux[fidelity]'"

CAP = 100.0
"""PSNR of pictures that are the same to the bit, dB: a mean needs a number."""


def psnr(dense: Tensor, other: Tensor, peak: float | None = None) -> float:
    """Peak signal-to-noise ratio in dB, 10·log₁₀(peak² / mean squared difference), at most `CAP`.

    peak: 255 for 8-bit pictures; None takes the range of `dense`, for latents. Tensors of one shape.
    """
    first, second = dense.double(), other.double()
    error = float((first - second).square().mean())
    top = float(first.max() - first.min()) if peak is None else peak
    if error == 0:
        return CAP
    return min(10 * math.log10(top * top / error), CAP) if top else 0.0


def relative_l2(dense: Tensor, other: Tensor) -> float:
    """‖other − dense‖ / ‖dense‖."""
    first, second = dense.double(), other.double()
    return float((second - first).norm() / first.norm().clamp_min(1e-300))


def cosine(dense: Tensor, other: Tensor) -> float:
    """Cosine of the angle between two tensors, as vectors."""
    first, second = dense.double().flatten(), other.double().flatten()
    return float(first @ second / (first.norm() * second.norm()).clamp_min(1e-300))


def need_ssim() -> None:
    """Raise FidelityError, before anything is drawn, where the library for SSIM or the one for PNG is missing."""
    try:
        import PIL.Image  # noqa: F401
        import skimage.metrics  # noqa: F401
    except ImportError as error:
        raise FidelityError(
            f"fidelity needs {error.name}, which is not installed beside Chipmunk", next_command=INSTALL
        ) from None


def ssim(dense: Any, other: Any) -> float:
    """Structural similarity of two pictures (H, W, 3) uint8, with the Gaussian window of Wang et al., 2004."""
    from skimage import metrics

    compare: Any = metrics.structural_similarity
    return float(
        compare(
            dense,
            other,
            channel_axis=-1,
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )
