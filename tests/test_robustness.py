"Corruptions are what they are meant to be; a drop is due to what the model reads; limits hold the truth."
import hashlib
import io
import os
import subprocess
import sys
import zipfile

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from madeup import ROOT
from skinlesion.audit.artefacts import measure_image
from skinlesion.audit.findings import working_image
from skinlesion.data.metadata import MetadataEncoder
from skinlesion.synthetic.draw import synthesise
from skinlesion.report.figures import plot_stress
from skinlesion.stats.intervals import percentile_interval
from skinlesion.stats.metrics import weighted_auroc, weighted_ece, weighted_metrics
from skinlesion.stats.resamples import Resamples
from skinlesion.evaluate.corruptions import CORRUPTIONS, GRADES, corrupt, corrupt_grades
from skinlesion.evaluate.robustness import permuted_fields, stress_card, stress_images, stress_metadata
from skinlesion.images import read_image, resize_image
from skinlesion.model.inference import predict_metadata_versions, predict_probs
from skinlesion.model.fusion import create_model
from skinlesion.taxonomy import get_label_set
from shares import report

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
    code = ("import hashlib, numpy as np; from skinlesion.evaluate.corruptions import CORRUPTIONS, corrupt; "
            "p = np.add.outer(np.arange(64), np.arange(64))[..., None].repeat(3, 2).astype('uint8'); "
            "print(hashlib.sha256(b''.join(corrupt(p, k, 3, 7, 'x').tobytes() for k in CORRUPTIONS)).hexdigest())")
    elsewhere = os.environ | dict(PYTHONHASHSEED="1", PYTHONPATH=str(ROOT))
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=elsewhere
    ).stdout
    picture = np.add.outer(np.arange(64), np.arange(64))[..., None].repeat(3, 2).astype("uint8")
    assert (
        other.strip()
        == hashlib.sha256(b"".join(corrupt(picture, kind, 3, 7, "x").tobytes() for kind in CORRUPTIONS)).hexdigest()
    )


def test_a_picture_does_not_hang_on_its_neighbours():
    pictures = np.stack([disc(), disc(lesion=(90, 50, 40)), disc(skin=(150, 110, 90))])
    ids = ["a", "b", "c"]
    for kind in CORRUPTIONS:
        whole = corrupt_grades(pictures, kind, (3,), 2, ids)[0]
        turned = corrupt_grades(pictures[::-1], kind, (3,), 2, ids[::-1])[0]
        np.testing.assert_array_equal(whole, turned[::-1])
        np.testing.assert_array_equal(whole[1], corrupt(pictures[1], kind, 3, 2, "b"))
    with pytest.raises(ValueError):
        corrupt_grades(pictures, "hair", (1,), 0, ["a"])


def test_a_higher_grade_holds_the_lower_one():
    "What is dark under hair, in the corners or beside a pen stays so when there is more of it."
    grey = np.full((128, 128, 3), 200, np.uint8)
    for kind in ("hair", "ink", "vignette"):
        for seed in range(6):
            lower, higher = (np.abs(corrupt(grey, kind, g, seed).astype(int) - 200).sum(2) > 60 for g in (2, 4))
            assert (lower & ~higher).sum() <= .2 * lower.sum() and higher.sum() > lower.sum(), (kind, seed)


def test_blur_and_rotation_against_opencv_and_jpeg_against_pillow():
    picture = disc(100)
    np.testing.assert_allclose(
        corrupt(picture, "blur", 5), cv2.GaussianBlur(picture.astype(np.float32), (0, 0), 3.0), atol=0.51
    )
    turned = [corrupt(picture, "rotation", 5, seed) for seed in range(8)]
    assert len({t.tobytes() for t in turned}) == 2  # to either side
    bars = np.zeros((101, 101, 3), np.uint8)
    bars[50, 20:81] = 255
    slope = np.argwhere(corrupt(bars, "rotation", 5)[..., 0] > 100) - 50
    assert np.abs(np.abs(slope[:, 0]) - np.abs(slope[:, 1])).max() <= 1  # a level bar lies on a diagonal
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=8)
    assert (
        away(corrupt(picture, "jpeg", 5), np.asarray(Image.open(buffer)))
        < 2
        < away(np.asarray(Image.open(buffer)), picture) + 1.5
    )


