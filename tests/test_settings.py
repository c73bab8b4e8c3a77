"The settings in the repository are ones the pipeline takes; the words they may hold are those of the library."
import json

import pandas as pd
import pytest
import yaml

from madeup import ROOT
from skinlesion.evaluate.calibration import CALIBRATIONS
from skinlesion.evaluate.decisions import CONFORMAL
from skinlesion.evaluate.ensemble import COMBINATIONS
from skinlesion.evaluate.corruptions import CORRUPTIONS
from skinlesion.model.fusion import create_model
from skinlesion.model.recipe import Recipe
from skinlesion.model.training import fit
from skinlesion.options import choices
from skinlesion.pipeline.closure import expected_params
from skinlesion.pipeline.params import EvaluateParams, load_params, stage_parameters, train_parameters
from skinlesion.taxonomy import get_label_set
from skinlesion.views import VIEW_SETS
from tiny import build_prepared

SETTINGS = sorted((ROOT / "nbs/settings").glob("*.yaml"))
FILES = [ROOT / "params.yaml", *SETTINGS]


def test_there_are_settings():
    "A moved folder is not taken for sound settings."
    assert SETTINGS


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_settings_load(path):
    "No unknown key, no missing one, no value out of range."
    params = load_params(path)
    for name in params.train.members:
        assert stage_parameters(params, "train", name)["member"] == name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_settings_write_out_what_dvc_watches(path):
    "DVC ends with an error where a key it watches is not in the file, even if that key has a default."
    values = yaml.safe_load(path.read_text())
    for key in [k for k in expected_params("train") if "{" not in k]:
        at = values
        for part in key.split("."):
            at = at[part]
    assert set(values["evaluate"]) == set(EvaluateParams.model_fields)


def test_members_of_the_comparison_differ_in_one_thing():
    "From the base member; a model without an image has neither backbone nor weights to start from."
    members = load_params(ROOT / "nbs/settings/ham10000-compare.yaml").train.members
    base = members["base"].model_dump()
    changed = {
        name: sorted(k for k, v in member.model_dump().items() if v != base[k]) for name, member in members.items()
    }
    assert changed.pop("base") == [] and changed.pop("metadata-only") == ["backbone", "fusion", "pretrained"]
    assert len(changed) == 6 and all(len(keys) == 1 for keys in changed.values()), changed


GPU = [(path, name) for path in SETTINGS if path.name.endswith("-gpu.yaml") for name in load_params(path).train.members]


def first_then_slow(pairs):
    "The first member in every run of the tests, all others under `make test-all`: their backbones are large."
    return [pytest.param(*pair, id=f"{pair[0].stem}-{pair[1]}", marks=[pytest.mark.slow] * (k > 0))
            for k, pair in enumerate(pairs)]


@pytest.mark.parametrize("path, name", first_then_slow(GPU))
def test_gpu_recipes_take_one_step(path, name, tmp_path):
    "What no machine of this project trains is built, and one step is taken, on the CPU at a reduced size."
    assert "NOT TRAINED HERE" in path.read_text()
    values = stage_parameters(load_params(path), "train", name)
    options = {key: values[key] for key in Recipe.model_fields if key in values}
    short = dict(epochs=1, warmup_epochs=0., patience=1, batch_size=2, accumulate=1)
    recipe = Recipe(**options | short | dict(pretrained="none", folds=0, workers=0))
    label_set = get_label_set("melanoma")
    split = ["train", "train", "valid", "valid"]
    rows = pd.DataFrame(dict(image_id=list("abcd"), diagnosis=["mel", "benign"] * 2, split=split))
    rows = rows.assign(lesion_id=rows.image_id, patient_id="", diagnosis_confirm_type="")
    rows = rows.assign(age=50., sex="female", site="back")
    prepared = build_prepared(tmp_path / "prepared", rows, label_set, 64)
    model = create_model(
        recipe.backbone, 2, prepared.encoder.dim if recipe.fusion != "none" else 0, recipe.fusion,
        drop_rate=recipe.drop_rate,
    )
    before = next(iter(model.parameters())).detach().clone()
    fit(model, *(prepared.dataset(prepared.rows(part)) for part in ("train", "valid")), recipe)
    assert not before.equal(next(iter(model.parameters())))


def test_train_notebook_shows_every_option():
    "Its parameters cell is the one that `write_train_parameters` writes."
    cells = json.loads((ROOT / "nbs/stages/train.ipynb").read_text())["cells"]
    written = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    assert "".join(written[0]["source"]).splitlines() == train_parameters()


@pytest.mark.parametrize("key, allowed", [
    ("views", VIEW_SETS),
    ("combination", ("auto", *COMBINATIONS)),
    ("calibration", ("auto", *CALIBRATIONS)),
    ("conformal", CONFORMAL),
    ("stress", CORRUPTIONS),
])
def test_words_are_those_of_the_library(key, allowed):
    assert set(choices(EvaluateParams, key)) == set(allowed)
