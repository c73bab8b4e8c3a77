"""Training through `fit` against a bare PyTorch loop: the same model, batches, optimiser, threads and memory layout.

    python benchmarks/train_step.py [--backbone resnet10t mobilenetv2_100] [--size 64 128] [--batch 16 32]
        [--steps 12] [--rounds 7] [--threads N]

bare    a plain training loop over normalised channels-last tensors in memory (on a GPU: on the GPU, under bf16
        autocast, with cudnn.benchmark, without determinism).
step    `fit` over the same pixels without augmentation: it collates and normalises each batch, and does all that a run
        does in each step (determinism, reseeding, schedule, clipping, checks, sums). From the end of its first step to
        the end of its last. Target 0.97, on a GPU 0.95.
epoch   `fit` with the augmentation of the default settings: from the end of one epoch to the end of the last step of
        the next, so with the loader and the start of an epoch. Target 0.9. `--workers` loads in other processes.
ends    seconds that the end of that epoch took: validation of as many images, the checkpoint (`work_dir`), the history.
        No part of a ratio.

A round measures the three one after the other, in an order that changes with the rounds. A ratio is the median over the
rounds, so that other work on the machine affects all alike. The verdict (`met`) is that of the wall clock. The ratio
in processor time is printed too and has no target, since waiting threads use it as well. A verdict counts only where
`quiet` is true: a load of at most 1 before the start.
"""
import argparse
import json
import os
import statistics
import tempfile
import time

import cv2
import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from skinlesion.data.datasets import LesionDataset, make_loader
from skinlesion.images import normalise
from skinlesion.model.fusion import create_model
from skinlesion.model.optim import param_groups
from skinlesion.model.recipe import Recipe
from skinlesion.model.training import fit
from skinlesion.taxonomy import get_label_set

GPU = torch.cuda.is_available()
TARGETS = dict(step=.95 if GPU else .97, epoch=.9)


class MemoryStore:
    "The part of an ImageStore that a dataset reads, over an array."
    def __init__(self, ids, pixels):
        self.rows = {k: i for i, k in enumerate(ids)}
        self.pixels = pixels
        self.size = pixels.shape[1]
    def position(self, image_id):
        return self.rows[image_id]
    def image(self, image_id):
        return self.pixels[self.rows[image_id]]


def make_data(size, images, augment=None):
    "A dataset of smooth random pixels, all seven classes."
    label_set = get_label_set('ham10000')
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        dict(image_id=[f'i{k}' for k in range(images)], diagnosis=[label_set.codes[k % 7] for k in range(images)])
    )
    some = [
        cv2.GaussianBlur(rng.integers(0, 256, (size, size, 3), dtype=np.uint8), (0, 0), size / 20) for _ in range(64)
    ]
    return LesionDataset(
        MemoryStore(table.image_id, np.stack([some[k % 64] for k in range(images)])), table, label_set, augment=augment
    )


class Clock:
    "Notes wall and processor time."
    def __init__(self):
        self.times = []
    def note(self, *_):
        if GPU:
            torch.cuda.synchronize()
        self.times.append((time.perf_counter(), time.process_time()))
    def between(self, a, b):
        return np.subtract(self.times[b], self.times[a])


def time_step(case):
    "Seconds (wall, processor) per step of `fit`, from the end of its first step to that of its last."
    clock = Clock()
    steps = case['steps']
    def note(step):
        return clock.note() if step in (1, steps) else None  # a GPU is waited for twice only
    fit(create_model(case['backbone'], 7, seed=0), case['plain'], case['valid'], config(case, 1), on_step=note)
    return clock.between(0, 1) / (steps - 1)


def time_epoch(case):
    "Seconds (wall, processor) per step of the second epoch, and the wall seconds that the end of an epoch takes."
    clock = Clock()
    steps = case['steps']
    def note(step):
        return clock.note() if step in (steps, 2 * steps) else None
    with tempfile.TemporaryDirectory() as folder:
        model = create_model(case['backbone'], 7, seed=0)
        fit(
            model, case['augmented'], case['valid'], config(case, 2), progress=clock.note, work_dir=folder, on_step=note
        )
    ends = [*range(len(clock.times))]  # step, epoch's line, step, epoch's line
    assert len(ends) == 4, f'{len(ends)} moments instead of 4: fit no longer says one line per epoch'
    return clock.between(1, 2) / steps, clock.between(0, 1)[0]


def config(case, epochs):
    "The recipe of the run that is timed."
    frozen = case.get('frozen', 0)
    return Recipe(
        epochs=epochs,
        batch_size=case['batch'],
        warmup_epochs=0,
        patience=9,
        workers=case['workers'],
        weight_power=0.0,
        frozen_stages=frozen,
        pretrain_epochs=min(1, frozen),  # not done here: frozen stages need a start that a recipe could have
    )


