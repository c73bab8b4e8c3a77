"The settings that come with the repository are ones the pipeline takes, and the typed keys say what the model room can do."
import re
from dataclasses import fields
from itertools import product
from typing import Literal, get_args, get_origin

import pytest
import yaml

from madeup import ROOT
from skinlesion.evaluate.calibration import CALIBRATIONS
from skinlesion.evaluate.decisions import CONFORMAL
from skinlesion.evaluate.ensemble import COMBINATIONS
from skinlesion.evaluate.robustness import CORRUPTIONS
from skinlesion.model.batches import MIXES, SAMPLERS
from skinlesion.model.fusion import FUSIONS
from skinlesion.model.heads import HEAD_KINDS
from skinlesion.model.losses import LOSSES
from skinlesion.model.member import SPEC_KEYS, MemberSpec, member_spec
from skinlesion.model.training import METRICS, PRECISIONS, TrainConfig
from skinlesion.pipeline.closure import expected_params
from skinlesion.pipeline.params import (
    Evaluate,
    Head,
    Member,
    MemberKeys,
    ParamsError,
    Recipe,
    load_params,
    parse_params,
    stage_defaults,
    stage_parameters,
)
from skinlesion.views import VIEW_SETS

SETTINGS = sorted((ROOT / "nbs/settings").glob("*.yaml"))
FILES = [ROOT / "params.yaml", *SETTINGS]
NOT_IN_SPEC = {"member", "prepared_dir", "out_dir", "report_dir", "image_size", "folds", "devices", "log"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_settings_load(path):
    "No unknown key, no missing one, no value out of range; and each member is one that the model room takes."
    params = load_params(path)
    for name in params.train.members:
        values = stage_parameters(params, "train", name)
        spec = member_spec({key: values[key] for key in SPEC_KEYS})
        assert spec.train.epochs == values["epochs"] and set(values) == {*SPEC_KEYS, *NOT_IN_SPEC}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_settings_write_out_what_dvc_watches(path):
    "DVC ends with an error where a key it watches is not in the file, even if that key has a default."
    values = yaml.safe_load(path.read_text())
    for key in [k for k in expected_params("train") if "{" not in k]:
        at = values
        for part in key.split("."):
            at = at[part]


def test_there_are_settings():
    "A moved folder is not taken for sound settings."
    assert SETTINGS


def test_members_of_the_comparison_differ_in_one_thing():
    "From the base member; a model without an image has neither backbone nor weights to start from."
    members = load_params(ROOT / "nbs/settings/ham10000-compare.yaml").train.members
    base = members["base"].model_dump()
    changed = {
        name: sorted(k for k, v in member.model_dump().items() if v != base[k]) for name, member in members.items()
    }
    assert changed.pop("base") == [] and changed.pop("metadata-only") == ["backbone", "fusion", "pretrained"]
    assert len(changed) == 6 and all(len(keys) == 1 for keys in changed.values()), changed


def words(annotation):
    "Every word that a key, or an element of it, may be."
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    return set().union(*(words(inner) for inner in get_args(annotation)))


@pytest.mark.parametrize("section, key, allowed", [
    (Recipe, "metric", METRICS), (Recipe, "sampler", SAMPLERS), (Recipe, "mix", MIXES), (Recipe, "precision", PRECISIONS),
    (MemberKeys, "fusion", FUSIONS), (MemberKeys, "loss", LOSSES), (Head, "kind", HEAD_KINDS), (Evaluate, "views", VIEW_SETS),
    (Evaluate, "combination", ("auto", *COMBINATIONS)), (Evaluate, "calibration", ("auto", *CALIBRATIONS)), (Evaluate, "conformal", CONFORMAL),
    (Evaluate, "stress", CORRUPTIONS)], ids=lambda x: x if isinstance(x, str) else "")
def test_words_are_those_of_the_library(section, key, allowed):
    assert words(section.model_fields[key].annotation) == set(allowed)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_key_of_the_evaluation_is_written_out(path):
    "So that `dvc exp run -S evaluate.KEY=...` finds it, and a reader sees what may be chosen."
    values = yaml.safe_load(path.read_text())["evaluate"]
    assert set(values) == set(Evaluate.model_fields)


def test_defaults_are_those_of_the_model_room():
    "A key left out of params.yaml means what the argument left out means."
    known = {f.name: f.default for f in (*fields(TrainConfig), *fields(MemberSpec))}
    known |= {"checkpoint_minutes": known["checkpoint_seconds"] / 60, "heads": {}}
    ours = {k: v for k, v in stage_defaults("train").items() if k not in NOT_IN_SPEC}
    assert ours and {k: known[k] for k in ours} == ours


def accepted(make):
    "Whether something can be made."
    try:
        make()
    except (ParamsError, ValueError):
        return False
    return True


def with_member(**keys):
    "The committed params.yaml with one member of these keys."
    text = re.sub(
        r"(?s)  members:.*?\n\n",
        f"  members: {{a: {yaml.safe_dump(keys, default_flow_style=True).strip()}}}\n\n",
        FILES[0].read_text(),
    )
    return parse_params(text).train.members["a"]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_takes_here_what_it_takes_there(loss):
    "Before the run as in it: a constant that another loss reads is refused."
    changes = [
        {},
        *(
            {key: value}
            for key, value in product(
                ("gamma", "gamma_negative", "beta", "margin", "tau", "deferred", "weight_power", "label_smoothing"),
                (0.0, 0.25, 0.75),
            )
        ),
    ]
    for change in changes:
        here = accepted(lambda: with_member(backbone="resnet10t", loss=loss, **change))
        assert here == accepted(lambda: TrainConfig(loss=loss, **change)), change


@pytest.mark.parametrize("keys", [
    dict(fusion="metadata"), dict(fusion="metadata", backbone=None), dict(backbone=None), dict(head_epochs=2), dict(head_epochs=2, fusion="concat"),
    dict(head_epochs=2, fusion="metadata", backbone=None), dict(pretrain_epochs=2), dict(pretrain_epochs=2, fusion="metadata", backbone=None),
    dict(heads={"severe": {"kind": "binary"}}), dict(heads={"severe": {"kind": "ordinal"}}), dict(heads={"diagnosis": {"kind": "binary"}}),
    dict(heads={"severe": {"kind": "binary", "levels": ["a", "b", "c"]}}), dict(heads={"severe": {"kind": "ordinal", "levels": [0, 1, 2]}}),
    dict(heads={"severe": {"kind": "binary", "weight": 0.}}), dict(freeze_epochs=30), dict(freeze_epochs=3), dict(epochs=2)], ids=str)
def test_a_member_refused_there_is_refused_here(keys):
    "What would stop a run after minutes stops it before; the typed keys may be stricter, never laxer."
    keys = {"backbone": "resnet10t"} | keys
    if not accepted(lambda: with_member(**keys)):
        return
    member = with_member(**keys)
    own = member.model_dump(include=set(MemberKeys.model_fields) - {"seed"}) | member.model_dump(exclude_unset=True)
    member_spec({"epochs": 30, "warmup_epochs": 2.} | {k: v for k, v in own.items() if k in SPEC_KEYS})


def test_member_keys_may_be_left_out():
    "A member is as short as its backbone."
    assert isinstance(with_member(backbone="resnet10t"), Member)
