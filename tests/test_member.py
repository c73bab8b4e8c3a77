"A member in steps and folds: the recipe reaches the model, a kill changes nothing, nothing of another run is reused."
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from skinlesion.data.metadata import MetadataEncoder
from skinlesion.model import launch
from skinlesion.model.member import member_datasets, train_folds, train_member
from skinlesion.model.recipe import Recipe
from skinlesion.taxonomy import LabelSet

LABELS = LabelSet("squares", ("a", "b", "c"), dict(a="a", b="b", c="c"), frozenset("c"))
ENCODER = MetadataEncoder(50.0, 20.0)
HEADS = dict(severity=dict(kind="ordinal", levels=["mild", "moderate", "severe"]), malignant=dict(kind="binary"))
RECIPE = Recipe(
    backbone="test_resnet",
    fusion="concat",
    drop_rate=0.2,
    augment="light",
    epochs=2,
    batch_size=16,
    learning_rate=3e-3,
    seed=1,
)
STEPS = RECIPE.replace(pretrain_epochs=2, head_epochs=2)


class Store:
    "Squares in memory: `a` is red, `b` and `c` are green."
    size = 32

    def __init__(self, rows, seed=0):
        pixels = np.random.default_rng(seed).normal(110, 40, (len(rows), 32, 32, 3))
        for image, code in zip(pixels, rows.diagnosis):
            image[..., 0 if code == "a" else 1] += 30
        self.images = dict(zip(rows.image_id, pixels.clip(0, 255).astype(np.uint8)))

    def position(self, image_id):
        return list(self.images).index(image_id)
    def image(self, image_id):
        return self.images[image_id]


def make_rows(n=48):
    "Rows of training, validation and without diagnosis."
    codes = ["abc"[i % 3] for i in range(n)]
    rows = pd.DataFrame(
        dict(
            image_id=[f"ISIC_{i:03}" for i in range(n)],
            lesion_id=[f"L{i // 2}" for i in range(n)],
            diagnosis=codes,
            age=[60.0 if c == "c" else 30.0 for c in codes],
            sex="",
            site="",
            split=["valid" if i % 4 == 3 else "train" for i in range(n)],
            severity=[["mild", "", "severe", "moderate"][i % 4] for i in range(n)],
        )
    )
    rows.loc[rows.index >= n - 6, ["split", "diagnosis"]] = "unlabelled", ""
    return rows


ROWS = make_rows()
STORE = Store(ROWS)


pytestmark = pytest.mark.usefixtures("one_thread")


def prepared(store=STORE, labels=LABELS):
    "What a member needs of a prepared folder."
    return SimpleNamespace(store=store, label_set=labels, encoder=ENCODER, duplicates=None)


def train(recipe=RECIPE, rows=ROWS, store=STORE, labels=LABELS, **more):
    return train_member(prepared(store, labels), rows, recipe, **more)


def weights(model):
    return {k: v.numpy().tobytes() for k, v in model.state_dict().items()}


class Killed(Exception):
    pass


def killed_at(n, lines):
    "A progress that stops the run at its n-th line; lines that only a resumed run prints do not count."
    def progress(line):
        if line.startswith("↻ "):
            return
        lines.append(line)
        if len(lines) == n:
            raise Killed
    return progress


def test_the_recipe_reaches_the_model():
    "Cosine head for LDAM, dropout and groups of the metadata, further heads and their targets, the image size."
    recipe = RECIPE.replace(metadata_dropout=0.3, heads=HEADS, loss="ldam")
    result = train(recipe)
    config = result.model.config
    assert (config["head"], config["metadata_dropout"], config["image_size"], config["metadata_dim"]) == (
        "cosine",
        0.3,
        32,
        ENCODER.dim,
    )
    assert [h["name"] for h in config["heads"]] == ["severity", "malignant"]
    assert {"valid_severity_mae", "valid_malignant_auroc"} <= set(result.history)
    train_ds, valid_ds = member_datasets(prepared(), ROWS, recipe)
    assert train_ds.targets_extra["severity"].unique().tolist() == [-1, 0, 2] and set(valid_ds.targets_extra) == {
        "severity",
        "malignant",
    }


def test_metadata_alone():
    "No backbone, no image: the age tells `c` from the rest."
    result = train(RECIPE.replace(backbone=None, fusion="metadata", epochs=3))
    assert result.best_value > 0.7 and result.model.backbone is None


@pytest.mark.parametrize("change", ["pixel", "row", "recipe", "start", "threads", "label set"])
def test_nothing_of_another_run_is_taken_over(change, tmp_path):
    "A finished step counts only for the same pixels, rows, recipe, first weights and number of threads."
    train(work_dir=tmp_path)
    lines = []
    more = {}
    if change == "pixel":
        more["store"] = Store(ROWS)
        more["store"].images["ISIC_000"][0, 0, 0] ^= 1
    if change == "row":
        more["rows"] = ROWS.assign(age=ROWS.age.where(ROWS.image_id != "ISIC_000", 61.0))
    if change == "recipe":
        more["recipe"] = RECIPE.replace(weight_decay=0.1)
    if change == "start":
        more["recipe"] = RECIPE.replace(seed=2)
    if change == "threads":
        torch.set_num_threads(2)
    if change == "label set":  # the same codes, of which others are malignant
        more["labels"] = LabelSet("squares", ("a", "b", "c"), dict(a="a", b="b", c="c"), frozenset("ab"))
    train(work_dir=tmp_path, progress=lines.append, **more)
    assert "↻ finished before" not in lines and lines[0].endswith("starting anew") and len(lines) == 3
    train(work_dir=tmp_path, progress=lines.append, **more)
    assert "↻ finished before" in lines


