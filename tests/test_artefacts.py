"""Findings from pixels and columns, against what was planted and what is known of HAM10000."""
import pickle
import zipfile

import cv2
import numpy as np
import pandas as pd
import pytest

from madeup import ROOT
from skinlesion.audit.artefacts import FLAGS, estimate_mask, measure_image, pixel_findings
from skinlesion.colour import skin_tone
from skinlesion.audit.findings import working_image
from skinlesion.audit.shortcuts import (
    BACKGROUND_NAMES,
    background_features,
    metadata_findings,
    pixel_features,
    shortcut_findings,
)
from skinlesion.synthetic.draw import draw_lesion, take_view
from skinlesion.synthetic.truth import make_synthetic, read_truth
from skinlesion.images import read_image, read_mask
from skinlesion.taxonomy import get_label_set

HAM = ROOT.parent / "shared" / "data" / "ham10000"
HAM10000 = get_label_set("ham10000")


def scan(dataset):
    "Measures, background and lesion features of every image."
    found = [
        pixel_features(working_image(read_image(dataset.image_path(i))), read_mask(dataset.mask_path(i)))
        for i in dataset.table.image_id
    ]
    return (
        pd.DataFrame([f[0] for f in found], index=dataset.table.image_id),
        np.stack([f[1] for f in found]),
        np.stack([f[2] for f in found]),
    )


def by_kind(findings):
    "Findings by their kind."
    return {f.kind: f for f in findings}


def share(flag, truth):
    "Sensitivity and specificity."
    return flag[truth].mean(), 1 - flag[~truth].mean()


@pytest.fixture(scope="session")
def trapped(tmp_path_factory):
    "A set with a ruler on most melanomas of the training split, and what is measured on it."
    root = tmp_path_factory.mktemp("trapped") / "data"
    dataset = make_synthetic(
        root,
        per_class=dict(mel=72, nv=60, bkl=20, bcc=3, akiec=3, df=3, vasc=3),
        seed=11,
        size=(96, 128),
        shortcut="ruler",
    )
    return dataset, read_truth(root).table.set_index("image_id"), *scan(dataset)


def test_the_planted_ruler_is_found_in_training_only(trapped):
    "The shortcut of the embedded data: a ruler on 80 % of the training melanomas."
    dataset, _, measures, *_ = trapped
    ruler = by_kind(pixel_findings(measures, dataset.table, dataset.label_set))["artefact-ruler"]
    assert ruler.severity == "warning" and ruler.items[0]["name"] == "mel/train"
    assert not {"mel/valid", "mel/test"} & {i["name"] for i in ruler.items}
    assert set(ruler.items[0]["images"]) <= set(
        dataset.table.image_id[(dataset.table.diagnosis == "mel") & (dataset.table.split == "train")]
    )


def test_flags_against_truth(trapped):
    "Each detector on images that no limit was set on."
    _, truth, measures, *_ = trapped
    names = truth.artefacts.loc[measures.index].str.split("; ")
    for flag, name, sensitive, specific in (
        ("dark_corners", "corners", 0.9, 0.97),
        ("ruler", "ruler", 0.55, 0.96),
        ("hair", "hair", 0.3, 0.88),
    ):
        sensitivity, specificity = share(measures[flag].to_numpy(bool), names.map(lambda a: name in a).to_numpy())
        assert sensitivity >= sensitive and specificity >= specific, (flag, sensitivity, specificity)


def test_typology_angles_against_truth(trapped):
    "The angle measured is the angle shown: half of them within 2 degrees."
    _, truth, measures, *_ = trapped
    shown = truth.ita_shown.loc[measures.index]
    assert (measures.ita - shown).abs().median() < 2
    assert (measures.ita.map(skin_tone) == shown.map(skin_tone)).mean() > .85


def test_ink_beside_the_lesion_is_seen():
    "Violet pen strokes, with and without, on the same lesions; they are no hair."
    rng = np.random.default_rng(3)
    pairs = []
    for code in ("nv", "mel", "bkl", "bcc") * 3:
        lesion = draw_lesion(code, rng, (96, 128))
        seed = rng.integers(1 << 30)
        pairs.append(
            [
                take_view(lesion, np.random.default_rng(seed), False, inked, rates=dict(hair=0, corners=0))
                for inked in (True, False)
            ]
        )
    flags = np.array([[measure_image(s.image, s.lesion)["ink"] for s in pair] for pair in pairs])
    assert flags[:, 0].mean() >= .7 and not flags[:, 1].any()


@pytest.mark.slow
@pytest.mark.parametrize("shortcut, code, kind", [("cast", "nv", "background-shortcut"), ("ink", "bcc", "artefact-ink"),
                                                  ("ruler", "mel", "artefact-ruler")])
def test_each_planted_shortcut_is_found(tmp_path, shortcut, code, kind):
    "Orange light on nevi everywhere, ink and ruler in training: each is reported with its class."
    where = "all" if shortcut == "cast" else "train"
    dataset = make_synthetic(tmp_path / "data", seed=5, shortcut=shortcut, shortcut_class=code, shortcut_where=where)
    measures, background, whole = scan(dataset)
    found = pixel_findings(measures, dataset.table, dataset.label_set)
    found = by_kind(
        found + shortcut_findings(background, BACKGROUND_NAMES, dataset.table, dataset.label_set, visible=whole)
    )[kind]
    assert found.severity == "warning" and code in found.items[0]["name"]
    if shortcut == "cast":
        assert "a* (redness)" in found.items[0]["note"]


