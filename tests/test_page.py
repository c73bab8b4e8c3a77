"The page: same tables, same bytes; nothing fitted on test; what is missing prints 'not reported'; no script, no load."
import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from skinlesion.evaluate.decisions import cost_matrix
from skinlesion.evaluate.evaluation import evaluate_tables
from skinlesion.evaluate.measures import calibration_card, top_losses
from skinlesion.taxonomy import probability_columns
from skinlesion.report import clinical
from skinlesion.report.card import find_limits
from skinlesion.report.clinical import folder_images, page_sections, write_evaluation
from skinlesion.report.guidelines import CHECKLIST, check_facts, checklist_table
from skinlesion.report.leaves import named_leaves
from skinlesion.report.templates import Picture, slug
from skinlesion.stats.intervals import find_leaf
from skinlesion.taxonomy import DISCLAIMER, LabelSet, get_label_set

HAM = get_label_set("ham10000")
FACTS = dict(reference_standard="Histopathology.", funding="None.", data_source="Drawn by a test <b>.")


def tables(n=240, seed=0, label_set=HAM):
    "Predictions and labels of `n` images, several to a lesion, in a validation and a test split."
    rng = np.random.default_rng(seed)
    C = len(label_set)
    lesion = rng.integers(0, n // 2, n)
    classes = np.random.default_rng(1).integers(0, C, n)[lesion]
    scores = np.exp(rng.normal(size=(n, C)) + 2 * np.eye(C)[classes])
    predictions = pd.DataFrame(scores / scores.sum(1, keepdims=True), columns=probability_columns(label_set))
    ids = [f"i{k:03}" for k in range(n)]
    labels = pd.DataFrame(
        dict(
            image_id=ids,
            diagnosis=np.array(label_set.codes)[classes],
            lesion_id=[f"l{k}" for k in lesion],
            split=np.where(lesion % 2, "test", "valid"),
            sex=np.where(lesion % 3, "female", "male"),
            age=20.0 + lesion % 60,
        )
    )
    return predictions.assign(image_id=ids), labels


def evaluated(predictions, labels, label_set=HAM, **options):
    return evaluate_tables(predictions, labels, label_set, **dict(n_resamples=100) | options)


def answered(sections):
    "The items that some section answers."
    return {item for section in sections.values() for item in section.items}


def text_of(section):
    "A section as it stands on the page."
    return str(section.__html__())


@pytest.fixture
def undrawn(monkeypatch):
    "Pictures without drawing, where only text is tested."
    monkeypatch.setattr(clinical, "draw_picture", lambda draw, alt: Picture(b"", alt, 100))


@pytest.fixture(scope="module")
def result():
    return evaluated(*tables(), costs=cost_matrix(HAM), facts=FACTS, name="made <up>")


@pytest.fixture(scope="module")
def written(result, tmp_path_factory):
    "The folder of an evaluation with one image that can be read."
    root = tmp_path_factory.mktemp("page")
    worst = top_losses(result.data, HAM)["image_id"].iloc[0]
    (root / "images").mkdir()
    Image.new("RGB", (60, 45), (200, 150, 140)).save(root / f"images/{worst}.png")
    return write_evaluation(result, root / "out", folder_images(root / "images"), provenance=dict(predictions="ab12"))


@pytest.fixture(scope="module")
def html(written):
    return (written / "report.html").read_text()


def test_same_tables_give_the_same_bytes(written, tmp_path):
    predictions, labels = tables()
    mixed = predictions.sample(frac=1, random_state=3), labels.sample(frac=1, random_state=4)
    shuffled = evaluated(*mixed, costs=cost_matrix(HAM), facts=FACTS, name="made <up>")
    again = write_evaluation(
        shuffled, tmp_path / "out", folder_images(written.parent / "images"), provenance=dict(predictions="ab12")
    )
    assert {p.name for p in again.iterdir()} == {p.name for p in written.iterdir()}
    for path in written.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_the_folder_holds_what_dvc_draws(written):
    names = {p.name for p in written.iterdir()}
    assert names >= {"metrics.json", "report.html"}
    wanted = dict(roc={"class", "fpr", "tpr"}, pr={"class", "recall", "precision"}, confusion={"actual", "predicted"},
                  reliability={"confidence", "accuracy"}, risk_coverage={"coverage", "risk"},
                  decision_curve={"threshold", "model", "treat_all", "treat_none"})
    for name, columns in wanted.items():
        assert set(pd.read_csv(written / f"{name}.csv")) >= columns, name


def test_every_metric_is_a_leaf_with_its_count_and_interval_or_reason(written):
    metrics = json.loads((written / "metrics.json").read_text())
    leaves = named_leaves(metrics)
    assert {
        "all.accuracy",
        "all.balanced_accuracy",
        "all.auroc_macro",
        "splits.test.accuracy",
        "decisions.sensitivity",
        "abstention.aurc",
        "conformal.coverage",
        "cost.argmax",
    } <= {path for path, _ in leaves}
    for path, leaf in leaves:
        assert "n" in leaf, path
        assert leaf["value"] is not None or leaf.get("reason"), path
        if leaf.get("low") is not None:
            assert leaf["low"] <= leaf["value"] <= leaf["high"], path


def test_the_page_runs_nothing_and_loads_nothing(html):
    assert not re.search(r'<(script|link|iframe|object)\b|\bsrc="(?!data:)|\son\w+=|url\(', html)
    assert "made &lt;up&gt;" in html and "<up>" not in html and DISCLAIMER in html
    assert all(re.search(r'alt="[^"]+"', picture) for picture in re.findall(r"<img [^>]*>", html))


def test_the_summary_stands_first_and_every_section_has_its_place(html, result, undrawn):
    titles = [section.title for section in page_sections(result).values()]
    places = [html.index(f'<section id="{slug(title)}"') for title in titles]
    assert titles[0] == "Summary" and places == sorted(places) and places[0] < html.index("<nav")
    assert "1 images misclassified with high confidence" in html  # the one picture that could be read


def test_what_is_not_covered_is_said_to_be_not_reported(result, undrawn):
    sections = page_sections(result)
    table = checklist_table(list(sections.values()))
    assert len(table) == len(CHECKLIST)
    missing = set(
        table.loc[table["where"] == "not reported", "guideline"]
        + " "
        + table.loc[table["where"] == "not reported", "item"]
    )
    assert missing == set(CHECKLIST) - answered(sections)
    assert {"CLAIM 14", "CLAIM 44", "CLAIM 7", "CLAIM 39", "TRIPOD+AI 23a"} <= answered(sections)
    assert {"CLAIM 15", "CLAIM 30", "CLAIM 33", "TRIPOD+AI 17", "TRIPOD+AI 3a"} <= missing
    assert "Not reported." in text_of(sections["robustness"]) and "(CLAIM 15)" in text_of(sections["reference"])


def test_a_fact_answers_its_items_and_shows_its_words(result, undrawn):
    more = page_sections(replace(result, facts=check_facts(FACTS | dict(ethics="Waived & filed."))))
    assert "TRIPOD+AI 17" in answered(more) and "Waived &amp; filed." in text_of(more["study"])


def test_nothing_that_is_locked_has_seen_the_test_split():
    predictions, labels = tables()
    test = labels["split"] == "test"
    others = np.roll(HAM.codes, 1)[[HAM.index(code) for code in labels["diagnosis"]]]
    wrong = labels.assign(diagnosis=labels["diagnosis"].where(~test, others))
    first = evaluated(predictions, labels)
    second = evaluated(predictions, wrong)
    assert (
        first.cards["test"]["accuracy"]["value"]
        > 0.5
        > second.cards["test"]["accuracy"]["value"]
    )
    same = (
        "decisions.threshold decisions.validation_sensitivity splits.valid.accuracy "
        "abstention.answered conformal.mean_set_size"
    )
    for path in same.split():
        assert find_leaf(first.metrics(), path) == find_leaf(second.metrics(), path), path
    assert first.calibration == second.calibration and first.curves["calibration_choice"].equals(
        second.curves["calibration_choice"]
    )


def test_without_splits_nothing_is_locked_and_the_page_says_so():
    predictions, labels = tables()
    result = evaluated(predictions, labels.drop(columns="split"))
    assert (
        result.part == ""
        and list(result.cards) == [""]
        and "decisions" not in result.blocks
        and result.calibration == ""
    )
    assert "nothing here shows that these were not" in find_limits(result)[0]
    sections = page_sections(result)
    assert "none was locked" in text_of(sections["decisions"]) and "no split" in text_of(sections["data"])
    assert not {"CLAIM 20", "TRIPOD+AI 15"} & answered(sections)


def test_a_lesion_in_two_parts_is_told():
    predictions, labels = tables()
    crossing = labels.assign(lesion_id=labels["lesion_id"].where(labels.index > 20, "same"))
    assert "the parts are not disjoint" in clinical.data_section(evaluated(predictions, crossing, n_resamples=20)).text


@pytest.mark.parametrize("codes", [("nv",), ("mel",)])
def test_one_class_in_the_test_split_is_null_with_a_reason(codes, request):
    if codes == ("mel",):
        request.getfixturevalue("undrawn")
    predictions, labels = tables()
    keep = (labels["split"] == "valid") | labels["diagnosis"].isin(codes)
    result = evaluated(predictions[keep], labels[keep])
    leaf = find_leaf(result.card, "auroc_macro")
    assert leaf["value"] is None and leaf["reason"]
    made = page_sections(result)
    assert "undefined" in text_of(made["performance"]) and len(made) == 15
    assert all(leaf["value"] is not None or leaf.get("reason") for _, leaf in named_leaves(result.metrics()))


def test_classes_of_unknown_malignancy_get_a_page_without_a_threshold(undrawn):
    own = LabelSet("own", ("a", "b", "c"))
    result = evaluated(*tables(label_set=own), own)
    made = page_sections(result)
    assert "which of them are malignant is not stated" in made["summary"].text and "none was locked" in text_of(
        made["decisions"]
    )
    assert not len(result.curves["decision_curve"]) and "decisions" not in result.blocks


def test_a_number_has_one_interval_on_the_whole_page(result):
    data = result.data
    card = calibration_card(
        data.probs,
        data.probs**2 / (data.probs**2).sum(1, keepdims=True),
        data.targets,
        data.lesion_ids,
        n_resamples=100,
    )
    for name, leaf in card["before"].items():
        for key in ("value", "low", "high"):
            assert leaf[key] == pytest.approx(result.card[name][key]), (name, key)


def test_the_page_is_about_all_images_only_where_it_says_so(result):
    "Splits of other names are pooled, and a huge lesion and shared patients are named."
    predictions, labels = tables(80)
    pooled = evaluated(
        predictions, labels.assign(split=labels["split"].replace("test", "clinic A"), patient_id="p"), n_resamples=20
    )
    limits = find_limits(pooled)
    assert limits[0].startswith("None of the splits in the tables (clinic A, valid) is called `test`")
    assert "Some patients have several lesions" in " ".join(limits)
    assert "1 patients stand in more than one part" in " ".join(limits)
    huge = evaluated(
        predictions,
        labels.assign(lesion_id=labels["lesion_id"].where(labels["split"] == "valid", "big")),
        n_resamples=20,
    )
    assert "images are of one lesion (*big*)" in find_limits(huge)[0]


def test_ids_that_only_one_table_holds_stop_it():
    predictions, labels = tables()
    with pytest.raises(ValueError, match="not in the labels"):
        evaluated(predictions, labels[1:])


def test_an_error_leaves_the_earlier_evaluation_alone(result, undrawn, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/report.html").write_text("earlier")
    broken = replace(result, curves=dict(roc=None))
    with pytest.raises(AttributeError):
        write_evaluation(broken, tmp_path / "out")
    assert (tmp_path / "out/report.html").read_text() == "earlier" and [p.name for p in tmp_path.iterdir()] == ["out"]


def stress(kind, **more):
    "A stress table of one change that costs something and one that is refused."
    row = dict(
        metric="auroc",
        auroc=0.9,
        drop=0.1,
        drop_low=0.05,
        drop_high=0.15,
        ece=0.1,
        ece_change=0.02,
        ece_low=-0.01,
        ece_high=0.05,
        changed=0.2,
        n=120,
        n_lesions=60,
        method="paired",
        reason="",
    )
    none = row | dict.fromkeys(("drop", "drop_low", "drop_high", "ece_change", "ece_low", "ece_high"), np.nan)
    first, second = (
        (dict(kind="blur"), dict(kind="none")) if kind == "images" else (dict(field="age"), dict(field="none"))
    )
    tried = [row | first | more, none | second | more]
    if kind == "metadata":
        tried.append(none | dict(field="sex", change="out of range", reason="refused: sex 'x'"))
    return pd.DataFrame(tried)


def test_what_only_a_stage_knows_is_shown_too(result, undrawn):
    leaf = dict(value=.9, low=.8, high=.95, n=120, n_lesions=60)
    blocks = dict(
        ood=dict(noise=dict(auroc=leaf)),
        disagreement=dict(n_members=dict(value=2, n=2), error_auroc=leaf),
    )
    curves = dict(stress_images=stress("images", grade=3), stress_metadata=stress("metadata", change="missing"),
                  choices=pd.DataFrame(dict(step=["views"], candidate=["none"], validation_log_loss=[.5])))
    whole = replace(
        result,
        cards=result.cards | dict(external=result.card),
        member_cards=dict(test=dict(a=result.card, b=result.card)),
        blocks=result.blocks | blocks,
        curves=result.curves | curves,
        calibration="temperature",
        calibrated=True,
        fitted_on=("valid",),
    )
    made = page_sections(whole)
    assert {"CLAIM 30", "CLAIM 33", "TRIPOD+AI 27a"} <= answered(made)
    robustness = text_of(made["robustness"])
    for text in (
        "blur, grade 3: the AUROC falls by 0.10 (0.05-0.15)",
        "refused by the input check",
        "+0.10 (0.05-0.15)",
    ):
        assert text in robustness
    performance = text_of(made["performance"])
    assert (
        "valid (used for fitting)" in performance
        and "The ensemble and its members" in performance
        and "external" in performance
    )
    assert "calibrated on validation (temperature)" in made["summary"].text + made["summary"].after
    abstention = text_of(made["abstention"])
    assert "noise" in abstention and "AUROC for telling wrong predictions from correct ones" in abstention
    assert "Effect of each choice" in text_of(made["model"]) and not any(
        "elsewhere" in s for s in find_limits(whole)
    )
