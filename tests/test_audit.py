"""The audit against planted truth: planted faults are found and named, nothing else is, and `prepare` stops."""
import io
import json
import re
import shutil
from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import pytest

from madeup import ROOT
from skinlesion.audit.audit import audit_dataset, check_findings, open_stops, scan_images
from skinlesion.audit.labels import label_findings
from skinlesion.data.merge import merge_datasets
from skinlesion.data.prepared import Prepared
from skinlesion.data.schema import read_dataset
from skinlesion.data.splits import split_groups
from skinlesion.report.audit_page import audit_report, write_audit
from skinlesion.synthetic.truth import make_synthetic, read_truth
from skinlesion.pipeline.params import load_params, stage_parameters
from skinlesion.pipeline.runner import StageError, run_notebook

SMALL = dict(n_images=120, size=(72, 96), seed=3, skin_tones="light")


@pytest.fixture(scope="session")
def planted_faults(tmp_path_factory):
    "A set with planted duplicates, crossing lesions and patients, and conflicting labels; its audit and its truth."
    root = tmp_path_factory.mktemp("planted_faults") / "data"
    dataset = make_synthetic(
        root,
        **SMALL,
        exact_duplicates=3,
        near_duplicates=3,
        duplicate_lesions="new",
        duplicate_splits="other",
        crossing_lesions=2,
        crossing_patients=1,
        conflicting_lesions=2,
    )
    return dataset, audit_dataset(dataset), read_truth(root).facts["planted"]


@pytest.fixture(scope="session")
def clean(tmp_path_factory):
    "A small set in which nothing is planted but copies inside one lesion."
    root = tmp_path_factory.mktemp("clean") / "data"
    dataset = make_synthetic(root, **SMALL, shortcut="none")
    scan = scan_images(dataset)
    return dataset, scan, audit_dataset(dataset, scan=scan)


def by_kind(audit):
    "Kind -> finding."
    return {f.kind: f for f in audit.findings}


def named(finding):
    "Names of the items of a finding."
    return {i["name"] for i in finding.items}


def test_planted_duplicates_are_the_pairs(planted_faults):
    dataset, audit, planted = planted_faults
    wanted = {tuple(sorted((d["image_id"], d["original"]))): d["kind"] for d in planted["duplicates"]}
    found = {(a, b): kind for a, b, kind in zip(audit.pairs.image_id_a, audit.pairs.image_id_b, audit.pairs.kind)}
    direct = {pair: kind for pair, kind in found.items() if pair in wanted}
    assert direct == wanted
    copies = {i for pair in wanted for i in pair}
    lesion = dict(zip(dataset.table.image_id, dataset.table.lesion_id))
    others = [pair for pair in found if not copies.issuperset(pair)]  # two copies of one original are a pair too
    assert all(lesion[a] == lesion[b] for a, b in others), others  # and so may be two much alike views of one lesion


def test_planted_crossings_stop_and_are_named(planted_faults):
    dataset, audit, planted = planted_faults
    found = by_kind(audit)
    assert named(found["lesion-crosses-splits"]) == {c["lesion_id"] for c in planted["crossing_lesions"]}
    assert {c["patient_id"] for c in planted["crossing_patients"]} <= named(found["patient-crosses-splits"])
    assert found["duplicates-across-splits"].severity == "stop"
    wanted = {"+".join(sorted((d["image_id"], d["original"]))) for d in planted["duplicates"] if d["split"] == "other"}
    assert wanted <= named(found["duplicates-across-splits"])


def test_planted_conflicts_are_the_lesions_with_two_labels(planted_faults):
    dataset, audit, planted = planted_faults
    found = by_kind(audit)["lesion-two-labels"]
    assert named(found) == {c["lesion_id"] for c in planted["conflicting_lesions"]} and found.severity == "warning"


def test_clean_set_stops_nothing(clean):
    dataset, _, audit = clean
    assert not open_stops(audit.findings)
    assert not {"lesion-two-labels", "duplicates-across-lesions", "duplicates-two-labels", "unreadable-image"} & set(
        by_kind(audit)
    )
    check_findings(audit.findings)


