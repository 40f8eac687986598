"""PSNR, relative L2, cosine and SSIM, on values that can be told by hand."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

from chipmunk.fidelity.metrics import CAP, cosine, psnr, relative_l2, ssim


def test_psnr_of_a_known_error() -> None:
    dense = torch.zeros(8, 8, 3, dtype=torch.uint8)
    other = dense.clone() + 5
    assert psnr(dense, other, 255.0) == pytest.approx(10 * math.log10(255**2 / 25))


def test_psnr_of_bytes_does_not_wrap_around() -> None:
    dense, other = torch.full((4,), 3, dtype=torch.uint8), torch.full((4,), 5, dtype=torch.uint8)
    assert psnr(dense, other, 255.0) == psnr(other, dense, 255.0) == pytest.approx(10 * math.log10(255**2 / 4))


def test_psnr_of_latents_takes_their_range() -> None:
    dense = torch.tensor([-1.0, 3.0])
    assert psnr(dense, dense + 0.4) == pytest.approx(20.0)


def test_psnr_of_the_same_is_a_number() -> None:
    x = torch.randn(3, 5)
    assert psnr(x, x.clone()) == CAP


def test_psnr_of_a_flat_picture_that_differs_is_low() -> None:
    assert psnr(torch.ones(4), torch.zeros(4)) == 0.0


def test_relative_l2_and_cosine() -> None:
    dense = torch.tensor([3.0, 4.0])
    assert relative_l2(dense, torch.tensor([3.0, 4.5])) == pytest.approx(0.1)
    assert cosine(dense, -2 * dense) == pytest.approx(-1)
    assert cosine(dense, torch.tensor([-4.0, 3.0])) == pytest.approx(0, abs=1e-12)


def test_ssim_is_one_for_the_same_and_falls_with_structure() -> None:
    rng = numpy.random.default_rng(0)
    picture = rng.integers(0, 256, (32, 32, 3), dtype=numpy.uint8)
    shuffled = rng.permutation(picture.reshape(-1, 3)).reshape(picture.shape)
    assert ssim(picture, picture) == pytest.approx(1)
    assert ssim(picture, shuffled) < 0.2
