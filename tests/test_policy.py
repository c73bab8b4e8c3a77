"""A policy from its choice on validation to the prediction for an image: read back as it was written, the same for a
row as for a table, and the same in evaluation as in use."""
import copy
import json

import numpy as np
import pytest
from scipy.special import softmax

from skinlesion.evaluate.calibration import CALIBRATIONS
from skinlesion.evaluate.ensemble import COMBINATIONS
from skinlesion.evaluate.policy import MemberOutputs, Policy, choose_policy
from skinlesion.data.tables import read_predictions, write_predictions
from skinlesion.files import read_json, write_json, write_sums
from skinlesion.model.bundle import load_bundle
from skinlesion.model.bundle_files import BundleError
from skinlesion.taxonomy import LabelSet, get_label_set
from skinlesion.use.predict import Predictor
from tiny import build_bundle, build_pictures

HAM = get_label_set("ham10000")


def member_outputs(n=240, seed=0, members=("a", "b", "c")):
    "Members of different skill on n made-up images of n / 2 lesions, in one view."
    rng = np.random.default_rng(seed)
    classes = HAM.num_classes
    targets = rng.integers(0, classes, n // 2).repeat(2)
    skills = (2.0, 1.0, 0.3)[: len(members)]
    scores = [2.5 * (skill * np.eye(classes)[targets] + rng.normal(size=(n, classes))) for skill in skills]
    lesions = np.array([f"L{i // 2:03}" for i in range(n)])
    return MemberOutputs(tuple(members), ("identity",), softmax(scores, axis=-1)[:, None], targets, lesions)


def through_json(policy):
    return Policy.from_dict(json.loads(json.dumps(policy.to_dict(), allow_nan=False)))


@pytest.mark.parametrize(
    "combination, calibration",
    [*((kind, "vector") for kind in COMBINATIONS), *(("logit_mean", kind) for kind in CALIBRATIONS)],
)
def test_a_row_alone_gets_what_it_gets_in_the_table(combination, calibration):
    "Also from the file, and whatever the order of members and rows."
    policy = through_json(
        choose_policy(member_outputs(), HAM, combination=combination, calibration=calibration, n_resamples=10).policy
    )
    assert (policy.combiner.kind, policy.calibrator.kind) == (combination, calibration)
    members = member_outputs(12, 1).by_member()
    table = policy.predict(members, HAM)
    probs = table.filter(like="p_").to_numpy()
    assert np.allclose(probs.sum(axis=1), 1) and (probs >= 0).all()
    for i in range(len(table)):
        alone = policy.predict({name: rows[[i]] for name, rows in reversed(members.items())}, HAM)
        assert np.allclose(alone.filter(like="p_"), probs[[i]], rtol=0, atol=1e-12)
        decided = ["predicted", "prediction_set", "abstain", "flagged"]
        assert alone[decided].to_dict("records") == table.loc[[i], decided].to_dict("records")


def numbers(values):
    "Every number in nested values."
    if isinstance(values, dict):
        return [n for v in values.values() for n in numbers(v)]
    if isinstance(values, list):
        return [n for v in values for n in numbers(v)]
    return [values] if isinstance(values, float) else []


def test_choosing_twice_gives_the_same_bytes_and_eight_digits():
    kinds = dict(combination="stacking", calibration="dirichlet")
    choices = [choose_policy(member_outputs(120), HAM, **kinds, n_resamples=10) for _ in range(2)]
    first, second = (choice.policy.to_dict() for choice in choices)
    assert json.dumps(first) == json.dumps(second)
    fitted = numbers(
        [
            first["combiner"],
            first["calibrator"],
            first["conformal"],
            first["threshold"]["value"],
            first["abstention"]["value"],
        ]
    )
    assert len(fitted) > 3 * 49 and all(float(f"{n:.8g}") == n for n in fitted)


def test_what_is_locked_holds_on_the_lesions_it_was_locked_on():
    "On cross-fitted probabilities: the target sensitivity, the coverage, the share of abstentions."
    fit = member_outputs(600)
    choice = choose_policy(
        fit,
        HAM,
        combination="convex",
        calibration="vector",
        target_sensitivity=0.9,
        coverage=0.8,
        conformal="split",
        abstain_share=0.2,
        n_resamples=10,
    )
    decided = choice.policy.decide(choice.crossfitted, HAM)
    malignant = np.isin(fit.targets, [HAM.index(code) for code in ("akiec", "bcc", "mel")])
    assert .9 <= decided.flagged[malignant].mean() < .92
    inside = [HAM.codes[t] in words.split() for t, words in zip(fit.targets, decided.prediction_set)]
    assert .8 <= np.mean(inside) < .85 and .15 < decided.abstain.mean() <= .2
    assert choice.policy.threshold.target == .9 and choice.policy.conformal.coverage == .8


def test_a_label_set_without_malignancy_has_no_flag_and_no_threshold():
    own = LabelSet("own", HAM.codes)
    policy = choose_policy(member_outputs(120), own, combination="mean", calibration="none", n_resamples=10).policy
    table = policy.predict(member_outputs(10, 1).by_member(), own)
    assert policy.threshold is None and table.flagged.isna().all() and table.malignancy.isna().all()


@pytest.fixture(scope="module")
def written():
    "A policy as a bundle holds it."
    return choose_policy(
        member_outputs(), HAM, combination="mean", calibration="temperature", n_resamples=10
    ).policy.to_dict()


@pytest.mark.parametrize(
    "part, change, words",
    [
        ("views", "flip", "Did you mean 'flips'?"),
        ("combiner", dict(kind="maen"), "policy, combiner: "),
        ("combiner", dict(members=["a", "a", "b"]), "policy, combiner: "),
        ("calibrator", dict(kind="temprature"), "policy, calibrator: calibration 'temprature'"),
        ("calibrator", dict(num_classes=3), "policy"),
        ("threshold", dict(value=2), "policy, threshold: threshold is 2"),
        ("threshold", dict(vaule=.1), "unknown key 'vaule'"),
        ("conformal", dict(kind="mondrian"), "policy, conformal: kind 'mondrian'"),
        ("conformal", dict(quantiles=[.5]), "policy, conformal: "),
        ("abstention", dict(value="low"), "policy, abstention: "),
        ("abstention", 3, "policy, abstention: "),
        ("ood", dict(kind="energy"), "policy, ood: "),
    ],
)
def test_a_policy_that_does_not_hold_together_is_refused_with_its_place(written, part, change, words):
    values = copy.deepcopy(written)
    values[part] = (values[part] or {}) | change if isinstance(change, dict) else change
    with pytest.raises(ValueError, match=words.replace("?", r"\?")):
        Policy.from_dict(values)


def test_a_bundle_from_before_policies_answers_as_it_did(tmp_path):
    bundle = build_bundle(tmp_path / "bundle")
    pictures = build_pictures(tmp_path)
    before = Predictor(bundle).predict(pictures["a"], 50)
    facts = read_json(bundle / "bundle.json")
    write_json(bundle / "bundle.json", {k: v for k, v in facts.items() if k not in ("policy", "colour", "views")})
    write_sums(bundle)
    older = load_bundle(bundle)
    after = Predictor(bundle).predict(pictures["a"], 50)
    assert older.policy is None and after.probabilities == before.probabilities
    assert (after.abstain, after.prediction_set, after.flagged, after.threshold, after.coverage) == (
        False,
        None,
        None,
        None,
        None,
    )


def test_the_table_of_use_goes_through_the_file_of_evaluation(tmp_path):
    "Decisions are columns of their own; a policy for other members is refused."
    names = ("image", "fused", "another")
    kinds = dict(combination="logit_mean", calibration="vector", n_resamples=10)
    two, three = (choose_policy(member_outputs(members=names[:k]), HAM, **kinds).policy for k in (2, 3))
    bundle = build_bundle(tmp_path / "bundle")
    pictures = build_pictures(tmp_path)
    def with_policy(policy):
        write_json(bundle / "bundle.json", read_json(bundle / "bundle.json") | dict(policy=policy.to_dict()))
        write_sums(bundle)
        return Predictor(bundle)
    table = with_policy(two).predict_many(pictures.values())
    back = read_predictions(write_predictions(table, tmp_path / "out.csv"), HAM)
    assert back.predicted.tolist() == table.predicted.tolist() and np.allclose(back.p_mel, table.p_mel, atol=1e-7)
    for column in ("abstain", "flagged"):
        assert back[column].astype(str).tolist() == table[column].astype(str).tolist()
    for column in ("abstain_reason", "prediction_set"):
        assert back[column].fillna("").tolist() == table[column].tolist()
    with pytest.raises(BundleError, match="the policy combines the members .*'another'.*, but the bundle has"):
        with_policy(three)
