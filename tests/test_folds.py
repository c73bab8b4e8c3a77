"""A member of several folds, from its training to the prediction for a picture.

No lesion is predicted by a fit that was trained on it; an image that is new to all fits gets their mean, in evaluation
and in use alike.
"""
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from skinlesion.data.datasets import LesionDataset
from skinlesion.data.metadata import MetadataEncoder
from skinlesion.data.store import ImageStore
from skinlesion.evaluate.policy import MemberOutputs, choose_policy, fit_ood
from skinlesion.images import save_png
from skinlesion.model.bundle import load_fits, save_bundle, save_member
from skinlesion.model.bundle_files import BundleError
from skinlesion.model.inference import (
    fold_of, member_views, predict_heads, predict_member, predict_outputs, read_out_of_fold, views_table,
)
from skinlesion.model.outputs import Outputs
from skinlesion.model.member import train_folds
from skinlesion.model.recipe import Recipe
from skinlesion.taxonomy import LabelSet
from skinlesion.use.predict import Predictor
from tiny import build_prepared, copy_repository, edit_params, make_tiny, run

LABELS = LabelSet("squares", ("a", "b", "c"), dict(a="a", b="b", c="c"), frozenset("c"))
ENCODER = MetadataEncoder(50.0, 20.0)
HEADS = dict(grade=dict(kind="ordinal", levels=["low", "middle", "high"]), malignant=dict(kind="binary"))
FOLDS = 3


class Store:
    "Noisy squares in memory, one colour for each class."
    size = 32

    def __init__(self, rows):
        pixels = np.random.default_rng(0).normal(110, 40, (len(rows), 32, 32, 3))
        for image, code in zip(pixels, rows.diagnosis):
            image[..., "abc".index(code)] += 40
        self.images = dict(zip(rows.image_id, pixels.clip(0, 255).astype(np.uint8)))

    def position(self, image_id):
        return list(self.images).index(image_id)
    def image(self, image_id):
        return self.images[image_id]


