"""A bundle in the format of version 1.0, before the library was rebuilt, loads and predicts as it did there.

`older_bundle.json` holds its bundle.json, the names and shapes of its tensors, and what version 1.0 predicted with it.
Its weights are those that the seeds give, so that they need not be kept; their sums are, so that another initialiser
is told from another prediction.
"""
import json
from pathlib import Path

import pytest

from skinlesion.files import write_json, write_sums
from skinlesion.model.fusion import create_model
from skinlesion.model.recipe import Recipe
from skinlesion.use.predict import Predictor
from safetensors.torch import save_file
from tiny import build_pictures

OLDER = json.loads(Path(__file__).with_name("older_bundle.json").read_text())
SEEDS = {"fused": 2, "image": 1}
PEOPLE = {"a": dict(age=61, sex="female", site="back")}


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    "The bundle as a folder."
    folder = tmp_path_factory.mktemp("older")
    write_json(folder / "bundle.json", OLDER["bundle"])
    for member in OLDER["bundle"]["members"]:
        weights = create_model(**member["model"], seed=SEEDS[member["name"]]).state_dict()
        shapes = {name: list(tensor.shape) for name, tensor in weights.items()}
        assert shapes == OLDER["tensors"][member["name"]]
        total = sum(float(tensor.double().abs().sum()) for tensor in weights.values())
        assert total == pytest.approx(OLDER["sums"][member["name"]], rel=1e-6), "the seeds give other weights"
        save_file(weights, folder / f"{member['name']}.safetensors")
    (folder / "MODEL_CARD.md").write_text("# Written by version 1.0\n")
    write_sums(folder)
    return folder


def test_an_older_bundle_predicts_as_it_did(older, tmp_path, one_thread):
    predictor = Predictor(older)
    for name, picture in build_pictures(tmp_path).items():
        prediction = predictor.predict(picture, **PEOPLE.get(name, {}))
        expected = OLDER["expected"][name]
        assert prediction.probabilities == pytest.approx(expected["probabilities"], abs=2e-6)
        rest = {key: getattr(prediction, key) for key in ("predicted", "flagged", "abstain")}
        assert rest == {key: expected[key] for key in rest}
        assert list(prediction.prediction_set) == expected["prediction_set"]


def test_an_older_recipe_is_read(older):
    "It had two levels, a list of heads, and seconds between checkpoints."
    recipe = Recipe.from_dict(OLDER["bundle"]["provenance"]["recipes"]["image"])
    assert (recipe.backbone, recipe.epochs, recipe.checkpoint_minutes) == ("resnet10t", 10, 2.0)
    head = recipe.heads["severity"]
    assert (head.kind, tuple(head.levels), head.weight) == ("ordinal", ("mild", "severe"), 1.0)