def test_light_by_hand():
    "Stops multiply linear light; a cast leaves the picture's light as it was and turns its colour."
    def linear(v):
        return ((np.asarray(v, float) / 255 + .055) / 1.055) ** 2.4
    grey = np.full((32, 32, 3), 120, np.uint8)
    for grade, stops in zip(GRADES, (.25, .5, .8, 1.1, 1.5)):
        seen = {
            round(float(np.log2(linear(corrupt(grey, "brightness", grade, s)[0, 0, 0]) / linear(120))), 1)
            for s in range(12)
        }
        assert len(seen) == 2 and all(abs(abs(s) - stops) < .06 for s in seen), (grade, seen)
    for seed in range(12):
        cast = linear(corrupt(grey, "colour_cast", 3, seed)[0, 0])
        assert cast @ [.2126, .7152, .0722] == pytest.approx(linear(120), rel=.02)
        assert .22 < np.ptp(np.log(cast)) < .3  # .16 times 1.5 to 1.73: three cosines a third of a turn apart


def seen_in(pictures, ids, kind, grade):
    "On what share of the disturbed pictures the audit sees what was laid over them."
    flag = dict(vignette="dark_corners", blur="blurred").get(kind, kind)
    before = np.array([measure_image(p)[flag] for p in pictures])
    after = np.array([measure_image(corrupt(p, kind, grade, 0, i))[flag] for p, i in zip(pictures, ids)])
    return after[~before].mean()


def check_seen(pictures, ids):
    "The audit, which knows nothing of all this, takes hair for hair and ink for ink."
    least = {("hair", 1): .7, ("hair", 4): .9, ("ink", 3): .7, ("ruler", 1): .6, ("vignette", 3): .9, ("blur", 4): .9}
    found = {at: seen_in(pictures, ids, *at) for at in least}
    print({f"{kind} {grade}": round(float(share), 2) for (kind, grade), share in found.items()})
    assert all(found[at] > share for at, share in least.items()), found


def test_the_audit_sees_what_was_laid_over():
    drawn = [synthesise(HAM.codes[k % 7], np.random.default_rng(k)) for k in range(24)]
    plain = [picture.image for picture in drawn if not picture.artefacts][:12]
    check_seen(plain, [str(k) for k in range(len(plain))])


def test_the_audit_sees_what_was_laid_over_real_pictures():
    if not ARCHIVE.exists():
        pytest.skip("no ../shared/data/ham10000: HAM10000 is not distributed with the project")
    with zipfile.ZipFile(ARCHIVE) as z:
        names = sorted(n for n in z.namelist() if n.endswith(".jpg"))[::400][:12]
        check_seen([working_image(read_image(z.read(n), n)) for n in names], names)


def scripted(clean, stressed):
    "A model that answers first the one, then the other."
    answers = iter([clean, stressed])
    return lambda images, metadata: next(answers)


def draw(n, rng, blunt):
    "Truth, lesion, answers before and after a disturbance that takes `blunt` of the signal and adds noise of its own."
    lesion = np.repeat(np.arange(n), rng.integers(1, 3, n))
    ill = (rng.random(n) < .4)[lesion]
    signal = np.where(ill, 1.3, -1.3) + 1.2 * rng.normal(size=n)[lesion]
    before = signal + .5 * rng.normal(size=len(ill))
    after = (1 - blunt) * signal + 1.2 * rng.normal(size=len(ill))
    return (
        ill.astype(int),
        lesion,
        *(np.stack([1 - p, p], 1) for p in (1 / (1 + np.exp(-1.6 * before)), 1 / (1 + np.exp(-1.6 * after)))),
    )


@pytest.fixture(scope="module")
def truth():
    "What that disturbance takes, from so many lesions that it does not move."
    targets, lesion, before, after = draw(300_000, np.random.default_rng(99), .4)
    def ece(p):
        return weighted_metrics(targets, p, None, ("ece_debiased",), lesion)["ece_debiased"][0]
    def over(p):
        return p.max(1).mean() - (p.argmax(1) == targets).mean()
    def auroc(p):
        return weighted_auroc(targets, p[:, 1])[0]
    return dict(drop=auroc(before) - auroc(after), ece=ece(after) - ece(before), over=over(after) - over(before))


def coverage(truth, runs, seed):
    "How often the limits hold the truth."
    held = dict.fromkeys(truth, 0)
    values = []
    for k in range(runs):
        targets, lesion, before, after = draw(200, np.random.default_rng([seed, k]), .4)
        blank = np.zeros((len(targets), 4, 4, 3), np.uint8)
        row = stress_images(
            scripted(before, after), blank, None, targets, lesion, TWO, ["blur"], [1], n_resamples=400, seed=k
        ).iloc[1]
        for name in truth:
            held[name] += row[f"{name}_low"] <= truth[name] <= row[f"{name}_high"]
        values.append((row["drop"], row["ece_change"], row["over_change"]))
    return held, np.mean(values, axis=0)