def test_loader_processes_and_checkpoints_change_nothing(tmp_path):
    "What only moves work in time is no part of the key."
    whole = train(work_dir=tmp_path)
    lines = []
    again = train(RECIPE.replace(workers=2, checkpoint_minutes=0.0), work_dir=tmp_path, progress=lines.append)
    assert lines[0] == "↻ finished before" and weights(again.model) == weights(whole.model)


class Log:
    "A logger that keeps the epochs of a step."
    def __init__(self, logs, name):
        self.rows = logs[name] = []
    def epoch(self, row):
        self.rows.append((row["epoch"], row["train_loss"]))


def test_each_fit_has_a_log_of_all_its_epochs(tmp_path):
    "By name, in folds of two steps; the same again where everything was finished before."
    recipe = STEPS.replace(pretrain_epochs=0, folds=2)
    for _ in range(2):
        logs = {}
        folds = train_folds(prepared(), ROWS, recipe, tmp_path, make_logger=lambda name: Log(logs, name))
        assert list(logs) == [
            "fold_0/image",
            "fold_0/head",
            "fold_1/image",
            "fold_1/head",
        ]
        for i, fit in enumerate(folds.fits):
            for step, history in fit.stages.items():
                assert logs[f"fold_{i}/{step}"] == list(zip(history.epoch, history.train_loss))
    logs = {}
    train(make_logger=lambda name: Log(logs, name))
    assert list(logs) == [""]


def check_kills(recipe, lines_of_kills, tmp_path):
    "Killed at each of these lines in turn in one folder, the run ends on the same lines, histories and bytes."
    undisturbed = []
    whole = train(recipe, progress=undisturbed.append)
    for n in lines_of_kills or range(1, len(undisturbed) + 1):
        with pytest.raises(Killed):
            train(recipe, work_dir=tmp_path, progress=killed_at(n, []))
    lines = []
    resumed = train(recipe, work_dir=tmp_path, progress=killed_at(0, lines))
    assert lines == undisturbed and weights(resumed.model) == weights(whole.model)
    assert all(a.equals(b) for a, b in zip(resumed.stages.values(), whole.stages.values(), strict=True))


def test_killed_in_two_steps(tmp_path):
    check_kills(STEPS.replace(pretrain_epochs=1), (2, 4, 6), tmp_path)


AVERAGED = dict(ema_decay=0.9, accumulate=2, epochs=3)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, dict(heads=HEADS), AVERAGED], ids=["plain", "heads", "ema"])
def test_killed_at_every_line(changes, tmp_path):
    check_kills(STEPS.replace(**changes), None, tmp_path)


@pytest.mark.slow
def test_folds_killed_at_every_line(tmp_path):
    "Also where one folder gets all the kills one after another."
    undisturbed = []
    recipe = RECIPE.replace(pretrain_epochs=1, folds=3)
    def folds(**more):
        return train_folds(prepared(), ROWS, recipe, **more)
    whole = folds(progress=undisturbed.append)
    for n in range(1, len(undisturbed) + 1):
        with pytest.raises(Killed):
            folds(work_dir=tmp_path, progress=killed_at(n, []))
    lines = []
    resumed = folds(work_dir=tmp_path, progress=killed_at(0, lines))
    assert lines == undisturbed and resumed.predictions.equals(whole.predictions)
    assert [weights(f.model) for f in resumed.fits] == [weights(f.model) for f in whole.fits]


def test_several_processes_need_a_store_on_the_disk():
    with pytest.raises(ValueError, match="pass an ImageStore"):
        train(RECIPE.replace(devices=2))


def test_a_job_without_an_error_of_its_own_shows_its_last_lines(tmp_path):
    error = launch._failure(tmp_path, 2, -9, ["line 1", "line 2"])
    assert isinstance(error, RuntimeError) and "ended with status -9" in str(error) and "line 2" in str(error)


KINDS = [
    ("ValueError", ValueError),
    ("OutOfMemoryError", torch.OutOfMemoryError),
    ("UnicodeDecodeError", RuntimeError),
    ("Odd", RuntimeError),
]


@pytest.mark.parametrize("kind, expected", KINDS)
def test_errors_keep_their_kind(kind, expected, tmp_path):
    (tmp_path / "error_1.json").write_text(json.dumps(dict(kind=kind, message="batch_size is 1")))
    error = launch._failure(tmp_path, 2, 1, [])
    assert type(error) is expected and "batch_size is 1" in str(error)
