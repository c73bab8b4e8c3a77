"""What training through `fit` costs against a bare PyTorch loop: the same model, batches, threads, optimiser and channels-last layout.

`fit` reads a LesionDataset (uint8 pixels, normalised and collated per batch) and does everything a run does per step: determinism, reseeding,
schedule, gradient clipping, finiteness checks, the books. The bare loop reads normalised channels-last tensors that already lie in memory.
Both are timed from the second step of a round to its last, so start-up, validation and the set-up of oneDNN's kernels are left out of both.
Rounds alternate, and the ratio is the median over pairs of rounds, so that other work on the machine hits both sides alike. A load above 1 is
printed with a warning: two threads that wait for a core make single ratios swing from 0.3 to 1.3, so repeat on a quiet machine.

    python benchmarks/train_step.py [--backbone mobilenetv2_100] [--size 128] [--batch 32] [--steps 7] [--rounds 5] [--threads N]
"""
import argparse
import json
import os
import statistics
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from skinlesion.data.datasets import LesionDataset
from skinlesion.images import normalise
from skinlesion.model.fusion import create_model
from skinlesion.model.training import TrainConfig, fit, param_groups
from skinlesion.taxonomy import get_label_set


class MemoryStore:
    "The part of an ImageStore that a dataset reads, over an array."
    def __init__(self, ids, pixels): self.rows, self.pixels, self.size = {k: i for i, k in enumerate(ids)}, pixels, pixels.shape[1]
    def position(self, image_id): return self.rows[image_id]
    def image(self, image_id): return self.pixels[self.rows[image_id]]


class TimedDataset(LesionDataset):
    "Notes when the first image of each batch is asked for: with no workers, that is when a step begins."
    def start(self, batch): self.batch, self.seen, self.begins = batch, 0, []
    def view(self, i, epoch=0):
        if self.seen % self.batch == 0: self.begins.append(time.perf_counter())
        self.seen += 1
        return super().view(i, epoch)


def make_data(args, images):
    "A dataset of random pixels, all seven classes."
    label_set, rng = get_label_set('ham10000'), np.random.default_rng(0)
    table = pd.DataFrame(dict(image_id=[f'i{k}' for k in range(images)], diagnosis=[label_set.codes[k % 7] for k in range(images)]))
    pixels = rng.integers(0, 256, (images, args.size, args.size, 3), dtype=np.uint8)
    return TimedDataset(MemoryStore(table.image_id, pixels), table, label_set), pixels


def time_fit(args, train, valid):
    "Images per second of `fit`, from its second step to its last."
    model = create_model(args.backbone, 7, seed=0)
    train.start(args.batch)
    valid.start(len(valid))
    fit(model, train, valid, TrainConfig(epochs=1, batch_size=args.batch, warmup_epochs=0))
    ends = [*train.begins[1:], valid.begins[0]]  # the validation begins when the last step has ended
    return args.batch * (len(ends) - 1) / (ends[-1] - ends[0])


def time_bare(args, images, targets):
    "Images per second of the loop everyone writes first, from its second step to its last."
    model = create_model(args.backbone, 7, seed=0).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(param_groups(model, .05), lr=1e-3, fused=True)
    for k in range(args.steps):
        if k == 1: start = time.perf_counter()
        part = slice(k * args.batch, (k + 1) * args.batch)
        loss = F.cross_entropy(model(images[part]), targets[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return args.batch * (args.steps - 1) / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--backbone', default='mobilenetv2_100')
    for name, default in dict(size=128, batch=32, steps=7, rounds=5, threads=torch.get_num_threads()).items():
        parser.add_argument(f'--{name}', type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load = round(os.getloadavg()[0], 1)
    if load > 1: print(f'warning: the load is {load} before the benchmark starts; other work on this machine makes the ratio unreliable')
    train, pixels = make_data(args, args.steps * args.batch)
    valid, _ = make_data(args, 14)
    images = normalise(pixels).contiguous(memory_format=torch.channels_last)
    time_bare(SimpleNamespace(**{**vars(args), 'steps': 2}), images, train.targets)  # warm-up
    pairs = []
    for k in range(args.rounds):
        sides = dict(bare=lambda: time_bare(args, images, train.targets), fit=lambda: time_fit(args, train, valid))
        order = list(sides) if k % 2 else list(sides)[::-1]
        pair = {name: sides[name]() for name in order}
        pairs.append(pair)
        print(f"round {k + 1}: fit {pair['fit']:.1f} images/s, bare loop {pair['bare']:.1f} images/s, "
              f"ratio {pair['fit'] / pair['bare']:.3f}", flush=True)
    medians = {name: statistics.median(p[name] for p in pairs) for name in ('fit', 'bare')}
    ratio = statistics.median(p['fit'] / p['bare'] for p in pairs)
    print(json.dumps(dict(benchmark='train_step', fit_images_per_s=round(medians['fit'], 1), bare_images_per_s=round(medians['bare'], 1),
                          ratio=round(ratio, 3), target=.9, met=ratio >= .9, backbone=args.backbone, size=args.size, batch=args.batch,
                          threads=args.threads, load_before=load)))


if __name__ == '__main__': main()