@pytest.mark.slow
def test_a_set_without_a_trap_has_no_such_warning(tmp_path):
    "Rulers and ink on all classes alike are a note."
    dataset = make_synthetic(tmp_path / "data", seed=6, shortcut="none", rates=dict(ruler=.3, ink=.2))
    measures, *_ = scan(dataset)
    found = by_kind(pixel_findings(measures, dataset.table, dataset.label_set))
    assert found["artefact-ruler"].severity == found["artefact-ink"].severity == "note"


def test_the_functions_travel_to_workers():
    "Per-image functions are module functions: they can be pickled, and do not change their input."
    for f in (measure_image, background_features, pixel_features, estimate_mask):
        assert pickle.loads(pickle.dumps(f)) is f
    image = draw_lesion("nv", np.random.default_rng(0), (96, 128))
    image = take_view(image, np.random.default_rng(1)).image
    before = image.copy()
    pixel_features(image)
    assert (image == before).all()


UNUSUAL = dict(
    black=np.zeros((150, 200, 3), np.uint8),
    white=np.full((150, 200, 3), 255, np.uint8),
    strip=np.zeros((16, 256, 3), np.uint8),
    noise=np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8),
    tiny=np.full((20, 20, 3), (200, 150, 140), np.uint8),
)


@pytest.mark.parametrize("image", UNUSUAL.values(), ids=UNUSUAL)
@pytest.mark.parametrize("mask", [None, "empty", "full"])
def test_any_image_has_measures(image, mask):
    "Black, white, narrow, noisy or tiny: numbers or NaN, no warning, no error."
    if mask:
        mask = np.full(image.shape[:2], mask == "full")
    with np.errstate(all="raise"):
        measures, background, whole = pixel_features(image, mask)
    assert all(np.isfinite(measures[m]) for m, _, _ in FLAGS.values())
    assert np.isfinite(whole[:-len(BACKGROUND_NAMES)]).all()
    assert np.isfinite(background).all() or np.isnan(background).all()


@pytest.fixture(scope="session")
def ham():
    "A sample of HAM10000: table, images, masks."
    if not HAM.is_dir():
        pytest.skip("no ../shared/data/ham10000: HAM10000 is not distributed with the project")
    table = pd.read_csv(HAM / "HAM10000_metadata.csv")
    table = table.rename(columns=dict(dx="diagnosis", dx_type="diagnosis_confirm_type", localization="site"))
    table = pd.concat([part.sample(min(len(part), 200 if code == "nv" else 75), random_state=0)
                       for code, part in table.groupby("diagnosis")])
    table = (
        table.assign(age=table.age.replace(0, np.nan))
        .replace(dict(sex=dict(unknown=""), site=dict(unknown="")))
        .reset_index(drop=True)
    )
    files = {}
    ids = set(table.image_id)
    for archive in sorted(HAM.glob("*.zip")):
        with zipfile.ZipFile(archive) as z:
            wanted = {n: n.rsplit("/", 1)[-1].split(".")[0].removesuffix("_segmentation") for n in z.namelist()}
            for name, image_id in wanted.items():
                if image_id in ids:
                    files["mask" if name.endswith(".png") else "image", image_id] = z.read(name)
    images = [read_image(files["image", i], i) for i in table.image_id]
    masks = [cv2.imdecode(np.frombuffer(files["mask", i], np.uint8), 0) > 0 for i in table.image_id]
    return table, images, masks


def test_orange_nevi_and_dx_type_are_found_in_ham10000(ham):
    "The shortcut of the real data: followed-up nevi have redder skin; dx_type knows the class."
    table, images, masks = ham
    found = [pixel_features(i, m) for i, m in zip(images, masks)]
    measures = pd.DataFrame([f[0] for f in found], index=table.image_id)
    redness = measures.skin_a.groupby(table.diagnosis.to_numpy()).median()
    assert redness["nv"] > 24 and redness.drop("nv").max() < 21
    shortcut, = shortcut_findings(np.stack([f[1] for f in found]), BACKGROUND_NAMES, table, HAM10000, n_resamples=200)
    nevus = next(i for i in shortcut.items if i["name"] == "nv")
    assert (
        shortcut.severity == "warning" and shortcut.metrics["nv"]["low"] > 0.75 and "skin a* (redness)" in nevus["note"]
    )
    columns = by_kind(metadata_findings(table, HAM10000, n_resamples=200))
    assert [i["name"] for i in columns["metadata-shortcut"].items] == ["diagnosis_confirm_type"]
    assert {"age", "sex", "site"} <= {i["name"] for i in columns["metadata-signal"].items}


def test_guessed_masks_against_the_publisher_s(ham):
    "Dice of `estimate_mask` on HAM10000; the mean over 7,064 images is 0.87."
    _, images, masks = ham
    dice = [
        2 * (a & b).sum() / max(1, a.sum() + b.sum())
        for a, b in ((estimate_mask(i), m) for i, m in zip(images[::3], masks[::3]))
    ]
    assert np.mean(dice) > .77 and np.median(dice) > .85