def make_rows(n=60):
    "Two images of each lesion; the last lesions are for the test."
    rows = pd.DataFrame(
        dict(
            image_id=[f"I{i:03}" for i in range(n)],
            lesion_id=[f"L{i // 2:02}" for i in range(n)],
            age=50.0,
            sex="",
            site="back",
            diagnosis=["abc"[i // 2 % 3] for i in range(n)],
            grade=[["low", "", "high"][i % 3] for i in range(n)],
        )
    )
    number = np.arange(n)
    split = np.where(number % 8 > 5, "valid", "train").astype(object)
    split[number >= n - 12] = "test"
    return rows.assign(split=split)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A member of three folds, its fits in their folders."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = make_rows()
    folder = tmp_path_factory.mktemp("folds") / "squares"
    recipe = Recipe(
        backbone="small_cnn_3",
        fusion="concat",
        heads=HEADS,
        augment="none",
        epochs=2,
        batch_size=8,
        learning_rate=1e-2,
        folds=FOLDS,
    )
    store = Store(rows)
    twins = pd.DataFrame(dict(image_id_a=["I000"], image_id_b=["I007"]))
    prepared = SimpleNamespace(store=store, label_set=LABELS, encoder=ENCODER, duplicates=twins)
    found = train_folds(prepared, rows[rows.split != "test"], recipe)
    for i, fit in enumerate(found.fits):
        save_member(folder / f"fold_{i}", fit.model, dict(best_epoch=fit.best_epoch))
    found.predictions.to_csv(folder / "out_of_fold.csv", index=False)
    yield rows, store, found, folder
    torch.set_num_threads(threads)


def answers(trained, rows=None):
    "The table of evaluation, from what lies in the folder."
    all_rows, store, _, folder = trained
    rows = all_rows if rows is None else rows
    return predict_member(
        load_fits(folder),
        LesionDataset(store, rows, LABELS, ENCODER),
        rows.split.isin(["train", "valid"]),
        read_out_of_fold(folder),
    )


def test_each_lesion_is_in_one_fold_and_duplicates_share_theirs(trained):
    rows, _, found, _ = trained
    labelled = rows[rows.split != "test"]
    fold = labelled.image_id.map(found.folds)
    assert sorted(found.folds.index) == sorted(labelled.image_id) and set(fold) == set(range(FOLDS))
    assert (fold.groupby(labelled.lesion_id).nunique() == 1).all() and found.folds["I000"] == found.folds["I007"]
    assert found.folds["I001"] == found.folds["I006"], "the lesions of both"


def test_trained_lesions_are_judged_by_the_fit_that_left_them_out(trained):
    rows, store, found, folder = trained
    table = answers(trained).set_index("image_id")
    fits = load_fits(folder)
    assert table.index.tolist() == rows.image_id.tolist() and np.allclose(table.filter(like="p_").sum(axis=1), 1)
    for i, fit in enumerate(fits):
        mine = rows[rows.image_id.map(found.folds) == i]
        alone = predict_heads(fit.model, LesionDataset(store, mine, LABELS, ENCODER))
        assert np.allclose(table.loc[mine.image_id, ["p_a", "p_b", "p_c"]], alone["diagnosis"], atol=1e-6)
        assert np.allclose(
            table.loc[mine.image_id, ["grade.low", "grade.middle", "grade.high"]], alone["grade"], atol=1e-6
        )
        others = predict_heads(fits[i - 1].model, LesionDataset(store, mine, LABELS, ENCODER))["diagnosis"]
        assert np.abs(table.loc[mine.image_id, ["p_a", "p_b", "p_c"]] - others).to_numpy().max() > 1e-3


def test_the_test_is_judged_by_the_mean_of_the_fits(trained):
    rows, store, _, folder = trained
    test = rows[rows.split == "test"]
    table = answers(trained).set_index("image_id").loc[test.image_id]
    alone = [predict_heads(m.model, LesionDataset(store, test, LABELS, ENCODER)) for m in load_fits(folder)]
    assert len(alone) == FOLDS
    assert np.allclose(table[["p_a", "p_b", "p_c"]], np.mean([a["diagnosis"] for a in alone], axis=0), atol=1e-6)
    assert np.allclose(
        table[["malignant.no", "malignant.yes"]], np.mean([a["malignant"] for a in alone], axis=0), atol=1e-6
    )


def test_use_answers_as_evaluation_does(trained, tmp_path):
    rows, store, _, folder = trained
    save_bundle(tmp_path / "bundle", load_fits(folder), LABELS, ENCODER, 32, {})
    predictor = Predictor(tmp_path / "bundle")
    test = rows[rows.split == "test"]
    assert predictor.member_names == [f"squares.fold_{i}" for i in range(FOLDS)]
    paths = [save_png(store.image(i), tmp_path / f"{i}.png") for i in test.image_id]
    used = predictor.predict_many(paths, test[["image_id", "age", "sex", "site"]]).set_index("image_id")
    table = answers(trained, test).set_index("image_id")
    assert (
        np.abs(used[table.columns] - table).to_numpy().max() < 1e-6
        and "grade.high" in table
        and "malignant.yes" in table
    )
    one = predictor.predict(paths[0], 50, "", "back")
    assert set(one.heads) == {"grade", "malignant"} and abs(sum(one.heads["grade"].values()) - 1) < 1e-9
    assert json.loads(json.dumps(one.to_dict()))["heads"] == one.heads


def test_a_policy_serves_what_evaluation_measured(trained, tmp_path):
    "From the folder of a member to the prediction of a file: chosen out of fold, decisions the same."
    rows, store, _, folder = trained
    fits = load_fits(folder)
    outside = read_out_of_fold(folder)
    is_trained = rows.split.isin(["train", "valid"]).to_numpy()
    dataset = LesionDataset(store, rows, LABELS, ENCODER)
    columns = ["p_a", "p_b", "p_c"]
    by_view = member_views(fits, dataset, is_trained, outside, views="flips")
    probs = np.stack([table.loc[is_trained, columns].to_numpy() for table in by_view.values()])[None]
    targets = rows.diagnosis[is_trained].map(LABELS.index).to_numpy()
    outside_probs = MemberOutputs(("squares",), tuple(by_view), probs, targets, rows.lesion_id[is_trained].to_numpy())
    policy = choose_policy(
        outside_probs, LABELS, views=("flips",), calibration="temperature", target_sensitivity=0.8, n_resamples=20
    ).policy
    fold = fold_of(outside, rows.image_id, "squares")
    outputs = predict_outputs(fits[0].model, dataset)
    def part(keep):
        return Outputs({}, outputs.logits[keep], outputs.features[keep])
    seen = is_trained & (fold != 0)
    fresh = fold == 0
    seen_targets = rows.diagnosis[seen].map(LABELS.index).to_numpy()
    ood = fit_ood("mahalanobis", "squares.fold_0", part(seen), seen_targets, part(fresh), rows.lesion_id[fresh], .8)
    policy = replace(policy, ood=ood)
    new = ~is_trained
    evaluated = policy.predict(
        {"squares": views_table(by_view, "flips").loc[new, columns].to_numpy()}, LABELS, ood.score(part(new))
    )
    save_bundle(tmp_path / "bundle", fits, LABELS, ENCODER, 32, {}, views=policy.views, policy=policy.to_dict())
    predictor = Predictor(tmp_path / "bundle")
    test = rows[new]
    paths = [save_png(store.image(i), tmp_path / f"{i}.png") for i in test.image_id]
    served = predictor.predict_many(paths, test[["image_id", "age", "sex", "site"]])
    assert np.allclose(
        served[[*columns, "confidence", "malignancy"]], evaluated[[*columns, "confidence", "malignancy"]], atol=1e-6
    )
    assert (served.disagreement == 0).all(), "one member, however many fits it has"
    for column in ("predicted", "prediction_set", "abstain", "flagged"):
        assert served[column].tolist() == evaluated[column].tolist()
    noise = save_png(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8), tmp_path / "noise.png")
    strange = predictor.predict(noise)
    assert strange.abstain and strange.abstain_reason.startswith(
        "the picture is unlike those of validation: its mahalanobis score"
    )


def test_a_new_split_without_new_training_is_refused(trained):
    rows = trained[0].assign(split="train")
    with pytest.raises(
        BundleError, match="member 'squares': image 'I048' was there for training, but has no out-of-fold answer"
    ):
        answers(trained, rows)


class Taken(Exception):
    "What the stage hands to the training."


@pytest.mark.parametrize("folds", [0, FOLDS])
def test_the_stage_hands_no_answer_of_the_test_to_training(tmp_path, root, monkeypatch, folds):
    "The tables of `prepare` name every image; of test lesions neither rows nor targets nor images are used."
    rows = make_rows()
    test = rows.image_id[rows.split == "test"]
    build_prepared(
        tmp_path / "prepared", rows.assign(grade=rows.grade.mask(rows.split == "test", "told")), LABELS, size=32
    )
    read = []
    image = ImageStore.image
    def watched(store, image_id):
        read.append(image_id)
        return image(store, image_id)
    def take(prepared, rows, *args, **kwargs):
        raise Taken(rows)
    for name in ("train_member", "train_folds"):
        monkeypatch.setattr(f"skinlesion.model.member.{name}", take)
    monkeypatch.setattr(ImageStore, "image", watched)
    monkeypatch.chdir(tmp_path)
    own = dict(
        prepared_dir="prepared",
        report_dir="report",
        image_size=32,
        backbone="small_cnn_3",
        fusion="concat",
        heads=HEADS,
        folds=folds,
    )
    names = {}
    cells = json.loads((root / "nbs/stages/train.ipynb").read_text())["cells"]
    with pytest.raises(Taken) as taken:
        for cell in cells:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), "train.ipynb", "exec"), names)  # the project's own notebook
            if "parameters" in cell["metadata"].get("tags", []):
                names.update(own)
    handed = taken.value.args[0]
    assert sorted(handed.image_id) == sorted(set(rows.image_id) - set(test)) and {"low", "high"} <= set(handed.grade)
    assert "told" not in handed.to_csv() and not set(test) & {*names["train_ds"].ids, *names["valid_ds"].ids}
    assert read and not set(test) & set(read)


