"""From a folder of trained members to everything that was measured: nothing is chosen on test, every figure has its
count, and what is written can be read back."""
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from skinlesion.data.prepared import write_prepared
from skinlesion.data.schema import DatasetInfo
from skinlesion.data.tables import read_predictions
from skinlesion.evaluate.calibration import CALIBRATIONS
from skinlesion.evaluate.corruptions import CORRUPTIONS
from skinlesion.evaluate.decisions import CONFORMAL
from skinlesion.evaluate.ensemble import COMBINATIONS
from skinlesion.evaluate.evaluation import CURVES, evaluate_ensemble, save_ensemble, save_metrics, save_predictions
from skinlesion.evaluate.policy import OOD_KINDS
from skinlesion.evaluate.settings import EvaluationSettings
from skinlesion.images import save_png
from skinlesion.model.bundle import load_bundle, save_member
from skinlesion.model.fusion import create_model
from skinlesion.options import choices
from skinlesion.report import clinical
from skinlesion.report.ensemble import ensemble_card, ensemble_page
from skinlesion.report.templates import Picture
from skinlesion.stats.intervals import walk_leaves
from skinlesion.taxonomy import LabelSet
from skinlesion.views import VIEW_SETS

LABELS = LabelSet("made", ("bad", "good", "other"), {}, frozenset(["bad"]), frozenset(["other"]))
SETTINGS = EvaluationSettings(
    resamples=40, views=("none", "flips"), stress=("blur",), stress_images=20, min_lesions=5, abstain_share=.2
)