def test_every_number_has_n_and_an_interval_or_a_reason(planted_faults, clean):
    def leaves(value):
        if isinstance(value, dict) and "value" in value:
            yield value
        elif isinstance(value, dict):
            for inner in value.values():
                yield from leaves(inner)
    for audit in (planted_faults[1], clean[2]):
        for finding in audit.findings:
            for leaf in leaves(finding.metrics):
                assert isinstance(leaf["n"], int), (finding.kind, leaf)
                if isinstance(leaf["value"], float):
                    assert leaf.get("reason") or leaf["low"] <= leaf["value"] <= leaf["high"], (finding.kind, leaf)


def test_a_split_that_ties_the_pairs_crosses_nothing(planted_faults):
    dataset, audit, _ = planted_faults
    scan = scan_images(dataset)
    split = split_groups(dataset.table, "stratified", (0.6, 0.2, 0.2), 0, pairs=scan.pairs)
    again = audit_dataset(dataset, split=split, scan=scan)
    assert not open_stops(again.findings)


def test_accepting_by_name_and_in_full(planted_faults):
    _, audit, _ = planted_faults
    copies = by_kind(audit)["duplicates-across-splits"]
    rest = [f for f in audit.findings if not f.kind.endswith("-crosses-splits")]
    one, *others = sorted(named(copies))
    assert open_stops(rest) == [copies]
    assert open_stops(rest, [f"{copies.kind}:{one}"]) == ([copies] if others else [])
    assert not open_stops(rest, [f"{copies.kind}:{name}" for name in named(copies)])
    assert not open_stops(rest, [copies.kind])
    with pytest.raises(ValueError, match="Did you mean 'duplicates-across-splits'"):
        open_stops(rest, ["duplicate-across-splits"])
    with pytest.raises(ValueError, match="matches no item of 'duplicates-across-splits'"):
        open_stops(rest, [f"{copies.kind}:{one}x"])
    with pytest.raises(ValueError, match="cannot be accepted"):
        open_stops(audit.findings, ["lesion-crosses-splits"])


def test_unreadable_images_are_all_named(clean, tmp_path):
    dataset, _, _ = clean
    shutil.copytree(dataset.root, tmp_path / "data")
    broken = [*dataset.table.image_id[[4, 77]]]
    for name in broken:
        path = dataset.image_path(name)
        (tmp_path / "data/images" / path.name).write_bytes(path.read_bytes()[:700])
    audit = audit_dataset(read_dataset(tmp_path / "data"), workers=1)
    assert named(by_kind(audit)["unreadable-image"]) == set(broken)
    with pytest.raises(ValueError, match=f"2 of {len(dataset)} images cannot be read. {broken[0]}, {broken[1]}"):
        check_findings(audit.findings)


@pytest.mark.parametrize("where", ["train", pytest.param("all", marks=pytest.mark.slow)])
def test_shortcut_is_found_where_it_is_planted(tmp_path, where):
    dataset = make_synthetic(tmp_path / "data", **SMALL | dict(n_images=7), per_class=dict(nv=60, mel=60, bkl=60),
                             shortcut="cast", shortcut_class="nv", shortcut_rate=0.95, shortcut_where=where)
    found = [
        f
        for f in audit_dataset(dataset, workers=1).findings
        if f.kind.startswith("background-shortcut") and f.severity == "warning"
    ]
    assert "nv" in {i["name"] for f in found for i in f.items}, [f.summary for f in found]


def test_planted_label_errors_lead_the_ranking():
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 4, 800)
    x = 3 * np.eye(4, 12)[truth] + rng.normal(size=(800, 12))
    wrong = rng.random(800) < 0.05
    given = np.where(wrong, (truth + 1) % 4, truth)
    table = pd.DataFrame(
        dict(
            image_id=[f"i{k}" for k in range(800)],
            lesion_id=[f"l{k}" for k in range(800)],
            patient_id="",
            diagnosis=np.array(["bkl", "df", "mel", "nv"])[given],
        )
    )
    finding, = label_findings(table, x)
    first = table.image_id[wrong].isin([i["name"] for i in finding.items]).sum()
    assert first / len(finding.items) > 0.8 and finding.severity == "note" and "hard cases" in finding.summary


