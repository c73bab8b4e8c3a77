"""How often the 95 % intervals of evaluation hold the truth, and how biased plain ECE is.

    python benchmarks/coverage.py [--tables 1000] [--lesions 100 300 1000] [--resamples 1000] [--sharpness 1.6]
                                  [--seed 0] [--draws 1000000]

Simulated tables in which lesions repeat: seven classes as common as in HAM10000, one to three images of each lesion
whose scores share most of their noise, so images of a lesion are right or wrong together. The right probabilities are
known; the predictor states them with logits `sharpness` times as large, which is a planted, non-zero miscalibration
(1 plants none, below 1 the predictor is too modest). The truth comes from `draws` images of the same kind. Each table
is scored as `scorecard` scores it. A share comes with Wilson's interval over the tables, a bias with twice its
standard error, that of the truth included; `ece, unshifted` is what percentiles that are not shifted would do.
"""
import argparse
import os
import time

import numpy as np
import pandas as pd

from skinlesion.stats.intervals import delong_interval, wilson_interval
from skinlesion.stats.metrics import METRICS, malignancy_metrics, weighted_metrics
from skinlesion.stats.resamples import Resamples

COMMON = np.array([.033, .051, .110, .011, .111, .670, .014])  # akiec bcc bkl df mel nv vasc
MALIGNANT = np.array([True, True, False, False, True, False, False])
# how far the true class stands out; noise of a lesion and of each of its images
PULL = 1.6
SHARED = 1.
OWN = .5
WHOLE = "accuracy", "brier", "ece_debiased", "ece", "ece_adaptive", "ece_classwise", "mce"
BINARY = "sensitivity", "auroc"
ROWS = (
    "accuracy",
    "sensitivity",
    "auroc",
    "auroc, DeLong",
    "brier",
    "ece_debiased",
    "ece",
    "ece_adaptive",
    "ece_classwise",
    "mce",
    "ece, unshifted",
)


def simulate(n_lesions, sharpness, rng):
    "Targets, probabilities and lesions of a table of `n_lesions` lesions."
    lesions = np.repeat(np.arange(n_lesions), rng.integers(1, 4, n_lesions))
    targets = rng.choice(7, n_lesions, p=COMMON)[lesions]
    seen = SHARED * rng.normal(size=(n_lesions, 7))[lesions] + OWN * rng.normal(size=(len(lesions), 7))
    seen[np.arange(len(lesions)), targets] += PULL
    logits = sharpness * (seen * PULL / (SHARED**2 + OWN**2) + np.log(COMMON))  # times 1, Bayes' rule for what is seen
    probs = np.exp(logits - logits.max(1, keepdims=True))
    return targets, probs / probs.sum(1, keepdims=True), lesions


def values(targets, probs, lesions, weights=None):
    "Every metric (R,) of a table."
    score = probs[:, MALIGNANT].sum(1).clip(max=1)
    return (weighted_metrics(targets, probs, weights, WHOLE, lesions)
            | malignancy_metrics(MALIGNANT[targets], score, weights, names=BINARY))


def leaves(table, n_resamples, seed):
    "The leaves of one table, as `scorecard` makes them, and two alternatives."
    targets, probs, lesions = table
    resamples = Resamples(lesions, n_resamples, seed)
    columns = values(*table, resamples.weights)
    positive = MALIGNANT[targets]
    made = {}
    for name, column in columns.items():
        if name in ("accuracy", "sensitivity"):
            made[name] = resamples.share_of(column, positive if name == "sensitivity" else None)
        elif name == "auroc":
            made[name] = resamples.auroc_of(column, positive)
        else:
            made[name] = resamples.leaf(column, kind=METRICS[name].interval)
    made["auroc, DeLong"] = delong_interval(positive, probs[:, MALIGNANT].sum(1), lesions)
    made["ece, unshifted"] = resamples.leaf(columns["ece"])
    return made


def coverage(tables=1000, n_lesions=300, n_resamples=1000, sharpness=1.6, seed=0, draws=1_000_000):
    "A row per metric: truth, bias, share of tables whose interval holds the truth, with its interval, and the width."
    truth = {
        name: column[0]
        for name, column in values(*simulate(draws // 2, sharpness, np.random.default_rng([seed, 1]))).items()
    }
    truth |= {row: truth[row.split(",")[0]] for row in ROWS}
    cards = [
        leaves(simulate(n_lesions, sharpness, np.random.default_rng([seed, 2, k])), n_resamples, seed + k)
        for k in range(tables)
    ]
    rows = []
    for row in ROWS:
        found = [card[row] for card in cards if card[row]["low"] is not None]
        stated = np.array([card[row]["value"] for card in cards if card[row]["value"] is not None])
        held = np.mean([leaf["low"] <= truth[row] <= leaf["high"] for leaf in found]) if found else np.nan
        low, high = wilson_interval(held, len(found)) if found else (np.nan, np.nan)
        rows.append(
            dict(
                metric=row,
                lesions=n_lesions,
                truth=truth[row],
                mean=stated.mean(),
                bias=stated.mean() - truth[row],
                two_se=2 * stated.std() * np.sqrt(1 / len(stated) + n_lesions / (draws // 2)),
                holds=held,
                low=low,
                high=high,
                width=np.mean([leaf["high"] - leaf["low"] for leaf in found]) if found else np.nan,
                no_interval=len(cards) - len(found),
            )
        )
    return pd.DataFrame(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, default=1000)
    parser.add_argument("--lesions", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--sharpness", type=float, default=1.6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=1_000_000)
    args = parser.parse_args()
    for n_lesions in args.lesions:
        start = time.perf_counter()
        table = coverage(args.tables, n_lesions, args.resamples, args.sharpness, args.seed, args.draws)
        print(
            f"\n{args.tables} tables of {n_lesions} lesions, {args.resamples} resamples each, logits "
            f"times {args.sharpness:g}, "
            f"truth from {args.draws:,} draws; {time.perf_counter() - start:.0f} s, load {os.getloadavg()[0]:.1f}"
        )
        print(table.drop(columns="lesions").round(4).to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