def made_rows(n=180):
    "Images of three lesion classes, two of each lesion, in three splits."
    lesion = np.arange(n) // 2
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        dict(
            image_id=[f"i{k:03}" for k in range(n)],
            lesion_id=[f"l{k:03}" for k in lesion],
            patient_id="",
            diagnosis=np.array(LABELS.codes)[rng.integers(0, 3, n // 2)[lesion]],
            diagnosis_confirm_type="histo",
            age=rng.integers(20, 80, n // 2)[lesion].astype(float),
            sex=np.array(["female", "male"])[lesion % 2],
            site=np.array(["back", "scalp", ""])[lesion % 3],
            split=np.array(["train", "valid", "test"])[lesion % 3],
        )
    )


def build(folder, rows):
    "A prepared folder of coloured noise, and two untrained members."
    rng = np.random.default_rng(1)
    shift = dict(zip(LABELS.codes, (0, 60, 120)))
    for image_id, diagnosis in zip(rows.image_id, rows.diagnosis):
        pixels = rng.integers(0, 90, (32, 32, 3)) + shift[diagnosis]
        save_png(pixels.astype(np.uint8), folder / "images" / f"{image_id}.png")
    dataset = SimpleNamespace(
        table=rows,
        label_set=LABELS,
        info=DatasetInfo("Made up", LABELS.to_dict(), "CC0-1.0", "none", "tests"),
        image_path=lambda image_id: folder / "images" / f"{image_id}.png",
        mask_path=lambda image_id: None,
    )
    pairs = pd.DataFrame(columns=["image_id_a", "image_id_b", "kind"])
    traits = rows[["image_id"]].assign(confirmed_by="histo")
    prepared = write_prepared(folder / "prepared", dataset, rows.split, pairs, traits, 32)
    recipe = dict(recipe=dict(backbone="test_resnet", loss="cross_entropy", weight_power=.5))
    save_member(folder / "models/image", create_model("test_resnet", 3, seed=1), recipe)
    fused = create_model("test_resnet", 3, prepared.encoder.dim, "concat", seed=2)
    save_member(folder / "models/fused", fused, recipe)
    return prepared, folder / "models"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    torch.set_num_threads(1)
    return build(tmp_path_factory.mktemp("evaluation"), made_rows())


@pytest.fixture(scope="module")
def result(made):
    return evaluate_ensemble(*made, ["fused", "image"], SETTINGS)


def test_every_part_and_member_is_measured(result):
    metrics = result.metrics()
    assert set(metrics) == {"test", "valid", "benchmark"}
    assert set(metrics["test"]) == {"ensemble", "members", "subgroups", "robustness"}
    assert set(metrics["test"]["members"]) == {"fused", "image"} == set(result.member_cards["valid"])
    further = {"sureness", "abstention", "decisions", "conformal", "cost", "calibration", "disagreement", "ood"}
    assert further <= set(metrics["test"]["ensemble"]) and not further & set(metrics["valid"]["ensemble"])
    for path, leaf in walk_leaves(metrics):
        assert "n" in leaf and (leaf["value"] is not None or leaf.get("reason")), path
    assert metrics["test"]["ensemble"]["accuracy"]["n"] == 60 == len(result.data.targets)
    known = metrics["test"]["ensemble"]["known_fields"]
    assert len(known) == 8 and set(known) == {"age+sex+site", *result.run.choice.policy.by_known}
    assert set(known["none"]["image_only"]) == {"image"} and "difference" not in known["age+sex+site"]
    assert known["age+sex+site"]["accuracy"]["value"] == metrics["test"]["ensemble"]["accuracy"]["value"]
    assert set(metrics["test"]["robustness"]) == {"images", "metadata"}
    assert set(result.curves["stress_images"].kind) == {"none", "blur"}


def test_nothing_is_chosen_or_locked_on_test(made, result):
    "Other diagnoses of the test images move their figures, and no choice, lock, prediction or figure of validation."
    prepared, models = made
    splits = prepared.splits.copy()
    is_test = splits.split == "test"
    splits.loc[is_test, "diagnosis"] = splits.diagnosis[is_test].map(dict(bad="good", good="other", other="bad"))
    other = evaluate_ensemble(replace(prepared, splits=splits), models, ["fused", "image"], SETTINGS)
    assert other.cards["test"]["log_loss"]["value"] != result.cards["test"]["log_loss"]["value"]
    assert other.run.choice.policy.to_dict() == result.run.choice.policy.to_dict()
    assert other.cards["valid"] == result.cards["valid"]
    for name, table in result.run.predictions.items():
        pd.testing.assert_frame_equal(table, other.run.predictions[name])
    columns = ["taken", "validation_log_loss", "validation_low"]
    pd.testing.assert_frame_equal(other.run.candidates[columns], result.run.candidates[columns])


def test_validation_is_measured_by_its_cross_fitted_probabilities(result):
    "Those of the policy, which was fitted on all of validation, would be too good."
    run = result.run
    valid = run.ensemble.part("valid")
    targets = run.ensemble.rows.diagnosis[valid].map(LABELS.index).to_numpy()
    loss = -np.log(run.choice.crossfitted[np.arange(valid.sum()), targets]).mean()
    assert result.cards["valid"]["log_loss"]["value"] == pytest.approx(loss)


def test_what_is_saved_is_read_back(result, tmp_path):
    save_metrics(result, tmp_path / "report")
    save_predictions(result, tmp_path / "predictions")
    save_ensemble(result, tmp_path / "bundle", ensemble_card(result))
    assert {path.stem for path in (tmp_path / "report").glob("*.csv")} == set(CURVES)
    metrics = json.loads((tmp_path / "report/metrics.json").read_text())
    accuracy = metrics["test"]["ensemble"]["accuracy"]["value"]
    assert accuracy == float(f"{result.card['accuracy']['value']:.8g}")
    for path, leaf in walk_leaves(metrics):
        assert all(value == float(f"{value:.8g}") for value in leaf.values() if isinstance(value, float)), path
    table = read_predictions(tmp_path / "predictions/ensemble.csv", LABELS)
    assert table.predicted.tolist() == result.run.predictions["ensemble"].predicted.tolist()
    bundle = load_bundle(tmp_path / "bundle")
    assert bundle.policy == result.run.choice.policy.to_dict() and len(bundle.members) == 2
    assert "## Limits" in (tmp_path / "bundle/MODEL_CARD.md").read_text()


def test_external_images_stand_beside_those_at_home(made, result):
    "Nothing that was locked moves; what a class that is missing elsewhere leaves undefined has its reason."
    prepared, models = made
    splits = prepared.splits.copy()
    splits.loc[(splits.split == "train") & (splits.diagnosis == "good"), "split"] = "external"
    settings = SETTINGS.model_copy(update=dict(stress=()))
    other = evaluate_ensemble(replace(prepared, splits=splits), models, ["fused", "image"], settings)
    for name in ("threshold", "conformal", "combiner", "calibrator"):
        assert getattr(other.run.choice.policy, name) == getattr(result.run.choice.policy, name)
    elsewhere = other.metrics()["elsewhere"]
    measures = elsewhere["measures"]
    assert measures["accuracy"]["elsewhere"] == other.cards["external"]["accuracy"]
    assert measures["accuracy"]["home"] == result.cards["test"]["accuracy"]
    assert measures["sensitivity"]["promised"]["value"] == SETTINGS.target_sensitivity
    reasons = {name: row["difference"].get("reason") for name, row in measures.items()}
    assert reasons["auroc_macro"] == "every image is of class good" and not reasons["accuracy"]
    assert reasons["sensitivity"] == reasons["malignant_auroc"] == "no image is malignant"
    shares = {code: row["elsewhere"]["value"] for code, row in elsewhere["classes"].items()}
    assert shares == dict(bad=0, good=1, other=0)
    counts = prepared.rows("valid").diagnosis.value_counts()
    for code, row in elsewhere["priors"]["shares"].items():
        assert row["calibration"] == dict(value=pytest.approx(counts[code] / 60), n=60)
    assert other.run.ensemble.part("external").sum() == measures["accuracy"]["elsewhere"]["n"]


def test_the_page_says_how_the_ensemble_was_made(result, monkeypatch):
    monkeypatch.setattr(clinical, "draw_picture", lambda draw, alt: Picture(b"", alt, 100))
    page = ensemble_page(result)
    assert {"summary", "choices", "members", "heads", "known_fields", "checklist"} <= set(page)
    assert "**Without age, sex and site:**" in page["summary"].after and len(page["known_fields"].body[0].frame) == 8
    steps = [table.caption.split(":")[0] for table in page["choices"].body]
    assert steps == ["Views", "Combination", "Calibration"]
    assert page["members"].body[0].frame["less the member"].unique().tolist() == ["fused", "image"]


def test_the_settings_allow_what_the_modules_know():
    known = dict(
        views=tuple(VIEW_SETS),
        combination=("auto", *COMBINATIONS),
        calibration=("auto", *CALIBRATIONS),
        conformal=CONFORMAL,
        ood=("none", *OOD_KINDS),
        stress=tuple(CORRUPTIONS),
    )
    for name, words in known.items():
        assert set(choices(EvaluationSettings, name)) == set(words), name
