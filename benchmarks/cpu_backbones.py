"""Images per second of backbones for a CPU, in training and in answering, by how the cores are used.

    python benchmarks/cpu_backbones.py [--backbone mobilenetv2_100 tf_efficientnet_lite0] [--size 96 128] [--frozen 3]
        [--batch 32] [--steps 12] [--rounds 5]

one     one process with a thread for each core: a fit as `fits_at_once: 1` trains it.
many    as many processes as cores, a thread each: folds as `fits_at_once` trains them side by side.
frozen  as many, with as many `frozen_stages` as `--frozen` says.
answer  the model's answers (no gradient) in one process with a thread for each core.

Training is `fit` over pixels in memory without augmentation, from the end of its first step to the end of its last. A
round measures all backbones, sizes and ways one after the other. A ratio is the median over the rounds against the
baseline of that round: the first backbone at the first size in the same kind of work, training in one process. The
figures count only where `quiet` is true: a load of at most 1 before the start.
"""
import argparse
import json
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from train_step import make_data, time_step

from skinlesion.data.datasets import make_loader
from skinlesion.model.fusion import create_model

CORES = os.cpu_count()


def training_rate(backbone, size, batch, steps, threads, frozen=0):
    "Images per second of one fit."
    torch.set_num_threads(threads)
    data = make_data(size, steps * batch)
    case = dict(backbone=backbone, batch=batch, steps=steps, workers=0, frozen=frozen)
    case |= dict(plain=data, valid=make_data(size, 2 * batch))
    return batch / time_step(case)[0]


def answering_rate(backbone, size, batch, steps, threads):
    "Images per second of a model in use."
    torch.set_num_threads(threads)
    model = create_model(backbone, 7, seed=0).eval()
    images = next(iter(make_loader(make_data(size, batch), batch)))['image']
    with torch.inference_mode():
        model(images)
        start = time.perf_counter()
        for _ in range(steps):
            model(images)
    return batch * steps / (time.perf_counter() - start)


def side_by_side(pool, work, frozen):
    "Images per second of as many fits as cores, together."
    fits = [pool.submit(training_rate, *work, 1, frozen) for _ in range(CORES)]
    return sum(fit.result() for fit in fits)


def rates(pool, frozen, *work):
    "Images per second of each way to do the work."
    return dict(
        one=pool.submit(training_rate, *work, CORES).result(),
        many=side_by_side(pool, work, 0),
        frozen=side_by_side(pool, work, frozen),
        answer=pool.submit(answering_rate, *work, CORES).result(),
    )


def ratio(rounds, case, kind, base, base_kind):
    "The median over the rounds of a rate against that of the baseline, with the least and the greatest."
    values = [done[case][kind] / done[base][base_kind] for done in rounds]
    return [round(f(values), 3) for f in (statistics.median, min, max)]


def middle(rounds, case, kind):
    "The median over the rounds of a rate, images per second."
    return round(statistics.median(done[case][kind] for done in rounds), 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--backbone', nargs='+', default=['mobilenetv2_100', 'tf_efficientnet_lite0'])
    parser.add_argument('--size', nargs='+', type=int, default=[96, 128])
    parser.add_argument('--frozen', type=int, default=3)
    parser.add_argument('--batch', type=int, default=32)
    parser.add_argument('--steps', type=int, default=12)
    parser.add_argument('--rounds', type=int, default=5)
    args = parser.parse_args()
    quiet = os.getloadavg()[0] <= 1
    cases = [(backbone, size) for size in args.size for backbone in args.backbone]
    rounds = []
    with ProcessPoolExecutor(CORES, mp_context=get_context('spawn')) as pool:
        for k in range(1, args.rounds + 1):
            rounds.append({case: rates(pool, args.frozen, *case, args.batch, args.steps) for case in cases})
            for (backbone, size), done in rounds[-1].items():
                shown = ', '.join(f'{kind} {rate:.1f}' for kind, rate in done.items())
                print(f'round {k}: {backbone} {size} px: {shown} images/s', flush=True)
    base = cases[0]
    for case in cases:
        result = dict(
            benchmark='cpu_backbones',
            backbone=case[0],
            size=case[1],
            cores=CORES,
            quiet=quiet,
            baseline=f'{base[0]} {base[1]} px, one process',
            frozen_stages=args.frozen,
            many_against_one=ratio(rounds, case, 'many', case, 'one'),
            frozen_against_many=ratio(rounds, case, 'frozen', case, 'many'),
            training=ratio(rounds, case, 'one', base, 'one'),
            side_by_side=ratio(rounds, case, 'many', base, 'one'),
            answering=ratio(rounds, case, 'answer', base, 'answer'),
            images_per_second={kind: middle(rounds, case, kind) for kind in ('one', 'many', 'frozen', 'answer')},
        )
        print(json.dumps(result), flush=True)


if __name__ == '__main__':
    main()
