"""Milliseconds per picture of what an ensemble adds, against one member that is shown the picture once.

    python benchmarks/answer.py [--bundle artifacts/ensemble] [--pictures 16] [--rounds 5]
                                [--views none flips d4 d4+crops]

Pictures are noise of the bundle's size, age, sex and site unknown, one picture at a time, as the service predicts.
Baseline, in the same run: the first member that reads the image, the picture as it is. Then every member, all of them
together, all together with each set of views, and the bundle's own policy on probabilities that are there already
(combination, calibration, prediction set, abstention). Each round measures all of them once, in turn; a row is the
median over rounds with the least and the largest ratio to the baseline of the same round. None of it depends on the
data, so it stands in no report.
"""
import argparse
import time
from dataclasses import replace

import numpy as np


def per_picture(answer, pictures):
    "Milliseconds that `answer` takes for one picture, mean over all."
    start = time.perf_counter()
    for picture in pictures:
        answer(picture[None])
    return (time.perf_counter() - start) * 1000 / len(pictures)


def candidates(predictor, views):
    "Name -> function of one picture (1,S,S,3); the baseline first."
    from skinlesion.evaluate.policy import Policy, predict_members
    from skinlesion.model.bundle_files import member_of
    from skinlesion.model.inference import predict_probs
    bundle = predictor.bundle
    encoder = predictor.bundle.encoder
    unknown = None if encoder is None else encoder.encode_one(None, "", "")[None]
    def alone(model):
        return lambda picture: predict_probs(model, picture, unknown)
    looking = [m for m in bundle.members if m.model.config["backbone"]]
    if not looking:
        raise SystemExit(f"no member of {bundle.names} has a backbone; name another bundle with --bundle")
    plain = Policy.plain(list(dict.fromkeys(map(member_of, bundle.names))), bundle.label_set.num_classes)
    found = {f"{looking[0].name}, once": alone(looking[0].model)}
    found |= {f"{m.name}, once": alone(m.model) for m in bundle.members if m is not looking[0]}
    for name in views:
        policy = replace(plain, views=name)
        found[f"all {len(bundle.members)}, views {name}"] = lambda picture, policy=policy: predict_members(
            bundle.members, policy, picture, unknown
        )
    blank = np.zeros((1, *[bundle.image_size] * 2, 3), np.uint8)
    outputs = predict_members(bundle.members, predictor.policy, blank, unknown)
    found["its policy, on given outputs"] = lambda picture: predictor.policy.predict(
        outputs.members, bundle.label_set, outputs.ood_score
    )
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bundle", default="artifacts/ensemble")
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--views", nargs="+", default=["none", "flips", "d4", "d4+crops"])
    options = parser.parse_args()
    from skinlesion.use.predict import Predictor
    predictor = Predictor(options.bundle)
    size = predictor.bundle.image_size
    pictures = np.random.default_rng(0).integers(0, 256, (options.pictures, size, size, 3), np.uint8)
    answers = candidates(predictor, options.views)
    for answer in answers.values():
        answer(pictures[:1])  # first calls are slower
    times = np.array([[per_picture(answer, pictures) for answer in answers.values()] for _ in range(options.rounds)])
    ratios = times / times[:, :1]
    print(
        f"{options.bundle}: {len(predictor.bundle.members)} models, {size} x {size} pixels, "
        f"{options.pictures} pictures, {options.rounds} rounds"
    )
    print(f"{'what':<44}{'ms a picture':>14}{'against the first':>20}")
    for k, name in enumerate(answers):
        low = ratios[:, k].min()
        high = ratios[:, k].max()
        print(f"{name:<44}{np.median(times[:, k]):>14.2f}{np.median(ratios[:, k]):>10.2f} ({low:.2f}-{high:.2f})")


if __name__ == "__main__":
    main()