def test_limits_of_a_planted_drop_hold_the_truth_subset(truth):
    assert truth["drop"] > .05 and truth["ece"] > .03, truth
    held, mean = coverage(truth, 40, seed=5)
    for name, hits in held.items():
        report(name, hits, 40)
        assert hits >= .95 * 40, (name, hits)
    assert np.abs(mean - list(truth.values())).max() < .03


def plain_ece(runs, seed):
    "Plain ECE under the same disturbance: truth, mean of the estimates, how often percentile limits hold the truth."
    def ece(p, targets, weights=None):
        return weighted_ece(p.argmax(1) == targets, p.max(1), weights)
    targets, _, before, after = draw(300_000, np.random.default_rng(99), .4)
    truth = ece(after, targets)[0] - ece(before, targets)[0]
    held = 0
    values = []
    for k in range(runs):
        targets, lesion, before, after = draw(200, np.random.default_rng([seed, k]), .4)
        weights = Resamples(lesion, 400, k).weights[1:]
        low, high = percentile_interval(ece(after, targets, weights) - ece(before, targets, weights))
        held += low <= truth <= high
        values.append(ece(after, targets)[0] - ece(before, targets)[0])
    return truth, np.mean(values), held


@pytest.mark.slow
def test_limits_of_a_planted_drop_hold_the_truth(truth):
    held, mean = coverage(truth, 1000, seed=6)
    for (name, value), found in zip(truth.items(), mean):
        print(f"{name}: truth {value:.4f}, mean {found:.4f}")
    for name, hits in held.items():
        assert report(name, hits, 1000)[0] >= .91, (name, hits)
    plain, found, hits = plain_ece(400, seed=6)
    print(f"plain ece: truth {plain:.4f}, mean {found:.4f}")
    assert report("plain ece", hits, 400)[1] < .93  # were it as good, there would be no need for another


def test_a_model_of_the_library_under_stress(one_thread):
    "From pictures and a table of people through `predict_probs`: every row is there, and the pictures draw."
    rng = np.random.default_rng(0)
    lesion = np.repeat(np.arange(14), 2)
    targets = np.repeat(np.arange(14) % 7, 2)
    images = np.stack(
        [resize_image(synthesise(HAM.codes[t], np.random.default_rng(k)).image, 48) for k, t in enumerate(targets)]
    )
    sexes = rng.choice(["female", "male", ""], 28)
    sites = rng.choice(["back", "face", ""], 28)
    people = pd.DataFrame(dict(age=rng.integers(20, 90, 28).astype(float), sex=sexes, site=sites))
    encoder = MetadataEncoder.fit(people)
    model = create_model("small_cnn_3", 7, encoder.dim, "concat", seed=1)
    def predict(images, metadata):
        return predict_probs(model, images, metadata)
    def predict_versions(images, versions):
        return [found.heads["diagnosis"] for found in predict_metadata_versions(model, images, versions)]
    table = stress_images(
        predict, images, encoder.encode(people), targets, lesion, HAM, ("hair", "blur"), (1, 5), n_resamples=50
    )
    assert table[["kind", "grade"]].to_numpy().tolist() == [
        ["none", 0],
        ["hair", 1],
        ["hair", 5],
        ["blur", 1],
        ["blur", 5],
    ]
    assert (
        (table.metric == "malignant").all()
        and table.n.eq(28).all()
        and table.n_lesions.eq(14).all()
        and table["drop"].notna().all()
    )
    fields = stress_metadata(
        predict_versions, images, people, encoder, targets, lesion, HAM, permutations=2, n_resamples=50
    )
    refused = fields.reason.str.startswith("refused")
    assert (
        fields.change[refused].str.startswith("out of range").all()
        and refused.sum() == 4
        and fields["drop"][~refused].notna().all()
    )
    alone = stress_images(
        predict, images, encoder.encode(people), targets, lesion, HAM, ("hair",), (5,), n_resamples=50
    )
    np.testing.assert_array_equal(
        alone.iloc[1, 3:-2].to_numpy(float), table.iloc[2, 3:-2].to_numpy(float)
    ) # whatever else was asked
    for drawn in (table, fields):
        assert len(plot_stress(drawn)) == 2
    assert stress_card(table)["hair"]["5"]["drop"]["n_lesions"] == 14
    plt.close("all")


def test_shuffles_move_lesions_and_no_images():
    table = pd.DataFrame(dict(age=np.arange(30.), sex="female", site="back"))
    lesion = np.repeat(np.arange(10), 3)
    for seed in range(10):
        turned = permuted_fields(table, lesion, ["age"], np.random.default_rng(seed))
        given = turned.age.to_numpy().reshape(10, 3)
        assert (
            (given == given[:, :1]).all()
            and sorted(given[:, 0]) == list(range(0, 30, 3))
            and (given[:, 0] != np.arange(0, 30, 3)).all()
        )
