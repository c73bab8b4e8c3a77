"The pipeline as its users run it: `dvc` in a copy of this repository, on the embedded data with a tiny setting."
import json
import re
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest

from skinlesion.report.leaves import leaf_text
from tiny import copy_repository, edit_params, hashes, run, trained_repository  # noqa: F401  others use copy_repository


@pytest.fixture(scope="module")
def repo():
    "A copy in which `dvc repro` has run once with the tiny setting."
    to = trained_repository()
    run(to, "dvc", "repro")
    run(to, "git", "add", "-A")
    run(to, "git", "commit", "-qm", "tiny run")
    return to


def leaves(tree, path=()):
    "Every leaf of a metrics file with the keys that lead to it."
    if isinstance(tree, dict) and "value" not in tree:
        for key, value in tree.items():
            yield from leaves(value, (*path, key))
    else:
        yield path, tree


def is_count(path):
    "Whether a leaf counts things: there is nothing to be unsure about."
    return path[0] in ("images", "audit", "explained", "best_epoch") or path[-1] in ("n", "undefined", "n_members")


def is_set(path):
    "Whether a leaf was asked for or locked, and not measured."
    return path[-1] in ("threshold", "target_sensitivity", "target_coverage", "abstain_share")


def leaf_problem(path, leaf):
    "The fault of a leaf of a metrics file, or ''. A metric has an interval around it, or a reason why there is none."
    if not (isinstance(leaf, dict) and {"value", "n"} <= set(leaf)):
        return "has no value or no n"
    if is_count(path):
        return "" if isinstance(leaf["value"], int) else "is no whole number"
    if is_set(path):
        return ""
    low = leaf.get("low")
    high = leaf.get("high")
    if None in (leaf["value"], low, high):
        return "" if leaf.get("reason") and low is None and high is None else "lacks its interval and a reason"
    if not leaf.get("method"):
        return "does not say how its interval was made"
    return (
        "" if low - 1e-12 <= leaf["value"] <= high + 1e-12 else "lies outside its interval"
    ) # a limit may be rounded, 0.9999999999999999 for 1


@pytest.mark.parametrize("changes, words", [
    ({}, ""),
    ({"low": .6}, "outside"),
    ({"high": .4}, "outside"),
    ({"low": None}, "lacks"),
    ({"low": None, "reason": "one lesion"}, "lacks"),
    ({"low": None, "high": None}, "lacks"),
    ({"low": None, "high": None, "reason": "one lesion"}, ""),
    ({"value": None}, "lacks"),
    ({"value": None, "low": None, "high": None, "reason": "undefined"}, ""),
    ({"method": ""}, "how"),
    ({"n": ...}, "no n"),
])
def test_a_faulty_leaf_is_told_from_a_sound_one(changes, words):
    leaf = {"value": .5, "low": .4, "high": .6, "n": 9, "method": "bootstrap"} | changes
    problem = leaf_problem(("test", "ensemble", "accuracy"), {k: v for k, v in leaf.items() if v is not ...})
    assert words in problem and bool(words) == bool(problem)


def test_every_stage_leaves_its_metrics_and_its_report(repo):
    for folder in ("prepare", "train/image", "train/fused", "evaluate", "explain"):
        metrics = json.loads((repo / "reports" / folder / "metrics.json").read_text())
        assert ("benchmark" in metrics) == (folder == "evaluate"), folder
        metrics.pop("benchmark", None)  # words: on what it was measured
        found = list(leaves(metrics))
        assert found, folder
        assert [(path, leaf, problem) for path, leaf in found if (problem := leaf_problem(path, leaf))] == [], folder
        assert folder == "prepare" or not all(is_count(path) for path, _ in found), folder
        page = (repo / "reports" / folder / "report.html").read_text()
        for part in ("<h1>", 'id="parameters"', 'id="provenance"', '<nav aria-label="Contents">', "<main"):
            assert page.count(part) == 1, (folder, part)


