"""Images per second of the loader, against views made from memory and against what the default model trains.

    python benchmarks/loader.py [--images 512] [--size 64] [--batch-size 16] [--policy medium] \
        [--artefacts hair ruler] [--rounds 7]

memory      the same augmentation of the same views, normalised in the same batches, from a list of arrays in memory:
            no store, sampler or DataLoader. `make_loader` is held against it with no workers, one process against
            one.
training    steps of the default model (resnet10t, AdamW, channels last) on batches that lie ready in memory, with all
            threads: as many images a second as training could ever ask for. The loader is held against it with no
            workers, so that it has one core and the training all.
A round measures each once, and ratios are medians over the rounds, so that other work on the machine hits all alike.
The verdict (`met`) is that of the wall clock. The same ratio in processor time stands beside it and decides nothing:
it tells whether a miss comes from the loader or from other work on the machine, of which the load before and after
says how much there was. Beside other work the threads of the training wait for one another, which makes `x_training`
too large: a verdict counts only where `quiet` is true (a load of at most 1 before the start). Images are made up.
"""
import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from skinlesion.data.augment import ARTEFACTS, AUGMENT_POLICIES, augment_image, make_augment
from skinlesion.data.datasets import LesionDataset, make_loader, view_seed
from skinlesion.data.store import build_store
from skinlesion.images import normalise, save_png
from skinlesion.model.fusion import create_model
from skinlesion.taxonomy import get_label_set


def made_up(folder, n, size):
    """A store of `n` smooth pictures; 64 files stand for all of them."""
    rng = np.random.default_rng(0)
    for k in range(64):
        noise = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        save_png(cv2.GaussianBlur(noise, (0, 0), size / 20), folder / f'{k}.png')
    table = pd.DataFrame(
        dict(image_id=[f'img{i}' for i in range(n)], diagnosis=['mel', 'nv'] * (n // 2) + ['mel'] * (n % 2))
    )
    dataset = SimpleNamespace(
        table=table, image_path=lambda i: folder / f'{int(i[3:]) % 64}.png', mask_path=lambda i: None
    )
    return build_store(dataset, folder / 'store', size), table


def from_memory(pixels, ids, augment, batch_size, epoch):
    """Batches of the same views, from a list of arrays."""
    order = np.random.default_rng(epoch).permutation(len(ids)).tolist()
    for start in range(0, len(ids), batch_size):
        views = [
            augment_image(augment, pixels[i], view_seed(0, epoch, ids[i])) for i in order[start : start + batch_size]
        ]
        yield normalise(np.stack(views)).contiguous(memory_format=torch.channels_last)


def trainer(args):
    """A function that trains the default model on `n` images, in batches that lie in memory."""
    model = create_model(args.backbone, 7, seed=0).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    batch = torch.randn(args.batch_size, 3, args.size, args.size).contiguous(memory_format=torch.channels_last)
    targets = torch.arange(args.batch_size) % 7
    def train(n):
        for _ in range(n // args.batch_size):
            loss = F.cross_entropy(model(batch), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return train


def rate(n, work, clock=time.perf_counter):
    """Images a second, by the wall or by the processor."""
    start = clock()
    work()
    return n / (clock() - start)


def measure(args, folder):
    """Rates of each way, by round."""
    store, table = made_up(folder, args.images, args.size)
    ids = store.ids
    pixels = [store.image(i) for i in store.ids]
    augment = make_augment(args.policy, args.size, args.artefacts)
    dataset, plain = (LesionDataset(store, table, get_label_set('ham10000'), augment=a) for a in (augment, None))
    train = trainer(args)
    few = args.batch_size * 8
    train(few)
    def walk(batches):
        return [None for _ in batches]
    for epoch in range(args.rounds):
        def load(data, workers):
            return lambda: walk(make_loader(data, args.batch_size, epoch, shuffle=True, workers=workers))
        def memory():
            return walk(from_memory(pixels, ids, augment, args.batch_size, epoch))
        yield {
            'memory': rate(args.images, memory),
            'memory, processor': rate(args.images, memory, time.process_time),
            'make_loader, processor': rate(args.images, load(dataset, 0), time.process_time),
            'make_loader': rate(args.images, load(dataset, 0)),
            'training': rate(few, lambda: train(few)),
            'make_loader, 2 workers': rate(args.images, load(dataset, 2)),
            'make_loader, no policy': rate(args.images, load(plain, 0)),
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {'images': 512, 'size': 64, 'batch-size': 16, 'rounds': 7}.items():
        parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--policy', choices=AUGMENT_POLICIES, default='medium')
    parser.add_argument('--artefacts', choices=ARTEFACTS, nargs='*', default=[])
    parser.add_argument('--backbone', default='resnet10t')
    args = parser.parse_args()
    cv2.setNumThreads(1)
    load = os.getloadavg()[0]
    if load > 1:
        print(f'warning: the load is {load:.1f} before the benchmark starts; other work makes the ratios unreliable')
    with tempfile.TemporaryDirectory() as folder:
        rounds = list(measure(args, Path(folder)))
    def ratio(a, b):
        return statistics.median(r[a] / r[b] for r in rounds)
    rows = [
        (name, statistics.median(r[name] for r in rounds), ratio(name, 'memory'), ratio(name, 'training'))
        for name in rounds[0]
    ]
    result = pd.DataFrame(rows, columns=['what', 'images/s', 'x memory', 'x training']).round(
        {'images/s': 0, 'x memory': 3, 'x training': 2}
    )
    print(
        f"{args.images} images of {args.size}x{args.size}, policy "
        f"{' + '.join([args.policy, *args.artefacts])}, batches of {args.batch_size}, "
        f"{torch.get_num_threads()} threads, median of {args.rounds} rounds"
    )
    print(result.to_string(index=False))
    wall = ratio('make_loader', 'memory')
    spent = ratio('make_loader, processor', 'memory, processor')
    training = ratio('make_loader', 'training')
    spread = sorted(r['make_loader'] / r['memory'] for r in rounds)
    print(
        json.dumps(
            {
                'benchmark': 'loader',
                'x_memory': round(wall, 3),
                'x_memory_range': [round(spread[0], 3), round(spread[-1], 3)],
                'target_x_memory': 0.9,
                'x_training': round(training, 2),
                'target_x_training': 3,
                'rounds': args.rounds,
                'met': wall >= 0.9 and training >= 3,
                'x_memory_processor': round(spent, 3),
                'quiet': load <= 1,
                'cores': os.cpu_count(),
                'load_before': round(load, 1),
                'load_after': round(os.getloadavg()[0], 1),
            }
        )
    )


if __name__ == '__main__':
    main()
