"""How much AUROC a leak buys on real data: the same model with a clean and a leaked split of HAM10000.

    python benchmarks/leak.py [FOLDER] [--weights FILE] [--seeds 5] [--size 112] [--share 1] \
        [--fine-tune [--epochs 6] [--augment light]]

FOLDER is a dataset folder of `skinlesion import`, or HAM10000 as its publisher lays it out; by default
../shared/data/ham10000, and where that is absent nothing is measured. The weights are those of mobilenetv2_100; by
default ../shared/data/weights/mobilenetv2_100_imagenet.safetensors.

Both splits of a pair have the same test and validation images, and as many training images of each class, of as many
lesions: `inject_leak` lets other pictures of test lesions take the place of training lesions that were photographed
as often. Each seed draws its own split, leak and model. Two models on frozen features by default (minutes): the
nearest training image of each class (a memoriser) and logistic regression; with --fine-tune the network itself, the
epoch chosen by validation: about a minute an epoch on two quiet cores, two models a seed. A lesion stays in test with
one image, so that a fifth of the test images have a twin in leaked training; with a split by image it would be more.

Intervals: 95 %, lesions drawn with replacement 1,000 times, the same lesions for every seed and both splits; the
value is the mean over the seeds. Last comes what differs between seeds, which holds the randomness of split and
training that the intervals leave out.
"""
import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression

from skinlesion.data.schema import read_dataset
from skinlesion.data.collections import import_ham10000
from skinlesion.data.splits import inject_leak, split_groups
from skinlesion.stats.intervals import format_leaf, interval_leaf
from skinlesion.stats.metrics import weighted_metrics
from skinlesion.stats.resamples import Resamples
from skinlesion.files import repo_root
from skinlesion.images import normalise, read_image, resize_image
from skinlesion.model.inference import evaluating, predict_probs
from skinlesion.model.fusion import create_model

BACKBONE = 'mobilenetv2_100'
METRICS = ('auroc_macro', 'balanced_accuracy', 'accuracy')


class MemoryStore:
    "What `LesionDataset` asks of a store, from an array."
    def __init__(self, ids, pixels):
        self.rows = {i: k for k, i in enumerate(ids)}
        self.pixels = pixels
        self.size = pixels.shape[1]
        self.ids = list(ids)

    def position(self, image_id):
        return self.rows[image_id]
    def image(self, image_id):
        return self.pixels[self.rows[image_id]]


def load(dataset, size):
    "All images of a dataset as (N,size,size,3) uint8."
    pixels = np.empty((len(dataset), size, size, 3), np.uint8)
    for k, image_id in enumerate(dataset.table.image_id):
        pixels[k] = resize_image(read_image(dataset.image_path(image_id)), size)
    return pixels


def frozen_features(pixels, weights):
    "Pooled features of the pretrained network, standardised to length 1: (N,F) float32."
    model = create_model(BACKBONE, 7, pretrained=weights).to(memory_format=torch.channels_last)
    pooled = []
    with evaluating(model), torch.inference_mode():
        for k in range(0, len(pixels), 64):
            images = normalise(pixels[k:k + 64]).to(memory_format=torch.channels_last)
            pooled.append(model.forward_features(images).mean((2, 3)))
    features = torch.cat(pooled).numpy()
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def softmax(scores):
    "Rows that sum to 1."
    scores = np.exp(scores - scores.max(1, keepdims=True))
    return scores / scores.sum(1, keepdims=True)


def nearest(features, targets, train, test, seed):
    "Similarity of each test image to the most similar training image of each class."
    similar = features[test] @ features[train].T
    return softmax(20 * np.stack([similar[:, targets[train] == c].max(1) for c in range(targets.max() + 1)], 1))


def logistic(features, targets, train, test, seed):
    "Multinomial logistic regression, classes weighed equally."
    centre = features[train].mean(0)
    scale = features[train].std(0) + 1e-6
    model = LogisticRegression(C=.001, class_weight='balanced', max_iter=1000)
    model.fit((features[train] - centre) / scale, targets[train])
    return model.predict_proba((features[test] - centre) / scale)


class FineTune:
    "The network trained end to end; the validation images, of which neither split changes any, choose the epoch."
    def __init__(self, dataset, pixels, weights, epochs, augment):
        self.table = dataset.table
        self.labels = dataset.label_set
        self.weights = weights
        self.epochs = epochs
        self.augment = augment
        self.store = MemoryStore(dataset.table.image_id, pixels)

    def __call__(self, _, targets, train, test, seed, valid):
        from skinlesion.data.datasets import LesionDataset  # wanted by nothing else here, and slow to import
        from skinlesion.model.recipe import Recipe
        from skinlesion.model.training import fit
        config = Recipe(epochs=self.epochs, batch_size=32, learning_rate=5e-4, patience=self.epochs, seed=seed)
        def data(rows, augment=None):
            return LesionDataset(self.store, self.table[rows], self.labels, augment=augment, seed=seed)
        model = create_model(BACKBONE, self.labels.num_classes, pretrained=self.weights, seed=seed).to(
            memory_format=torch.channels_last
        )
        result = fit(
            model,
            data(train, self.augment),
            data(valid),
            config,
            progress=lambda line: print(f'    {line}', flush=True),
        )
        return predict_probs(result.model, self.store.pixels[test])