def test_the_pages_print_what_was_measured(repo):
    "The evaluation's page and the index print the ensemble's figures with their intervals; no stage is missing."
    ensemble = json.loads((repo / "reports/evaluate/metrics.json").read_text())["test"]["ensemble"]
    page = (repo / "reports/evaluate/report.html").read_text()
    index = (repo / "reports/index.html").read_text()
    for name in ("balanced_accuracy", "auroc_macro"):
        assert leaf_text(ensemble[name]) in page and leaf_text(ensemble[name], 3) in index, name
    assert "No report yet" not in index and "No metrics yet" not in index
    for folder in ("prepare", "train/image", "train/fused", "evaluate", "explain"):
        assert f'href="{folder}/report.html"' in index, folder


def test_reports_load_nothing_from_elsewhere(repo):
    for page in (repo / "reports").rglob("*.html"):
        html = page.read_text()
        loads = re.findall(r"""<(?:script|link|img|iframe|source)[^>]+(?:src|href)\s*=\s*["']([^"']+)""", html)
        outside = [u for u in loads if re.match(r"(https?:)?//", u)]
        assert not outside and "@import" not in html and not re.search(r"url\(\s*['\"]?(https?:)?//", html), (
            page,
            outside,
        )


def test_a_second_run_has_nothing_to_do(repo):
    assert "up to date" in run(repo, "dvc", "repro").stdout
    assert not run(repo, "git", "status", "--porcelain").stdout


ALL_STAGES = {"prepare", "train@image", "train@fused", "evaluate", "explain", "report"}
TRAINING = {"train@image", "train@fused"}
STAGES_READING = {  # modules of every floor -> the stages whose dependencies an edit in it changes
    "taxonomy.py": ALL_STAGES,
    "stats/intervals.py": ALL_STAGES,
    "stats/metrics.py": ALL_STAGES - {"report"},
    "stats/curves.py": {"evaluate"},
    "data/splits.py": ALL_STAGES - {"report"},
    "data/tables.py": {"evaluate", "explain"},
    "data/importers.py": set(),
    "synthetic/draw.py": set(),
    "audit/labels.py": {"prepare"},
    "model/training.py": TRAINING,
    "model/fusion.py": ALL_STAGES - {"prepare", "report"},
    "evaluate/scorecard.py": {"evaluate"},
    "evaluate/policy.py": {"evaluate", "explain"},
    "explain/cam.py": {"evaluate", "explain"},  # evaluate chooses the map by default
    "report/clinical.py": {"evaluate"},
    "report/audit_page.py": set(),
    "report/index.py": {"report"},
    "use/learner.py": set(),
    "apps/panels.py": set(),
    "pipeline/runner.py": set(),
}


def test_an_edit_changes_the_stages_that_read_it(repo):
    "An edit in modules of every floor; downstream stages follow only where an output changes."
    try:
        for module in STAGES_READING:
            with open(repo / "skinlesion" / module, "a") as file:
                file.write("\n# another sentence\n")
        status = json.loads(run(repo, "dvc", "status", "--json").stdout)
    finally:
        run(repo, "git", "checkout", "-q", "--", "skinlesion")
    changed = {module: set() for module in STAGES_READING}
    for stage, changes in status.items():
        for change in changes:
            for path in change["changed deps"]:
                changed[path.removeprefix("skinlesion/")].add(stage)
    assert changed == STAGES_READING
    trains = [module for module, stages in changed.items() if stages & TRAINING]
    assert not [module for module in trains if module.startswith(("report/", "evaluate/", "audit/", "explain/"))]
    assert "data/tables.py" not in trains and "up to date" in run(repo, "dvc", "status").stdout


FIT = """
from skinlesion.pipeline.params import load_params
from skinlesion.use.learner import fit
params = load_params("params.yaml")
fit(
    "data",
    {out!r},
    members={{name: member.model_dump(exclude_unset=True) for name, member in params.train.members.items()}},
    image_size=params.base.image_size,
    split=params.prepare.split.model_dump(),
    accept=tuple(params.prepare.audit.accept),
    colour=params.prepare.colour,
    evaluation=params.evaluate.model_dump(),
    seed=params.base.seed,
    progress=None,
    **params.train.model_dump(exclude={{"members"}}),
)
"""


