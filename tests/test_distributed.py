"Several processes share a batch: same result as one process, interrupted or not, and none outlives its caller."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from skinlesion.data.metadata import MetadataEncoder
from skinlesion.data.store import build_store
from skinlesion.images import save_png
from skinlesion.model.checkpoint import RESUMED
from skinlesion.model.inference import predict_probs
from skinlesion.model.member import _data, member_datasets, train_folds, train_member
from skinlesion.model.recipe import Recipe
from skinlesion.taxonomy import LabelSet

LABELS = LabelSet("squares", ("a", "b", "c"), dict(a="a", b="b", c="c"), frozenset("c"))
ENCODER = MetadataEncoder(50.0, 20.0)
# LayerNorm, no dropout, no metadata branch (it has batch norm), 44 training images in batches of 11, 11 of validation:
# shares of 6 and 5.
# Sharing changes nothing but the order in which numbers are added.
RECIPE = Recipe(
    backbone="test_convnext",
    drop_rate=0.0,
    augment="light",
    epochs=3,
    batch_size=11,
    learning_rate=2e-3,
    warmup_epochs=0.5,
    seed=3,
    checkpoint_minutes=0.0,
)


def make_rows(n=55):
    "Rows of squares: `a` is red, `b` and `c` are green, and the age tells `c` from `b`."
    rng = np.random.default_rng(0)
    codes = ["abc"[i % 3] for i in range(n)]
    ages = [(60.0 if c == "c" else 30.0) + int(rng.integers(20)) for c in codes]
    return pd.DataFrame(
        dict(
            image_id=[f"ISIC_{i:03}" for i in range(n)],
            lesion_id=[f"L{i}" for i in range(n)],
            diagnosis=codes,
            age=ages,
            sex="",
            site=["back" if i % 2 else "" for i in range(n)],
            split=["valid" if i % 5 == 4 else "train" for i in range(n)],
            severity=[["", "mild", "severe"][i % 3] for i in range(n)],
        )
    )


def build(folder):
    "A store of squares on the disk, and its rows."
    rows = make_rows()
    rng = np.random.default_rng(1)
    for image_id, code in zip(rows.image_id, rows.diagnosis):
        pixels = rng.normal(110, 40, (32, 32, 3))
        pixels[..., 0 if code == "a" else 1] += 30
        save_png(pixels.clip(0, 255).astype(np.uint8), folder / "images" / f"{image_id}.png")
    dataset = SimpleNamespace(table=rows, image_path=lambda i: folder / "images" / f"{i}.png", mask_path=lambda i: None)
    return build_store(dataset, folder / "store", 32), rows


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    "Store and rows."
    torch.set_num_threads(1)
    return build(tmp_path_factory.mktemp("squares"))


def prepared(squares):
    "What a member needs of a prepared folder."
    return SimpleNamespace(store=squares[0], label_set=LABELS, encoder=ENCODER, duplicates=None)


def train(squares, processes, recipe=RECIPE, **more):
    return train_member(prepared(squares), squares[1], recipe.replace(devices=processes), **more)


def weights(result):
    return {k: v.numpy().tobytes() for k, v in result.model.state_dict().items()}


def test_two_processes_end_where_one_does(squares):
    "Every number of the history and every probability within 1e-5, the same best epoch, lines and columns."
    lines_of_one = []
    lines_of_two = []
    rows = {}
    def log(name):
        return SimpleNamespace(epoch=rows.setdefault(name, []).append)
    one = train(squares, 1, progress=lines_of_one.append)
    two = train(squares, 2, progress=lines_of_two.append, make_logger=log)
    assert list(two.history) == list(one.history) and two.best_epoch == one.best_epoch
    np.testing.assert_allclose(two.history.to_numpy(float), one.history.to_numpy(float), atol=1e-5)
    valid = member_datasets(prepared(squares), squares[1], RECIPE)[1]
    np.testing.assert_allclose(predict_probs(two.model, valid), predict_probs(one.model, valid), atol=1e-5)
    assert weights(one) != weights(create(squares)) and len(lines_of_two) == len(lines_of_one) == RECIPE.epochs
    assert [row["epoch"] for row in rows[""]] == [1, 2, 3]