def run(models, table, targets, features, seeds, share):
    "Probabilities of the test images: [model][seed] -> dict(clean, leaked, test, sibling)."
    results = {name: [] for name in models}
    for seed in range(seeds):
        split = split_groups(table, fractions=(.6, .1, .3), seed=seed)
        leak = inject_leak(table, split, share=share, seed=seed)
        test = (leak.clean == 'test').to_numpy()
        valid = (leak.clean == 'valid').to_numpy()
        for name, model in models.items():
            start = time.perf_counter()
            extra = dict(valid=valid) if isinstance(model, FineTune) else {}
            probs = {
                kind: model(features, targets, (leak[kind] == 'train').to_numpy(), test, seed, **extra)
                for kind in ('clean', 'leaked')
            }
            results[name].append(dict(probs, test=np.flatnonzero(test), sibling=leak.sibling.to_numpy()[test]))
            area = {kind: weighted_metrics(targets[test], probs[kind])['auroc_macro'][0] for kind in probs}
            print(
                f"  seed {seed}, {name}: {(leak.clean == 'train').sum()} training, {test.sum()} test images, "
                f"{leak.sibling.sum()} of them with a twin in leaked training; AUROC clean "
                f"{area['clean']:.4f}, leaked {area['leaked']:.4f}; "
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )
    return results


def summary(runs, table, targets, weights, part):
    "A row per metric: clean, leaked and their paired difference, over the test images that `part` keeps."
    values, samples = ({m: {'clean': [], 'leaked': []} for m in METRICS} for _ in range(2))
    for r in runs:
        keep = part(r)
        rows = r['test'][keep]
        for kind in ('clean', 'leaked'):
            point = weighted_metrics(targets[rows], r[kind][keep])
            spread = weighted_metrics(targets[rows], r[kind][keep], weights[:, rows])
            for m in METRICS:
                values[m][kind].append(point[m][0])
                samples[m][kind].append(spread[m])
    n = sum(part(r).sum() for r in runs)
    lesions = table.lesion_id.iloc[np.concatenate([r['test'][part(r)] for r in runs])].nunique()
    out = []
    for m in METRICS:
        value, sample = ({kind: np.mean(v[m][kind], 0) for kind in ('clean', 'leaked')} for v in (values, samples))
        by_seed = np.subtract(values[m]['leaked'], values[m]['clean'])
        difference = interval_leaf(value['leaked'] - value['clean'], sample['leaked'] - sample['clean'], n, lesions)
        leaves = {kind: format_leaf(interval_leaf(float(value[kind]), sample[kind], n, lesions), 3) for kind in value}
        seeds = f'{by_seed.min():+.4f} to {by_seed.max():+.4f}'
        out.append(dict(metric=m, **leaves, difference=format_leaf(difference, 4), by_seed=seeds, n=n, lesions=lesions))
    return pd.DataFrame(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = repo_root().parent / 'shared' / 'data'
    parser.add_argument('folder', nargs='?', type=Path, default=shared / 'ham10000')
    parser.add_argument('--weights', type=Path, default=shared / 'weights' / f'{BACKBONE}_imagenet.safetensors')
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--size', type=int, default=112)
    parser.add_argument('--share', type=float, default=1.)
    parser.add_argument('--fine-tune', action='store_true')
    parser.add_argument('--epochs', type=int, default=6)
    parser.add_argument('--augment', default='light')
    args = parser.parse_args()
    for path in (args.folder, args.weights):
        if path.exists():
            continue
        remedy = f'{path}: not there; python benchmarks/leak.py FOLDER --weights FILE'
        if shared in path.parents:
            return print(f'skipped: {remedy}')
        sys.exit(remedy)
    with tempfile.TemporaryDirectory(prefix='leak.') as scratch:
        if not (args.folder / 'dataset.json').is_file():
            import_ham10000(args.folder, Path(scratch) / 'data')
        measure(args, args.folder if (args.folder / 'dataset.json').is_file() else Path(scratch) / 'data')


def measure(args, folder):
    "All pairs of one folder."
    dataset = read_dataset(folder)
    table = dataset.table
    codes = dataset.label_set.codes
    targets = np.array([codes.index(c) for c in table.diagnosis])
    start = time.perf_counter()
    pixels = load(dataset, args.size)
    print(f"{dataset.info.name}: {len(table)} images of {table.lesion_id.nunique()} lesions at {args.size} px, "
          f"read in {time.perf_counter() - start:.0f} s", flush=True)
    if args.fine_tune:
        models = {f'{BACKBONE}, fine-tuned': FineTune(dataset, pixels, args.weights, args.epochs, args.augment)}
        features = None
    else:
        start = time.perf_counter()
        models = {'nearest image, frozen features': nearest, 'logistic regression, frozen features': logistic}
        features = frozen_features(pixels, args.weights)
        print(f"features {features.shape} in {time.perf_counter() - start:.0f} s")
    results = run(models, table, targets, features, args.seeds, args.share)
    weights = Resamples(table.lesion_id.to_numpy(), 1000, seed=0).weights[1:]
    pd.set_option('display.width', 200, 'display.max_columns', 20)
    parts = {
        'all test images': lambda r: np.ones(len(r['test']), bool),
        'test images with a twin in leaked training': lambda r: r['sibling'],
        'the other test images': lambda r: ~r['sibling'],
    }
    for name, runs in results.items():
        for what, part in parts.items():
            print(f'\n{name}; {what} ({args.seeds} seeds; n counts an image once per seed)')
            print(summary(runs, table, targets, weights, part).to_string(index=False))


if __name__ == '__main__':
    main()