def test_fit_gives_the_bytes_of_the_pipeline(repo, tmp_path):
    "Weights, predictions and metrics of `fit` with the settings of params.yaml are those of `dvc repro`."
    run(repo, sys.executable, "-c", FIT.format(out=str(tmp_path / "run")))
    for member in ("image", "fused"):
        weights = (tmp_path / "run/models" / member / "weights.safetensors").read_bytes()
        assert weights == (repo / "artifacts/models" / member / "weights.safetensors").read_bytes()
    for table in ("ensemble", "image", "fused"):
        predictions = (tmp_path / "run/predictions" / f"{table}.csv").read_bytes()
        assert predictions == (repo / "artifacts/predictions" / f"{table}.csv").read_bytes()
    metrics = (tmp_path / "run/metrics.json").read_bytes()
    assert metrics == (repo / "reports/evaluate/metrics.json").read_bytes()


def test_metrics_and_plots_show(repo):
    lines = run(repo, "dvc", "metrics", "show").stdout.splitlines()
    assert len(lines) == 6 and max(map(len, lines)) <= 120, lines  # a heading and five files
    assert sum("reports/evaluate/summary.json" in line for line in lines) == 1 and "auroc_macro" in lines[0]
    evaluated = json.loads((repo / "reports/evaluate/metrics.json").read_text())["test"]["ensemble"]
    summary = json.loads((repo / "reports/evaluate/summary.json").read_text())
    assert summary["auroc_macro"] == evaluated["auroc_macro"]["value"]
    run(repo, "dvc", "plots", "show", "-o", repo / ".work/plots")
    page = (repo / ".work/plots/index.html").read_text()
    drawn = ("ROC", "Precision_and_recall", "Confusion", "Reliability", "Risk_and_coverage", "Decision_curve")
    assert all(f"{name}_of_the_ensemble" in page for name in drawn) and "history_csv" in page
    assert "valid_auroc_macro_tsv" in page, "the curves of DVCLive"


def test_a_failing_stage_leaves_the_old_results_as_they_were(repo, tmp_path):
    import nbformat
    before = hashes(repo, "artifacts", "reports")
    path = repo / "nbs/stages/evaluate.ipynb"
    kept = path.read_bytes()
    notebook = nbformat.read(path, 4)
    notebook.cells.append(nbformat.v4.new_code_cell("raise RuntimeError('broken on purpose')"))
    nbformat.write(notebook, path)
    try:
        failed = run(repo, "dvc", "repro", check=False)
        assert failed.returncode != 0
        assert "broken on purpose" in failed.stdout and "failed.ipynb" in failed.stdout and "dvc repro" in failed.stdout
        assert hashes(repo, "artifacts", "reports") == before
        assert (repo / "reports/evaluate/failed.ipynb").is_file()
    finally:
        path.write_bytes(kept)
    assert "up to date" in run(repo, "dvc", "repro").stdout
    assert hashes(repo, "artifacts", "reports") == before


def test_a_misspelt_parameter_stops_before_anything_runs(repo):
    before = hashes(repo, "artifacts", "reports")
    kept = (repo / "params.yaml").read_bytes()
    try:
        edit_params(repo, lambda p: p["train"].update(learning_rat=1.0))
        failed = run(repo, sys.executable, "-m", "skinlesion.pipeline.cli", "run", "prepare", check=False)
        assert failed.returncode != 0 and "learning_rat" in failed.stdout and "learning_rate" in failed.stdout
        assert "Traceback" not in failed.stdout
        assert hashes(repo, "artifacts", "reports") == before
    finally:
        (repo / "params.yaml").write_bytes(kept)