def test_files_are_the_same_bytes_and_carry_no_place(clean, tmp_path):
    dataset, _, audit = clean
    write_audit(audit, dataset, tmp_path / "one")
    write_audit(audit_dataset(dataset, workers=1), dataset, tmp_path / "two")
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two and set(one) == {"audit.json", "report.html"}
    assert str(dataset.root).encode() not in one["audit.json"] + one["report.html"]
    assert json.loads(one["audit.json"])["dataset"]["n_images"] == len(dataset)


def test_markup_in_names_is_escaped(clean):
    dataset = clean[0]
    odd = replace(dataset, info=replace(dataset.info, name="<script>alert(1)</script>", licence="<b>"))
    page = audit_report(clean[2], odd).html()
    assert "<script" not in page and "&lt;script&gt;" in page


@cache
def prepare_parameters():
    "What the committed params.yaml hands to `prepare`, at a small size."
    return stage_parameters(load_params(ROOT / "params.yaml"), "prepare") | dict(image_size=32)


def run_prepare(root, data, **changes):
    "Run the stage `prepare` in a tree of its own; what it printed."
    for folder in ("nbs/stages", "artifacts/prepared", "reports/prepare"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "nbs/stages/prepare.ipynb", root / "nbs/stages")
    if not (root / "data").exists():
        (root / "data").symlink_to(data)
    log = io.StringIO()
    outputs = ["artifacts/prepared", "reports/prepare"]
    try:
        run_notebook(
            "nbs/stages/prepare.ipynb", prepare_parameters() | changes, ["data"], outputs, outputs[1], root, stream=log
        )
    except StageError:
        pass
    return log.getvalue()


def test_prepare_stops_on_a_crossing(planted_faults, tmp_path):
    log = run_prepare(tmp_path, planted_faults[0].root)
    assert re.search(r"ValueError: \d+ lesion\(s\) cross splits", log), log
    assert not [*(tmp_path / "artifacts/prepared").iterdir()]


@pytest.mark.slow
def test_prepare_stops_on_an_unexplained_duplicate_and_takes_an_accepted_one(tmp_path):
    data = tmp_path / "made"
    make_synthetic(
        data, **SMALL, exact_duplicates=0, near_duplicates=1, duplicate_lesions="new", duplicate_splits="other"
    )
    log = run_prepare(tmp_path, data)
    assert "duplicates-across-splits: 1 pair" in log and "in prepare.audit.accept" in log, log
    log = run_prepare(tmp_path, data, audit=dict(accept=["duplicates-across-splits"]))
    record = json.loads((tmp_path / "reports/prepare/audit.json").read_text())
    assert record["severities"]["stop"] == 1, log
    assert json.loads((tmp_path / "reports/prepare/metrics.json").read_text())["audit"]["stop"]["value"] == 1
    log = run_prepare(tmp_path, data, audit=dict(accept=["duplicates-across-split"]))
    assert "Did you mean 'duplicates-across-splits'?" in log, log


@pytest.mark.slow
def test_prepare_leaves_out_a_class_without_images_and_an_undecided_one(clean, tmp_path):
    "As with ISIC 2019, whose tables have the column UNK and no image of it."
    options = dict(about=dict(label_set="isic2019", name="nine"), word_map=dict(akiec="ak", df="unk"))
    merge_datasets(clean[0].root, tmp_path / "nine", **options)
    log = run_prepare(tmp_path, tmp_path / "nine")
    prepared = Prepared.open(tmp_path / "artifacts/prepared")
    assert prepared.label_set.name == "isic2019 without df, scc, unk", log
    assert set(prepared.splits.diagnosis) == {"ak", "bcc", "bkl", "mel", "nv", "vasc"}
    assert prepared.info["left_out"].startswith("no image of df, scc; undecided in label set isic2019, so neither")
