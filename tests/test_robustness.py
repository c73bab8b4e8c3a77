"Robustness: disturbances are what they say, the same each time; a model falls for what it reads and for nothing else; limits hold the truth."
import io
import subprocess
import sys
import zipfile

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from madeup import ROOT
from skinlesion.data.metadata import MetadataEncoder
from skinlesion.evaluate.figures import plot_stress
from skinlesion.evaluate.intervals import wilson_interval
from skinlesion.evaluate.metrics import weighted_auroc, weighted_metrics
from skinlesion.evaluate.robustness import CORRUPTIONS, GRADES, corrupt, corrupt_images, permuted_fields, stress_card, stress_images, stress_metadata
from skinlesion.images import read_image, resize_image
from skinlesion.model.bundle import predict_probs
from skinlesion.model.fusion import create_model
from skinlesion.taxonomy import get_label_set

TWO = get_label_set("melanoma")
HAM = get_label_set("ham10000")
ARCHIVE = ROOT.parent / "shared" / "data" / "ham10000" / "HAM10000_images_part_1.zip"


def away(a, b):
    "Mean absolute difference of two pictures."
    return np.abs(a.astype(int) - b).mean()


def disc(size=96, skin=(226, 178, 158), lesion=(140, 84, 62)):
    "A plain lesion on plain skin."
    picture = np.full((size, size, 3), skin, np.uint8)
    return cv2.circle(picture, (size // 2, size // 2), size // 5, lesion, -1, cv2.LINE_AA)


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(96, 96), (224, 224), (120, 160), (16, 16)])
def test_grades_go_up_at_every_size(kind, shape):
    picture = cv2.resize(disc(224), shape[::-1], interpolation=cv2.INTER_AREA)
    views = [corrupt(picture, kind, g, seed=1, image_id="a") for g in GRADES]
    assert all(v.shape == picture.shape and v.dtype == np.uint8 for v in views)
    far = [away(v, picture) for v in views]
    assert far[4] > far[0] and (min(shape) < 96 or all(a <= b for a, b in zip(far, far[1:]))), far
    assert [v.tobytes() for v in views] == [corrupt(picture, kind, g, seed=1, image_id="a").tobytes() for g in GRADES]


def test_another_process_gives_the_same_bytes():
    "Nothing hangs on the order of a set or the hash of a word."
    code = ("import hashlib, numpy as np; from skinlesion.evaluate.robustness import CORRUPTIONS, corrupt; "
            "p = np.add.outer(np.arange(64), np.arange(64))[..., None].repeat(3, 2).astype('uint8'); "
            "print(hashlib.sha256(b''.join(corrupt(p, k, 3, 7, 'x').tobytes() for k in CORRUPTIONS)).hexdigest())")
    first, second = (subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": h, "PYTHONPATH": str(ROOT)}).stdout
                     for h in ("1", "2"))
    assert first == second and len(first) == 65


def test_a_picture_does_not_hang_on_its_neighbours():
    pictures = np.stack([disc(), disc(lesion=(90, 50, 40)), disc(skin=(150, 110, 90))])
    ids = ["a", "b", "c"]
    for kind in CORRUPTIONS:
        whole = corrupt_images(pictures, kind, 3, 2, ids)
        turned = corrupt_images(pictures[::-1], kind, 3, 2, ids[::-1])
        np.testing.assert_array_equal(whole, turned[::-1])
        np.testing.assert_array_equal(whole[1], corrupt(pictures[1], kind, 3, 2, "b"))
    with pytest.raises(ValueError): corrupt_images(pictures, "hair", 1, 0, ["a"])


def test_a_higher_grade_holds_the_lower_one():
    "What is dark under hair, in the corners or beside a pen stays so when there is more of it."
    grey = np.full((128, 128, 3), 200, np.uint8)
    for kind in ("hair", "ink", "vignette"):
        for seed in range(6):
            lower, higher = (np.abs(corrupt(grey, kind, g, seed).astype(int) - 200).sum(2) > 60 for g in (2, 4))
            assert (lower & ~higher).sum() <= .2 * lower.sum() and higher.sum() > lower.sum(), (kind, seed)


def test_blur_and_rotation_against_opencv_and_jpeg_against_pillow():
    picture = disc(100)
    np.testing.assert_allclose(corrupt(picture, "blur", 5), cv2.GaussianBlur(picture.astype(np.float32), (0, 0), 3.), atol=.51)
    turned = [corrupt(picture, "rotation", 5, seed) for seed in range(8)]
    assert len({t.tobytes() for t in turned}) == 2  # to either side
    bars = np.zeros((101, 101, 3), np.uint8)
    bars[50, 20:81] = 255
    slope = np.argwhere(corrupt(bars, "rotation", 5)[..., 0] > 100) - 50
    assert np.abs(np.abs(slope[:, 0]) - np.abs(slope[:, 1])).max() <= 1  # a level bar lies on a diagonal
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=8)
    assert away(corrupt(picture, "jpeg", 5), np.asarray(Image.open(buffer))) < 2 < away(np.asarray(Image.open(buffer)), picture) + 1.5