@pytest.mark.slow
def test_the_pipeline_in_folds_with_heads(tmp_path):
    "From params.yaml to the bundle: out-of-fold metrics over all inner lesions, heads with intervals, a file per fit."
    repo = tmp_path / "repo"
    repo.mkdir()
    copy_repository(repo)
    def folded(params):
        make_tiny(params)
        params["train"]["folds"] = 2
        image = params["train"]["members"]["image"]
        image["heads"] = dict(malignant=dict(kind="binary", column="malignant", levels=["no", "yes"]))
        params["train"]["members"] = dict(image=image, meta=dict(image, backbone=None, fusion="metadata", heads={}))
    edit_params(repo, folded)
    run(repo, "dvc", "pull", "-q", "data.dvc")
    run(repo, "dvc", "repro")
    split = pd.read_csv(repo / "artifacts/prepared/splits.csv").split
    metrics = json.loads((repo / "reports/evaluate/metrics.json").read_text())
    n_trained = int(split.isin(["train", "valid"]).sum())
    assert metrics["out_of_fold"]["ensemble"]["accuracy"]["n"] == n_trained
    assert metrics["valid"]["members"]["meta"]["accuracy"]["n"] == (split == "valid").sum() < n_trained
    head = metrics["test"]["members"]["image"]["heads"]["malignant"]["auroc"]
    assert head["low"] < head["value"] < head["high"] and head["n"] == (split == "test").sum()
    assert "heads" not in metrics["test"]["members"]["meta"] and "heads" in metrics["test"]["ensemble"]
    names = sorted(p.name for p in (repo / "artifacts/ensemble").glob("[a-z]*.safetensors"))  # not the nearest cases
    assert names == [
        "image.fold_0.safetensors",
        "image.fold_1.safetensors",
        "meta.fold_0.safetensors",
        "meta.fold_1.safetensors",
    ]
    predictions = pd.read_csv(repo / "artifacts/predictions/ensemble.csv")
    assert set(predictions.split) == {"train", "valid", "test"} and "malignant.yes" in predictions
    assert "up to date" in run(repo, "dvc", "repro").stdout