def create(squares):
    "What training begins with."
    return SimpleNamespace(model=_data(prepared(squares), RECIPE).model("none", "none"))


RUN = """
import sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from test_distributed import *
from skinlesion.data.store import ImageStore
train((ImageStore({store!r}), make_rows()), 2, work_dir={work!r}, progress=lambda line: print(line, flush=True))
"""


def relatives(work):
    "Processes whose command line names the folder."
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:
            continue
        if str(work).encode() in command and b"-c" not in command.split(b"\0"):
            found.append(int(path.parent.name))
    return found


def kill_a_run(squares, work, writes, seconds=180):
    "Start a run of two processes, kill its caller after so many writes of its state, and see its processes end."
    code = RUN.format(tests=str(Path(__file__).parent), store=str(squares[0].root), work=str(work))
    caller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    state = work / "fit" / "state.pt"
    seen = set()
    end = time.monotonic() + seconds
    while len(seen) < writes:
        assert caller.poll() is None and time.monotonic() < end, (len(seen), caller.stderr.read().decode()[-2000:])
        try:
            seen.add(state.stat().st_mtime_ns)
        except FileNotFoundError:
            pass
        time.sleep(.002)
    assert len(relatives(work)) >= 3  # torchrun and two of its own
    os.kill(caller.pid, signal.SIGKILL)
    caller.wait()
    caller.stderr.close()
    end = time.monotonic() + 20
    while relatives(work) and time.monotonic() < end:
        time.sleep(.05)
    assert relatives(work) == []


@pytest.fixture(scope="module")
def undisturbed(squares):
    "The lines and the result of a run of two processes that is not killed."
    lines = []
    return lines, train(squares, 2, progress=lines.append)


@pytest.mark.slow
@pytest.mark.parametrize("writes", [1, 3, 5, 7])
def test_killed_run_of_two_processes_goes_on(squares, undisturbed, tmp_path, writes):
    "In the middle of an epoch or at its end: the same bytes, and no process left behind."
    kill_a_run(squares, tmp_path, writes)
    lines = []
    result = train(squares, 2, work_dir=tmp_path, progress=lines.append)
    assert weights(result) == weights(undisturbed[1]) and result.history.equals(undisturbed[1].history)
    assert [line for line in lines if not line.startswith("↻ ")] == undisturbed[0] and any(
        line.startswith("↻ ") for line in lines
    )


@pytest.mark.slow
def test_same_bytes_twice(squares, undisturbed):
    "Two processes give what two processes gave."
    assert weights(train(squares, 2)) == weights(undisturbed[1])


@pytest.mark.slow
def test_errors_of_the_processes_reach_the_caller(squares):
    "A loss that is no number names its images; no process is left."
    with pytest.raises(FloatingPointError, match="on the batch of images ISIC_"):
        # a step multiplies the weights by -99, so that they soon exceed every number
        explodes = dict(learning_rate=10.0, weight_decay=10.0, warmup_epochs=0.0, patience=40, epochs=40, batch_size=4)
        train(squares, 2, RECIPE.replace(augment="none", **explodes))
    with pytest.raises(ValueError, match="the validation set has 1 image"):
        rows = squares[1].assign(split=["valid" if i == 0 else "train" for i in range(len(squares[1]))])
        train((squares[0], rows), 2)