def time_bare(case):
    "Seconds (wall, processor) per step of the bare loop, from the end of its first step to that of its last."
    device = 'cuda' if GPU else 'cpu'
    torch.backends.cudnn.benchmark = True
    model = create_model(case['backbone'], 7, seed=0).train().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(param_groups(model, .05, 1e-3), lr=1e-3, fused=True)
    clock = Clock()
    batch = case['batch']
    for k in range(case['steps']):
        part = slice(k * batch, (k + 1) * batch)
        with torch.autocast(device, torch.bfloat16, enabled=GPU):
            loss = F.cross_entropy(model(case['images'][part]).float(), case['targets'][part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if k in (0, case['steps'] - 1):
            clock.note()
    return clock.between(0, 1) / (case['steps'] - 1)


def loader_rate(case):
    "Images per second of the loader alone."
    start = time.perf_counter()
    for _ in make_loader(case['augmented'], case['batch'], 0, shuffle=True, workers=case['workers']):
        pass
    return len(case['augmented']) / (time.perf_counter() - start)


def make_case(args, backbone, size, batch):
    "What one comparison needs."
    n = args.steps * batch
    device = 'cuda' if GPU else 'cpu'
    plain = make_data(size, n)
    images = normalise(plain.store.pixels).to(device).contiguous(memory_format=torch.channels_last)
    return dict(
        backbone=backbone,
        size=size,
        batch=batch,
        steps=args.steps,
        workers=args.workers,
        plain=plain,
        valid=make_data(size, n),
        augmented=make_data(size, n, args.policy),
        images=images,
        targets=plain.targets.to(device),
    )


def measure(case, rounds):
    "One dict per round: seconds per step of each side by (wall, processor), and what the end of an epoch took."
    time_bare(case | dict(steps=2))  # warm-up
    for k in range(rounds):
        sides = dict(bare=time_bare, step=time_step, epoch=time_epoch)
        names = list(sides)[k % 3:] + list(sides)[:k % 3]
        done = {name: sides[name](case) for name in names}
        done['epoch'], ends = done['epoch']
        yield done | dict(ends=ends, loader=loader_rate(case))


def report(args, case, quiet, load):
    "Print the rounds of one case and its line of JSON."
    rounds = []
    for k, done in enumerate(measure(case, args.rounds), 1):
        rounds.append(done)
        rates = {name: case['batch'] / done[name][0] for name in ('bare', 'step', 'epoch')}
        print(
            f"round {k}: "
            + ', '.join(
                f'{name} {rate:.1f} images/s' + (f" ({rate / rates['bare']:.3f})" if name != 'bare' else '')
                for name, rate in rates.items()
            ),
            flush=True,
        )
    def ratio(name, clock):
        return round(statistics.median(r['bare'][clock] / r[name][clock] for r in rounds), 3)
    def spread(name):
        return [round(f(r['bare'][0] / r[name][0] for r in rounds), 3) for f in (min, max)]
    ratios = {name: ratio(name, 0) for name in TARGETS}
    result = dict(
        benchmark='train_step',
        backbone=case['backbone'],
        size=case['size'],
        batch=case['batch'],
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name() if GPU else 'cpu',
        workers=case['workers'],
        policy=args.policy,
        rounds=len(rounds),
        bare_images_per_s=round(statistics.median(case['batch'] / r['bare'][0] for r in rounds), 1),
        loader_images_per_s=round(statistics.median(r['loader'] for r in rounds)),
    )
    for name, target in TARGETS.items():
        result |= {
            f'x_{name}': ratios[name],
            f'x_{name}_range': spread(name),
            f'target_x_{name}': target,
            f'x_{name}_processor': ratio(name, 1),
        }
    extra = 1e3 * statistics.median(r['step'][1] - r['bare'][1] for r in rounds)
    result |= dict(
        step_ms=round(1e3 * statistics.median(r['bare'][0] for r in rounds), 1),
        extra_ms_per_step_processor=round(extra, 2),
        epoch_end_s=round(statistics.median(r['ends'] for r in rounds), 2),
        met=all(ratios[n] >= t for n, t in TARGETS.items()),
        quiet=quiet,
        load_before=load,
        load_after=round(os.getloadavg()[0], 1),
        cores=os.cpu_count(),
    )
    print(json.dumps(result), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--backbone', nargs='+', default=['resnet10t', 'mobilenetv2_100'])
    for name, default in dict(size=[64, 128], batch=[16, 32]).items():
        parser.add_argument(f'--{name}', type=int, nargs='+', default=default)
    for name, default in dict(steps=12, rounds=7, workers=0, threads=torch.get_num_threads()).items():
        parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--policy', default='medium', help='of the augmentation in `epoch`')
    args = parser.parse_args()
    if not len(args.backbone) == len(args.size) == len(args.batch):
        parser.error('give --backbone, --size and --batch as many values each')
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(1)
    load = round(os.getloadavg()[0], 1)
    if load > 1:
        print(f'warning: the load is {load} before the benchmark starts; other work makes the ratios unreliable')
    for each in zip(args.backbone, args.size, args.batch):
        report(args, make_case(args, *each), load <= 1, load)


if __name__ == '__main__':
    main()