def test_light_by_hand():
    "Stops multiply linear light; a cast leaves the picture's light as it was and turns its colour."
    linear = lambda v: ((np.asarray(v, float) / 255 + .055) / 1.055) ** 2.4
    grey = np.full((32, 32, 3), 120, np.uint8)
    for grade, stops in zip(GRADES, (.25, .5, .8, 1.1, 1.5)):
        seen = {round(float(np.log2(linear(corrupt(grey, "brightness", grade, s)[0, 0, 0]) / linear(120))), 1) for s in range(12)}
        assert len(seen) == 2 and all(abs(abs(s) - stops) < .06 for s in seen), (grade, seen)
    for seed in range(12):
        cast = linear(corrupt(grey, "colour_cast", 3, seed)[0, 0])
        assert cast @ [.2126, .7152, .0722] == pytest.approx(linear(120), rel=.02)
        assert np.ptp(np.log(cast)) == pytest.approx(.16 * np.ptp(np.log(cast)) / .16) and .2 < np.ptp(np.log(cast)) < .3


def scripted(clean, stressed):
    "A model that answers first the one, then the other."
    answers = iter([clean, stressed])
    return lambda images, metadata: next(answers)


def draw(n, rng, blunt):
    "Truth, lesion, answers before and after a disturbance that takes `blunt` of the signal and adds noise of its own."
    lesion = np.repeat(np.arange(n), rng.integers(1, 3, n))
    ill = (rng.random(n) < .4)[lesion]
    signal = np.where(ill, 1.3, -1.3) + 1.2 * rng.normal(size=n)[lesion]
    before, after = signal + .5 * rng.normal(size=len(ill)), (1 - blunt) * signal + 1.2 * rng.normal(size=len(ill))
    return ill.astype(int), lesion, *(np.stack([1 - p, p], 1) for p in (1 / (1 + np.exp(-1.6 * before)), 1 / (1 + np.exp(-1.6 * after))))


@pytest.fixture(scope="module")
def truth():
    "What that disturbance takes, from so many lesions that it does not move."
    targets, lesion, before, after = draw(300_000, np.random.default_rng(99), .4)
    ece = lambda p: weighted_metrics(targets, p, None, ("ece_debiased",), lesion)["ece_debiased"][0]
    over = lambda p: p.max(1).mean() - (p.argmax(1) == targets).mean()
    return dict(drop=weighted_auroc(targets, before[:, 1])[0] - weighted_auroc(targets, after[:, 1])[0], ece=ece(after) - ece(before), over=over(after) - over(before))


def coverage(truth, runs, seed):
    "How often the limits hold the truth."
    held, values = dict.fromkeys(truth, 0), []
    for k in range(runs):
        targets, lesion, before, after = draw(200, np.random.default_rng([seed, k]), .4)
        row = stress_images(scripted(before, after), np.zeros((len(targets), 4, 4, 3), np.uint8), None, targets, lesion, TWO, ["blur"], [1], n_resamples=400, seed=k).iloc[1]
        for name in truth: held[name] += row[f"{name}_low"] <= truth[name] <= row[f"{name}_high"]
        values.append((row["drop"], row["ece_change"], row["over_change"]))
    return held, np.mean(values, axis=0)


def report(words, hits, runs):
    "Print a share with its interval, for those who run with -s."
    low, high = wilson_interval(hits / runs, runs)
    print(f"{words}: {hits} of {runs}, {hits / runs:.3f} ({low:.3f}-{high:.3f})")
    return low, high


def test_limits_of_a_planted_drop_hold_the_truth_subset(truth):
    assert truth["drop"] > .05 and truth["ece"] > .03, truth
    held, mean = coverage(truth, 40, seed=5)
    for name, hits in held.items(): assert report(name, hits, 40)[1] >= .95, (name, hits)
    assert np.abs(mean - list(truth.values())).max() < .03


@pytest.mark.slow
def test_limits_of_a_planted_drop_hold_the_truth(truth):
    held, mean = coverage(truth, 1000, seed=6)
    for (name, value), found in zip(truth.items(), mean): print(f"{name}: truth {value:.4f}, mean {found:.4f}")
    for name, hits in held.items(): assert report(name, hits, 1000)[0] >= .91, (name, hits)