@pytest.mark.slow
def test_steps_heads_and_folds_in_two_processes(squares):
    "Metadata on a frozen backbone, a further head with missing targets, two folds; without batch norm within 1e-4."
    heads = dict(severity=dict(kind="ordinal", levels=["mild", "severe"]))
    recipe = RECIPE.replace(fusion="concat", augment="none", heads=heads, head_epochs=2, epochs=2, folds=2)
    one, two = (train_folds(prepared(squares), squares[1], recipe.replace(devices=n)) for n in (1, 2))
    assert one.folds.equals(two.folds)
    for a, b in zip(one.fits, two.fits):
        assert list(b.stages) == ["image", "head"] and "valid_severity_mae" in b.history
        np.testing.assert_allclose(b.stages["image"].to_numpy(float), a.stages["image"].to_numpy(float), atol=1e-4)


@pytest.mark.slow
def test_a_killed_process_is_an_error(squares, tmp_path):
    "Where one of the processes is killed the caller hears of it, and the rest end."
    import threading

    def kill_one():
        while len(found := relatives(tmp_path)) < 3:
            time.sleep(.05)
        time.sleep(2)
        os.kill(max(found), signal.SIGKILL)
    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(RuntimeError, match="training in 2 processes ended"):
        train(squares, 2, work_dir=tmp_path)
    killer.join()
    assert (
        relatives(tmp_path) == []
        and json.dumps(sorted(p.name for p in (tmp_path / "fit").iterdir() if p.name == "job")) == "[]"
    )


def side_by_side(squares, **more):
    "Two folds at the same time, a thread each."
    return train_folds(prepared(squares), squares[1], RECIPE.replace(folds=2, fits_at_once=2), **more)


def test_folds_side_by_side_end_where_they_end_in_turn(squares):
    "The same bytes as one after another with as many threads; lines name their fold, rows reach their log."
    lines = []
    rows = {}
    def log(name):
        return SimpleNamespace(epoch=rows.setdefault(name, []).append)
    in_turn = train_folds(prepared(squares), squares[1], RECIPE.replace(folds=2))
    both = side_by_side(squares, progress=lines.append, make_logger=log)
    assert both.predictions.equals(in_turn.predictions)
    for a, b in zip(both.fits, in_turn.fits):
        assert weights(a) == weights(b) and a.history.equals(b.history) and a.best_epoch == b.best_epoch
    assert lines[0] == "2 folds, 2 at a time with 1 thread each"
    assert [sum(line.startswith(f"fold {n}: epoch") for line in lines) for n in (1, 2)] == [3, 3]
    epochs = {name: [row["epoch"] for row in part] for name, part in rows.items()}
    assert epochs == dict(fold_0=[1, 2, 3], fold_1=[1, 2, 3])


SIDE_BY_SIDE = RUN.replace("train((Im", "side_by_side((Im").replace("make_rows()), 2,", "make_rows()),")


@pytest.mark.slow
def test_folds_side_by_side_end_with_their_caller_and_with_each_other(squares, tmp_path):
    "After a kill of the caller no process is left and the next run goes on; an error of one fold is that of the call."
    code = SIDE_BY_SIDE.format(tests=str(Path(__file__).parent), store=str(squares[0].root), work=str(tmp_path))
    caller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert any(line.startswith("fold 2: epoch 1") for line in caller.stdout) and len(relatives(tmp_path)) == 2
    os.kill(caller.pid, signal.SIGKILL)
    caller.wait()
    end = time.monotonic() + 20
    while relatives(tmp_path) and time.monotonic() < end:
        time.sleep(.05)
    assert relatives(tmp_path) == []
    lines = []
    resumed = side_by_side(squares, work_dir=tmp_path, progress=lines.append)
    assert weights(resumed.fits[0]) == weights(side_by_side(squares).fits[0]) and RESUMED in "".join(lines)
    explodes = RECIPE.replace(folds=2, fits_at_once=2, learning_rate=10.0, weight_decay=10.0, warmup_epochs=0.0)
    with pytest.raises(FloatingPointError, match="on the batch of images ISIC_"):
        explodes = explodes.replace(epochs=40, patience=40)
        train_folds(prepared(squares), squares[1], explodes, work_dir=tmp_path / "other")
    assert relatives(tmp_path) == []
