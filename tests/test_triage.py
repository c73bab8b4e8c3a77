"""Triage under thousands of made-up predictions: never less urgent when malignancy rises, never routine in the dark."""
import random
import tomllib
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest

from madeup import ROOT, tracked
from skinlesion.taxonomy import LABEL_SETS, LabelSet
from skinlesion.use.triage import RISKS, TIERS, RuleTable, read_rules, triage

OWN = LabelSet("own", tuple("abcdef"), malignant={"b", "e"}, undecided={"f"})
UNSTATED = LabelSet("unstated", ("a", "b", "c"))
SETS = (*LABEL_SETS.values(), OWN, UNSTATED)


def malignancy(probs, label_set, predicted):
    "As the policy of a bundle gives it."
    if label_set.is_malignant(predicted) is None:
        return None
    stated = {code: p for code, p in probs.items() if label_set.is_malignant(code) is not None}
    return sum(p for code, p in stated.items() if label_set.is_malignant(code)) / sum(stated.values())


def make(probs, label_set, **fields):
    "A prediction with these probabilities."
    predicted = max(probs, key=probs.get)
    return SimpleNamespace(
        probabilities=probs, predicted=predicted, malignancy=malignancy(probs, label_set, predicted), **fields
    )


def random_fields(rng, label_set):
    "Everything of a prediction but its probabilities."
    chosen = tuple(code for code in label_set.codes if rng.random() < 0.2)
    yes = rng.random()
    return dict(
        prediction_set=rng.choice([None, (), chosen, chosen]),
        abstain=rng.random() < 0.1,
        flagged=rng.choice([None, False, False, True]),
        heads=rng.choice([{}, {}, {"urgent": {"no": 1 - yes, "yes": yes}}]),
    )


def random_probs(rng, label_set):
    "Probabilities from nearly sure to nearly even."
    power = rng.choice([1, 3, 8])
    raw = {code: rng.random() ** power + 1e-9 for code in label_set.codes}
    return {code: p / sum(raw.values()) for code, p in raw.items()}


def random_rule(rng):
    "A valid rule."
    condition = rng.choice([
        dict(malignancy_at_least=rng.random()),
        dict(malignant_except=rng.sample(["mel", "bcc", "ak", "scc"], rng.randint(1, 3)), at_least=rng.random()),
        dict(head="urgent", levels=["yes"], at_least=rng.random()),
        dict(holds=rng.sample(["mel", "nv", "vasc"], 2)),
        dict(abstains=True),
        dict(flagged=True),
    ])
    return dict(tier=rng.choice(TIERS), risk=rng.choice(RISKS), reason="why", **condition)


def random_table(rng):
    "A valid table, most of them foolish."
    rules = tuple(random_rule(rng) for _ in range(rng.randint(0, 6)))
    return RuleTable("made up", "routine", rules, read_rules().referral)


def tables(seed, count):
    "The table of the package, then made-up ones."
    rng = random.Random(seed)
    return [read_rules(), *(random_table(rng) for _ in range(count))]


def cases(seed, count):
    "(random generator, label set, probabilities, other fields, table)"
    rng = random.Random(seed)
    given = tables(seed, 40)
    for _ in range(count):
        label_set = rng.choice(SETS)
        table = given[0] if rng.random() < 0.4 else rng.choice(given)
        yield rng, label_set, random_probs(rng, label_set), random_fields(rng, label_set), table


def rank(prediction, label_set, table):
    "How urgent it is, and how high the risk, as numbers."
    result = triage(prediction, label_set, table)
    return TIERS.index(result.urgency), RISKS.index(result.risk)


def test_a_higher_malignancy_is_never_less_urgent():
    "All else being equal."
    rises = 0
    for rng, label_set, probs, fields, table in cases(1, 4000):
        before = make(probs, label_set, **fields)
        if before.malignancy is None:
            continue
        risen = before.malignancy + rng.random() * (1 - before.malignancy)
        after = SimpleNamespace(**vars(before) | dict(malignancy=risen))
        low = rank(before, label_set, table)
        high = rank(after, label_set, table)
        assert low[0] <= high[0] and low[1] <= high[1], (before, after, table)
        rises += low[0] < high[0]
    assert rises > 50  # the cases are not all alike


def test_probability_moved_to_a_malignant_class_is_never_less_urgent():
    "From a benign class, the class predicted and the malignancy following."
    rises = 0
    for rng, label_set, probs, fields, table in cases(2, 4000):
        benign = [code for code in label_set.codes if label_set.is_malignant(code) is False]
        malignant = [code for code in label_set.codes if label_set.is_malignant(code)]
        if not benign:
            continue
        giver = rng.choice(benign)
        taker = rng.choice(malignant)
        moved = probs[giver] * rng.random()
        after = make(probs | {giver: probs[giver] - moved, taker: probs[taker] + moved}, label_set, **fields)
        before = make(probs, label_set, **fields)
        if before.malignancy is None and after.malignancy is not None:
            continue  # what was not known has become known, and may be small
        low = rank(before, label_set, table)
        high = rank(after, label_set, table)
        assert low[0] <= high[0], (before, after, table)
        rises += low[0] < high[0]
    assert rises > 100


def must_not_be_routine(prediction, label_set):
    "Whether a malignancy is possible or unknown, or the model gives no answer."
    possible = {prediction.predicted, *(prediction.prediction_set or ())}
    return (
        prediction.abstain
        or prediction.malignancy is None
        or prediction.prediction_set == ()
        or any(label_set.is_malignant(code) is not False for code in possible)
    )


def test_never_routine_in_the_dark():
    "Whatever the table; and what is routine is routine for no other reason."
    count = dict.fromkeys(TIERS, 0)
    for _, label_set, probs, fields, table in cases(3, 4000):
        prediction = make(probs, label_set, **fields)
        result = triage(prediction, label_set, table)
        count[result.urgency] += 1
        assert result.reasons and all(result.reasons)
        if must_not_be_routine(prediction, label_set):
            assert result.urgency != "routine" and result.risk != "low", (prediction, table)
    assert all(n > 100 for n in count.values()), count


@pytest.mark.parametrize("label_set", LABEL_SETS.values(), ids=LABEL_SETS)
def test_a_class_predicted_decides_as_the_field_does(label_set):
    "Under the table of the package: a cancer that can spread is urgent, a slow one or a precursor soon."
    for code in label_set.codes:
        probs = {each: 0.985 if each == code else 0.015 / (len(label_set) - 1) for each in label_set.codes}
        prediction = make(probs, label_set, abstain=False, prediction_set=(code,), flagged=None, heads={})
        wanted = dict(mel="urgent", scc="urgent", bcc="soon", ak="soon", akiec="soon", unk="soon").get(code, "routine")
        assert triage(prediction, label_set).urgency == wanted, code


def test_a_table_is_not_changed_by_use():
    "The table of the package is shared by all."
    before = replace(read_rules(), rules=tuple(map(dict, read_rules().rules)))
    for _, label_set, probs, fields, _ in cases(4, 200):
        triage(make(probs, label_set, **fields), label_set)
    assert read_rules() == before


def test_the_files_are_shipped():
    "Whatever lies in the package beside Python is named in pyproject.toml."
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    others = [path for path in tracked(ROOT, "skinlesion") if path.suffix != ".py"]
    patterns = [Path(*package.split("."), glob) for package, globs in shipped.items() for glob in globs]
    assert Path("skinlesion/use/triage.yaml") in others
    for path in others:
        matching = [p for p in patterns if p.parent == path.parent and fnmatch(path.name, p.name)]
        assert matching, f"{path} is not among the package data of pyproject.toml"