def test_a_stage_runs_the_code_of_the_tree_it_is_called_in(repo, tmp_path):
    "From a subfolder, by the command installed for another checkout: runner and notebook are those of the copy."
    copy = tmp_path / "copy"
    shutil.copytree(repo, copy, symlinks=True)
    for module in ("pipeline/runner.py", "data/splits.py"):
        with open(copy / "skinlesion" / module, "a") as f:
            f.write(f"\nprint('this is {module} of the copy')\n")
    shown = run(copy / "nbs/data", Path(sys.executable).with_name("skinlesion"), "run", "prepare").stdout
    executed = (copy / "reports/prepare/executed.ipynb").read_text()
    assert "this is pipeline/runner.py of the copy" in shown, shown
    assert "this is data/splits.py of the copy" in executed


def test_the_page_answers_what_a_reviewer_asks(repo):
    "Every part of the page is there, and the metrics hold what it shows."
    page = (repo / "reports/evaluate/report.html").read_text()
    for heading in (
        "Summary",
        "Data",
        "Reference standard",
        "Model",
        "Performance",
        "Discrimination",
        "Calibration",
        "Decisions",
        "Abstention",
        "Groups of patients",
        "Robustness",
        "Failures",
        "Limits",
        "Checklist",
    ):
        assert re.search(rf"<h2[^>]*>{heading}", page), heading
    test = json.loads((repo / "reports/evaluate/metrics.json").read_text())["test"]
    assert {"decisions", "conformal", "abstention", "ood", "disagreement", "calibration", "cost"} <= set(
        test["ensemble"]
    )
    assert (
        {"images", "metadata"} <= set(test["robustness"])
        and "sex" in test["subgroups"]
        and set(test["members"]) == {"fused", "image"}
    )
    table = pd.read_csv(repo / "artifacts/predictions/ensemble.csv")
    assert {"predicted", "abstain", "abstain_reason", "prediction_set", "flagged"} <= set(table)
    assert json.loads((repo / "artifacts/ensemble/bundle.json").read_text())["policy"]["combiner"]["members"] == [
        "fused",
        "image",
    ]


def test_each_candidate_stands_beside_what_it_brought(repo):
    "One taken at each step; what chose and what is only shown, side by side."
    table = pd.read_csv(repo / "reports/evaluate/choices.csv")
    assert table.groupby("step").taken.sum().to_dict() == {"views": 1, "combination": 1, "calibration": 1}
    assert table.validation_log_loss.notna().all() and table.test_log_loss.notna().all()


@pytest.mark.slow
def test_no_test_lesion_has_a_say(repo, tmp_path):
    "With other diagnoses of the test images nothing that was chosen, fitted or locked changes, and no answer does."
    copy = tmp_path / "copy"
    shutil.copytree(repo, copy, symlinks=True)
    path = copy / "artifacts/prepared/splits.csv"
    path.chmod(0o644)
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    test = rows.split == "test"
    codes = sorted(rows.diagnosis.unique())
    rows.loc[test, "diagnosis"] = rows.loc[test, "diagnosis"].map(dict(zip(codes, codes[1:] + codes[:1])))
    path.unlink()
    rows.to_csv(path, index=False)
    def policy(root):
        return json.loads((root / "artifacts/ensemble/bundle.json").read_text())["policy"]
    before = policy(copy), hashes(copy, "artifacts/predictions"), (copy / "reports/evaluate/metrics.json").read_text()
    run(copy, sys.executable, "-m", "skinlesion.pipeline.cli", "run", "evaluate")
    assert (policy(copy), hashes(copy, "artifacts/predictions")) == before[:2]
    assert (copy / "reports/evaluate/metrics.json").read_text() != before[2]


@pytest.mark.slow
def test_two_runs_from_clean_give_the_same_bytes(repo):
    before = hashes(repo, "artifacts", "reports")
    for made in ("artifacts", "reports", ".work", ".dvc/cache/runs"):
        shutil.rmtree(repo / made, ignore_errors=True)
    (repo / "dvc.lock").unlink()
    shown = run(repo, "dvc", "repro", "--no-run-cache").stdout
    for stage in ("prepare", "train@image", "train@fused", "evaluate", "explain", "report"):
        assert f"Running stage '{stage}'" in shown and "is cached" not in shown, shown[-6000:]
    assert hashes(repo, "artifacts", "reports") == before


