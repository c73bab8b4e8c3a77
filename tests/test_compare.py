"The comparison notebook (missing inputs, members, finished experiments) and the command that compares revisions."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from madeup import PLAIN_GIT
from skinlesion.data.tables import write_predictions
from skinlesion.evaluate.scorecard import compare_predictions
from skinlesion.taxonomy import probability_columns
from skinlesion.files import write_json
from skinlesion.model.bundle import save_member
from skinlesion.model.fusion import create_model
from skinlesion.pipeline.cli import app
from skinlesion.pipeline.revisions import read_evaluation
from skinlesion.taxonomy import get_label_set
from tiny import build_prepared

HAM = get_label_set("ham10000")
DVC_YAML = """stages:
  make:
    cmd: rm -rf artifacts/predictions && cp -r made/${skill} artifacts/predictions
    deps: [made]
    params: [skill]
    outs: [artifacts/predictions]
"""


def lesions(n=120):
    "A split table of `n` images of `n` lesions, half of them for validation."
    return pd.DataFrame(
        dict(
            image_id=[f"i{k}" for k in range(n)],
            lesion_id=[f"l{k}" for k in range(n)],
            age="50",
            sex="",
            site="",
            diagnosis=[HAM.codes[k % 7] for k in range(n)],
            split=["valid", "test"] * (n // 2),
        )
    )


def predictions(folder, skill):
    "Tables of two members, of which one sees `skill[name]` of the truth, and their mean."
    table = lesions()
    rng = np.random.default_rng(0)
    probs = {}
    truth = np.eye(7)[[HAM.index(code) for code in table["diagnosis"]]]
    for name, share in skill.items():
        scores = np.exp(share * truth + rng.normal(size=truth.shape))
        probs[name] = scores / scores.sum(1, keepdims=True)
    probs["ensemble"] = sum(probs.values()) / len(probs)
    for name, values in probs.items():
        own = pd.DataFrame(values, columns=probability_columns(HAM))
        write_predictions(
            pd.concat([table[["image_id", "lesion_id", "split"]], own], axis=1), Path(folder) / f"{name}.csv"
        )


def make_run(root):
    "A tree that looks like one after `dvc repro`, with two untrained members."
    shutil.copy(Path(__file__).parents[1] / "settings.ini", root)
    build_prepared(root / "artifacts/prepared", lesions(), HAM)
    write_json(root / "artifacts/ensemble/bundle.json", dict(image_size=32))
    for name in ("fused", "image"):
        save_member(root / "artifacts/models" / name, create_model("small_cnn_3", 7, seed=1))


@pytest.fixture
def notebook(root, monkeypatch, capsys):
    "Runs the notebook in a tree, in this process; what it names and what it printed."
    def run(tree, change=""):
        (tree / "nbs/apps").mkdir(parents=True, exist_ok=True)
        monkeypatch.chdir(tree / "nbs/apps")
        torch.set_num_threads(1)
        names = {}
        shown = []
        names["display"] = shown.append
        for cell in json.loads((root / "nbs/apps/compare.ipynb").read_text())["cells"]:
            if cell["cell_type"] != "code":
                continue
            exec(compile("".join(cell["source"]), "compare.ipynb", "exec"), names)  # the project's own notebook
            if "resamples, seed" in "".join(cell["source"]):
                names.update(resamples=200)
        return names | dict(shown=shown, said=capsys.readouterr().out)
    return run


def test_it_exports_nothing_and_keeps_no_output(root):
    cells = json.loads((root / "nbs/apps/compare.ipynb").read_text())["cells"]
    assert not any(
        "default_exp" in "".join(c["source"]) or "#| export" in "".join(c["source"]) or c.get("outputs") for c in cells
    )


def test_before_a_run_it_says_what_to_run(tmp_path, root, notebook):
    shutil.copy(root / "settings.ini", tmp_path)
    done = notebook(tmp_path)
    assert (
        "no finished run to compare yet. Run: make repro" in done["said"]
        and "members: none; at least two are needed" in done["said"]
    )
    assert done["picks"] == [] and done["shown"] == []


def test_members_of_one_run_are_compared_and_one_is_picked(tmp_path, notebook):
    make_run(tmp_path)
    predictions(tmp_path / "artifacts/predictions", dict(fused=4, image=1))
    done = notebook(tmp_path)
    assert (
        "no experiments are read" in done["said"]
        and "0 finished experiment(s); compared: ensemble, fused, image" in done["said"]
    )
    assert [pick.run for pick in done["picks"]] == ["fused"] and "image is out: balanced_accuracy" in done["said"]
    assert "ensembles: ensemble; at least two are needed" in done["said"]
    assert (
        list(done["shown"][0].index) == ["fused", "image"]
        and done["costs"]["ensemble"]["size_mb"] == 2 * done["costs"]["fused"]["size_mb"]
    )
    assert (
        done["members"][0].n.max() == 60 and done["cards"]["fused"]["accuracy"]["n"] == 60
    ) # chosen on validation, told on test


def test_equal_members_are_told_apart_by_nothing_but_cost(tmp_path, notebook):
    make_run(tmp_path)
    predictions(tmp_path / "artifacts/predictions", dict(fused=2, image=2))
    pick = notebook(tmp_path)["picks"][0]
    assert pick.left == ("fused", "image") and pick.run == "fused" and "fused stays" in str(pick)


def test_finished_experiments_stand_beside_the_members(tmp_path, notebook):
    "A DVC repository of one stage; its experiments are found by name, what they did not change is shown once."
    def run(*args):
        env = {
            **os.environ,
            **PLAIN_GIT,
            "DVC_NO_ANALYTICS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        done = subprocess.run(args, cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 0, done.stdout[-3000:]
    make_run(tmp_path)
    for skill, share in dict(low=1, high=5).items():
        predictions(tmp_path / "made" / skill, dict(fused=2, image=share))
    (tmp_path / "dvc.yaml").write_text(DVC_YAML)
    (tmp_path / "params.yaml").write_text("skill: low\n")
    for args in (
        ["git", "init", "-q"],
        ["git", "config", "user.email", "test@example.org"],
        ["git", "config", "user.name", "test"],
        ["dvc", "init", "-q"],
        ["dvc", "repro", "-q"],
        ["git", "add", "-A"],
        ["git", "commit", "-qm", "start"],
        ["dvc", "exp", "run", "-q", "--name", "better", "-S", "skill=high"],
    ):
        run(*args)
    run("git", "checkout", "-q", ".")
    run("dvc", "checkout", "-q")
    done = notebook(tmp_path)
    assert "1 finished experiment(s); compared: ensemble, fused, image, better/ensemble, better/image" in done["said"]
    assert "left out: better/fused (the same predictions as fused)" in done["said"]
    assert [pick.run for pick in done["picks"]] == ["better/image", "better/ensemble"]
    # An experiment on another split is named and left out.
    table = lesions().assign(split=["test", "valid"] * 60)
    build_prepared(tmp_path / "artifacts/prepared", table, HAM)
    assert "better/image (its split is another one)" in notebook(tmp_path)["said"]


@pytest.fixture(scope="module")
def revisions(tmp_path_factory):
    "A DVC repository with a tag `low`, an experiment `better`, and a tag `other` whose split is another one."
    tree = tmp_path_factory.mktemp("revisions")
    def run(*args):
        env = {
            **os.environ,
            **PLAIN_GIT,
            "DVC_NO_ANALYTICS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        done = subprocess.run(args, cwd=tree, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 0, done.stdout[-3000:]
    shutil.copy(Path(__file__).parents[1] / "settings.ini", tree)
    build_prepared(tree / "artifacts/prepared", lesions(), HAM)
    write_json(tree / "reports/evaluate/metrics.json", dict(test={}))
    for skill, share in dict(low=1, high=4).items():
        predictions(tree / "made" / skill, dict(fused=2, image=share))
    (tree / "dvc.yaml").write_text(DVC_YAML)
    (tree / "params.yaml").write_text("skill: low\n")
    run("git", "init", "-q")
    for words in (["user.email", "test@example.org"], ["user.name", "test"]):
        run("git", "config", *words)
    for words in (["init", "-q"], ["add", "-q", "artifacts/prepared"], ["repro", "-q"]):
        run("dvc", *words)
    run("git", "add", "-A")
    run("git", "commit", "-qm", "low")
    run("git", "tag", "low")
    run("dvc", "exp", "run", "-q", "--name", "better", "-S", "skill=high")
    for tool in ("git", "dvc"):
        run(tool, "checkout", "-q", *(["."] if tool == "git" else []))
    table = lesions().assign(split=["test", "valid"] * 60)
    build_prepared(tree / "artifacts/prepared", table, HAM)
    run("dvc", "add", "-q", "artifacts/prepared")
    run("git", "commit", "-qam", "other")
    run("git", "tag", "other")
    return tree


def compare(tree, *words, monkeypatch):
    "The command, called in the tree: (exit code, what it printed, what it complained of)."
    monkeypatch.chdir(tree)
    ended = CliRunner().invoke(app, ["compare", *words])
    if ended.exception and not isinstance(ended.exception, SystemExit):
        raise ended.exception
    return ended.exit_code, ended.stdout, ended.stderr


def test_an_experiment_is_held_against_a_tag(revisions, monkeypatch):
    code, out, err = compare(revisions, "low", "better", "--resamples", "300", monkeypatch=monkeypatch)
    assert code == 0, err
    a, b = (read_evaluation(rev, revisions) for rev in ("low", "better"))
    rows = {line.split()[0]: line for line in out.partition("better against")[0].splitlines()[1:]}
    leaf = compare_predictions(b.predictions(), a.predictions(), a.labels(), HAM, 300)["accuracy"]
    assert rows["accuracy"].split()[1:4] == [f"{leaf[k]:.3f}" for k in ("second", "first", "value")] and rows[
        "auroc_macro"
    ].endswith("  better")
    assert "better against low (ensemble, 60 test images of 60 lesions): better in accuracy" in out
    assert (
        "not known: low (made-up): unknown kind of images, leak between its parts" in out
    ) # no training images stand in this split table
    code, out, _ = compare(
        revisions,
        "better",
        "low",
        "--member",
        "image",
        "--split",
        "valid",
        "--resamples",
        "300",
        monkeypatch=monkeypatch,
    )
    assert code == 0 and "low against better (image, 60 valid images of 60 lesions): worse in accuracy" in out
    # The member that the experiment left alone is the same in both.
    code, out, _ = compare(
        revisions, "low", "better", "--member", "fused", "--resamples", "50", monkeypatch=monkeypatch
    )
    assert code == 0 and out.count("  not distinguishable\n") == len(rows) and "better against low (fused" in out


@pytest.mark.parametrize("words, said", [
    (("low", "other"), "low and other may not be compared; split_sha256: low '"),
    (("low", "nowhere"), "revision 'nowhere': unknown Git revision"),
    (("low", "bettr"), "experiments: better. Did you mean 'better'?"),
    (("low", "better", "--member", "imag"), "Did you mean 'image'?"),
    (("low", "better", "--split", "train"), "revision 'low': no image in split 'train'; it has test, valid"),
])
def test_revisions_that_cannot_be_compared(revisions, monkeypatch, words, said):
    code, out, err = compare(revisions, *words, monkeypatch=monkeypatch)
    assert code == 1 and out == "" and said in err and err.startswith("error: ") and "Traceback" not in err


def test_predictions_that_nobody_kept(revisions, tmp_path, monkeypatch):
    shutil.copytree(revisions, tmp_path / "tree", symlinks=True)
    shutil.rmtree(tmp_path / "tree/.dvc/cache")
    for rev in ("low", "better"):
        code, out, err = compare(tmp_path / "tree", "workspace", rev, monkeypatch=monkeypatch)
        assert (
            code == 1
            and f"revision '{rev}': " in err
            and "neither in git nor in a cache that can be read here; bring them from a remote" in err
        )


def test_a_folder_that_is_no_repository(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\n")
    assert "not a git repository" in compare(tmp_path, "HEAD", "workspace", monkeypatch=monkeypatch)[2]
