# SPDX-License-Identifier: Apache-2.0
"""Data sets in training: the mix, its order, and the way of a pair from the disk to the loss."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from contextlib import closing
from pathlib import Path

import cv2
import dataset_layouts as layouts
import numpy as np
import pytest
import tiny_training as tiny
import torch

from deq_flow_ros.recordings.flow_files import write_flow
from training import train
from training.flow_dataset import Clip, Sample
from training.samples import Mix, load_ahead, to_clip, training_samples

SOURCES = "data.sources=[{dataset: chairs, repeat: 2}, {dataset: kitti-2015, augmentation: {eraser_probability: 0}}]"
STILL = ("brightness", "contrast", "saturation", "hue", "eraser_probability")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny data sets, each in a folder of its own."""
    root = tmp_path_factory.mktemp("data")
    layouts.write_chairs(root / "chairs")
    layouts.write_kitti(root / "kitti")
    layouts.write_sintel(root / "sintel")
    layouts.write_hd1k(root / "hd1k")
    layouts.write_things(root / "things")
    return root


def mix(root: Path, *changes: str) -> Mix:
    roots = f"data.roots={{chairs: {root / 'chairs'}, kitti: {root / 'kitti'}}}"
    samples = training_samples(tiny.recipe(roots, *(changes or [SOURCES])))
    assert isinstance(samples, Mix)
    return samples


def test_one_pass_has_every_pair_as_often_as_asked_for(root: Path) -> None:
    """Why: the mix of a benchmark recipe is a matter of these counts; and each pass needs an order of its own."""
    samples = mix(root)
    passes = [[samples.sample(start + number).name for number in range(8)] for start in (0, 8)]
    for names in passes:  # three pairs of Chairs twice, two of KITTI once
        assert sorted(Counter(names).values()) == [1, 1, 2, 2, 2]
        assert sum(name.startswith("kitti-2015/") for name in names) == 2
    assert passes[0] != passes[1] and sorted(passes[0]) == sorted(passes[1])


def test_a_sample_is_a_function_of_its_number(root: Path) -> None:
    """Why: resumed, or made ahead by workers, a run must see the same pairs, augmented the same way."""
    samples = mix(root)
    whole = samples[range(8)]
    with closing(load_ahead(pickle.loads(pickle.dumps(samples)), 0, batch=4, workers=2)) as clips:
        elsewhere = Clip.join([next(clips) for _ in range(2)])
    for name in ("images", "flow", "valid", "occluded", "numbers"):
        assert torch.equal(getattr(whole, name), getattr(elsewhere, name)), name
    assert not torch.equal(whole.images[:4], whole.images[4:])


def test_what_reaches_the_loss_moves_one_image_onto_the_other(root: Path) -> None:
    """Why: axes or signs mixed up between the reader, the augmentation and the tensors would still train, badly."""
    still = ", ".join(f"{name}: 0" for name in STILL)
    samples = mix(root, f"data.sources=[{{dataset: chairs, augmentation: {{{still}}}}}]")
    clip = samples[range(6)].to("cpu")
    assert clip.images.dtype == torch.float32 and clip.images.shape == (6, 2, 3, 32, 48)
    for images, flow, valid in zip(clip.images, clip.flow[:, 0], clip.valid[:, 0], strict=True):
        image1, image2 = (image.permute(1, 2, 0).numpy() for image in images)
        moved = layouts.mean_difference(image1, image2, flow.permute(1, 2, 0).numpy(), valid.numpy())
        unmoved = layouts.mean_difference(image1, image2, np.zeros((32, 48, 2), np.float32), valid.numpy())
        assert moved < 3 and moved < 0.5 * unmoved


def test_what_cannot_be_seen_or_is_too_long_is_marked() -> None:
    """Why: a match outside of the image must not count as visible, whether or not the data set says so."""
    flow = np.zeros((16, 24, 2), np.float32)
    flow[0, 0], flow[1, 1], flow[2, 2] = (-3, 0), (0, 500), (4, 4)
    image, valid = np.zeros((16, 24, 3), np.uint8), np.ones((16, 24), bool)
    valid[3, 3] = False
    hidden = np.zeros((16, 24), bool)
    hidden[5, 5] = True
    clip = Clip.join([to_clip(Sample("a/1", image, image, flow, valid, given), 400) for given in (None, hidden)])
    assert [tuple(i) for i in (~clip.valid[0, 0]).nonzero().tolist()] == [(1, 1), (3, 3)]
    assert not clip.flow[:, 0, :, 1, 1].any() and clip.flow[0, 0, :, 2, 2].tolist() == [4, 4]
    assert clip.occluded[:, 0, 0, 0].all() and not clip.occluded[:, 0, 2, 2].any()
    assert clip.occluded[:, 0, 5, 5].tolist() == [False, True]


def test_the_mix_for_sintel_trains(root: Path, tmp_path: Path) -> None:
    """Why: five data sets, dense and sparse, in one batch; with worker processes, and validated on two of them."""
    arguments = ["--recipe", "sintel", "--size", "nano", "--variant", "efficient"]
    arguments += tiny.arguments(
        tmp_path, "data.batch=4", "data.frames=2", "schedule.steps=2", "schedule.kind=one-cycle"
    )
    arguments += ["validation.sets=[{dataset: sintel-clean, limit: 1}, {dataset: kitti-2015, limit: 1}]"]
    arguments += ["--data", *(f"{name}={root / name}" for name in ("sintel", "kitti", "hd1k", "things"))]
    arguments[arguments.index("--workers") + 1] = "1"
    assert train.main(arguments) == 0
    assert sorted(tiny.losses(tmp_path)) == [1, 2] and (tmp_path / "one_cycle.pt").is_file()
    assert set(tiny.log(tmp_path)[-1]["validation"]) == {"sintel-clean", "kitti-2015", "mean"}


def test_a_list_of_pairs_of_your_own_trains(tmp_path: Path) -> None:
    """Why: the way to train on data that no reader here knows."""
    scene = layouts.Scene(3)
    for time in range(2):
        cv2.imwrite(str(tmp_path / f"{time}.png"), scene.image(time))
    write_flow(tmp_path / "flow.flo", scene.flow(0, 1))
    entry = {"name": "mine/1", "image1": "0.png", "image2": "1.png", "flow": "flow.flo"}
    (tmp_path / "pairs.json").write_text(json.dumps([entry]))
    arguments = tiny.arguments(tmp_path / "run", "data.sources=[{dataset: pairs}]", "schedule.steps=1")
    assert train.main([*arguments, "--data", f"pairs={tmp_path / 'pairs.json'}"]) == 0


def test_a_damaged_image_ends_the_run_with_its_name(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Why: hours into a run in a worker process, the name of the file is all that helps."""
    layouts.write_chairs(tmp_path / "chairs", splits="1")
    image = next((tmp_path / "chairs").rglob("*img2.ppm"))
    image.write_bytes(image.read_bytes()[:40])
    arguments = tiny.arguments(tmp_path / "run", "data.sources=[{dataset: chairs}]", "schedule.steps=1")
    arguments[arguments.index("--workers") + 1] = "1"
    assert train.main([*arguments, "--data", f"chairs={tmp_path / 'chairs'}"]) == 2
    assert f"{image} cannot be read as an image" in capsys.readouterr().out