@pytest.mark.slow
def test_a_changed_member_retrains_alone_and_a_removed_one_is_gone(repo, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(repo, copy, symlinks=True)
    edit_params(copy, lambda p: p["train"]["members"]["fused"].update(drop_rate=0.3))
    out = run(copy, "dvc", "repro").stdout
    assert "train@fused" in out and "Running stage 'train@image'" not in out and "Running stage 'prepare'" not in out
    edit_params(copy, lambda p: p["train"]["members"].pop("image"))
    run(copy, "dvc", "repro")
    metrics = json.loads((copy / "reports/evaluate/metrics.json").read_text())
    assert list(metrics["test"]["members"]) == ["fused"]
    bundle = json.loads((copy / "artifacts/ensemble/bundle.json").read_text())
    assert "image" not in json.dumps(bundle["members"])


@pytest.mark.slow
def test_experiments_run_in_place_and_from_the_queue(repo, tmp_path):
    "Both run the library of their own tree: a sentence planted there shows up in the reports they make."
    copy = tmp_path / "copy"
    planted = "For education, research and this test."
    shutil.copytree(repo, copy, symlinks=True)
    library = copy / "skinlesion/taxonomy.py"
    text = re.sub(r'(?m)^DISCLAIMER = ".*"$', f'DISCLAIMER = "{planted}"', library.read_text())
    assert planted in text
    library.write_text(text)
    run(copy, "git", "commit", "-qam", "plant a sentence")
    run(copy, "dvc", "exp", "run", "-S", "evaluate.resamples=60", "--name", "here")
    assert planted in (copy / "reports/evaluate/report.html").read_text()
    run(copy, "git", "checkout", "-q", "--", ".")
    run(copy, "dvc", "exp", "run", "--queue", "-S", "evaluate.resamples=70", "--name", "queued")
    run(copy, "dvc", "exp", "run", "--run-all")
    assert {"here", "queued"} <= set(run(copy, "dvc", "exp", "list", "--name-only").stdout.split())
    run(copy, "dvc", "exp", "apply", "queued")
    assert "resamples: 70" in (copy / "params.yaml").read_text()
    assert planted in (copy / "reports/evaluate/report.html").read_text()
    assert json.loads((copy / "reports/evaluate/metrics.json").read_text())["test"]["ensemble"]["auroc_macro"][
        "method"
    ].endswith("70 resamples")


@pytest.mark.slow
def test_folds_further_heads_and_a_member_without_image_run_through(repo, tmp_path):
    "Each member has as many fits as folds; `dvc repro` retrains only the member whose key is new."
    copy = tmp_path / "copy"
    shutil.copytree(repo, copy, symlinks=True)
    def change(params):
        params["train"].update(folds=2, epochs=1, warmup_epochs=0.5)
        params["train"]["members"] = {
            "ages": {"backbone": None, "fusion": "metadata"},
            "heads": {"backbone": "small_cnn_3", "fusion": "film", "heads": {"malignant": {"kind": "binary"}}},
        }
    edit_params(copy, change)
    run(copy, "dvc", "repro")
    for member in ("ages", "heads"):
        assert sorted(p.name for p in (copy / "artifacts/models" / member).glob("fold_*")) == ["fold_0", "fold_1"]
    metrics = json.loads((copy / "reports/evaluate/metrics.json").read_text())
    assert sorted(metrics["test"]["members"]) == ["ages", "heads"]
    assert "malignant" in (copy / "reports/train/heads/metrics.json").read_text()
    edit_params(copy, lambda params: params["train"]["members"]["ages"].update(patience=3))
    shown = run(copy, "dvc", "repro", "--dry").stdout
    assert "train@ages" in shown and "Running stage 'train@heads'" not in shown
