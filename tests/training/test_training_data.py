"""The training data can be rebuilt: the same pictures and captions from a seed, in a vocabulary that is listed."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from training import photographs
from training.data import KINDS, SIZE, VOCABULARY, Words, pictures, say, tokens
from training.prompts import PROMPTS
from training.scenes.paint import Canvas, Dice, box, circle, ellipse, trapezium, triangle

# the starter's modules; `training` makes them importable
from flux.sampling import prepare, unpack  # isort: skip
from flux.util import configs, load_ae, load_clip, load_t5  # isort: skip

CPU = torch.device("cpu")
PHOTOS = {"a cat": torch.rand(3, 40, 60, generator=torch.Generator().manual_seed(0))}


@pytest.fixture(scope="module")
def words() -> Words:
    return Words(load_t5("flux-mini"), load_clip("flux-mini"), CPU)


@pytest.mark.parametrize("kind", sorted(set(KINDS)))
def test_a_seed_means_the_same_pictures_and_another_means_others(kind: str, words: Words) -> None:
    number = KINDS.index(kind)
    first, again, other = (pictures(number, seed, CPU, PHOTOS, n=2) for seed in (3, 3, 4))
    assert torch.equal(first.pixels, again.pixels)
    assert first.captions == again.captions
    assert (first.pixels - other.pixels).abs().mean() > 0.02
    assert first.pixels.shape == (2, 3, SIZE, SIZE)
    assert first.pixels.min() >= -1
    assert first.pixels.max() <= 1
    assert first.pixels.std() > 0.1
    assert not torch.equal(first.pixels[0], first.pixels[1])
    words.encode(first.captions)


@pytest.mark.parametrize("kind", sorted(set(KINDS)))
def test_pictures_stay_on_their_device_and_captions_in_the_vocabulary(kind: str) -> None:
    """Tensors without data stand for the GPU's: operations that mix them with the CPU's are errors."""
    drawn = pictures(KINDS.index(kind), 9, torch.device("meta"), PHOTOS, n=60)
    assert drawn.pixels.is_meta
    for caption in drawn.captions:
        assert set(caption.split()) <= set(VOCABULARY)
        assert len(caption.split()) < configs["flux-mini"].text_tokens


def test_captions_keep_their_subject_and_lose_other_phrases_half_the_time() -> None:
    phrases = ["a orange fish", "swimming left", "", "in the clear sea"]
    said = [say(phrases, random.Random(seed)) for seed in range(400)]
    assert all(caption.startswith("an orange fish") for caption in said)
    whole = sum(caption == "an orange fish swimming left in the clear sea" for caption in said)
    assert 0.55 < whole / len(said) < 0.80  # a half, and those that happened to lose nothing
    assert "an orange fish" in said


def test_words_are_looked_up_as_the_starters_conditioners_compute_them(words: Words) -> None:
    t5, clip = load_t5("flux-mini"), load_clip("flux-mini")
    captions = [*PROMPTS, "", "Two RED boats, on the sea!"]
    sequence, pooled = words.embed(words.encode(captions[:-2]))
    torch.testing.assert_close(sequence, t5(captions[:-2]))
    torch.testing.assert_close(pooled, clip(captions[:-2]))
    torch.testing.assert_close(words.embed(words.encode(captions[-1:]))[0], t5(["two red boats on the sea"]))
    assert torch.equal(words.empty[0], t5([""]))
    assert torch.equal(words.empty[1], clip([""]))
    with pytest.raises(KeyError, match="dragon"):
        words.encode(["a red dragon"])


def test_text_says_what_belongs_together_and_in_which_order(words: Words) -> None:
    sequence, pooled = words.embed(words.encode(["a red ball and a blue cube", "a blue ball and a red cube"]))
    assert torch.allclose(pooled[0], pooled[1], atol=1e-6)  # the same words
    different = (sequence[0] != sequence[1]).any(dim=-1)
    assert different[[1, 2, 3, 5, 6, 7]].all()  # red, ball, and, blue, cube, and what comes after the cube
    assert not different[[0, 4]].any()
    assert not different[8:].any()


def test_the_vocabulary_is_small() -> None:
    assert len(set(VOCABULARY)) == len(VOCABULARY) < 128
    assert configs["flux-mini"].text_tokens >= 16


def test_tokens_are_what_the_starter_packs_and_little_is_lost() -> None:
    ae = load_ae("flux-mini")
    pixels = torch.cat([pictures(number, 1, CPU, PHOTOS, n=1).pixels for number in range(5)])
    packed = tokens(ae, pixels)
    assert packed.shape == (5, 1024, 64)
    given = prepare(load_t5("flux-mini"), load_clip("flux-mini"), ae.encode(pixels), ["a fish"] * 5)
    assert torch.equal(given["img"], packed)
    error = (ae.decode(unpack(packed, SIZE, SIZE, 8)) - pixels).div(2).square().mean(dim=(1, 2, 3))
    assert (-10 * error.log10()).min() > 30


def test_shapes_are_where_they_should_be() -> None:
    """Signed distances: negative inside, positive outside, zero on the edge."""
    x, y = (value.reshape(1, 1, 1) for value in torch.tensor([0.3, 0.0]))
    zero = torch.zeros(1, 1, 1)
    for shape, edge in (
        (lambda u, v: circle(u, v, 0.3), (x, y)),
        (lambda u, v: ellipse(u, v, 0.3, 0.1), (x, y)),
        (lambda u, v: box(u, v, 0.3, 0.1), (x, y)),
        (lambda u, v: triangle(u, v - 0.05, 0.6, 0.1), (x, y)),
        (lambda u, v: trapezium(u, v + 0.05, 0.2, 0.4, 0.1), (x, y)),
    ):
        assert shape(*edge).abs() < 1e-6
        assert shape(zero, zero) < 0 < shape(2 * x, y)


def test_hashed_noise_is_normal_and_its_pictures_independent() -> None:
    noise = Dice(4, 0, CPU).normal(64, 64)
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05
    together = torch.corrcoef(noise.flatten(1)) - torch.eye(4)
    assert together.abs().max() < 0.08
    assert (noise[..., 1:] * noise[..., :-1]).mean().abs() < 0.06
    assert (noise[..., 1:, :] * noise[..., :-1, :]).mean().abs() < 0.06


def test_paint_covers_half_of_the_pixels_that_an_edge_halves() -> None:
    canvas = Canvas(1, 4, CPU)
    canvas.shape(canvas.x - 0.375 + 0 * canvas.y, torch.ones(1, 3, 1, 1))
    torch.testing.assert_close(canvas.pixels[0, 0, 0], torch.tensor([1.0, 0.5, 0.0, 0.0]))


def test_photographs_come_from_a_file_and_crops_from_inside_them(tmp_path: Path) -> None:
    photo = np.zeros((30, 50, 3), dtype=np.uint8)
    photo[:, :, 0] = np.arange(50) * 5
    np.savez_compressed(tmp_path / "photographs.npz", **{"a cat": photo})
    stored = photographs.load(tmp_path / "photographs.npz")
    assert torch.equal(stored["a cat"], torch.from_numpy(photo).permute(2, 0, 1).float() / 255)
    crops = photographs.crops(Dice(20, 0, CPU), stored["a cat"], 16)
    assert crops.shape == (20, 3, 16, 16)
    rise = crops[:, 0, 8, 12] - crops[:, 0, 8, 4]
    assert 0 < (rise < 0).sum() < 20  # some are mirrored
    assert len({photograph.subject for photograph in photographs.PHOTOGRAPHS}) == len(photographs.PHOTOGRAPHS)
    assert all(photograph.licence and photograph.author for photograph in photographs.PHOTOGRAPHS)
