"The settings in the repository are ones the pipeline takes; the words they may hold are those of the library."
import json

import pytest
import yaml

from madeup import ROOT
from skinlesion.evaluate.calibration import CALIBRATIONS
from skinlesion.evaluate.decisions import CONFORMAL
from skinlesion.evaluate.ensemble import COMBINATIONS
from skinlesion.evaluate.corruptions import CORRUPTIONS
from skinlesion.options import choices
from skinlesion.pipeline.closure import expected_params
from skinlesion.pipeline.params import EvaluateParams, load_params, stage_parameters, train_parameters
from skinlesion.views import VIEW_SETS

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
