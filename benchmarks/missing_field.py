"""What it costs a fused model when age, sex or site is unknown in use, with and without metadata dropout in training.

    python benchmarks/missing_field.py [PREPARED] [--weights FILE] [--seeds 5] [--epochs 25] [--rates 0 0.1 0.3 0.5]

PREPARED is what the stage `prepare` leaves, by default artifacts/prepared. The weights are those of mobilenetv2_100,
by default ../shared/data/weights/mobilenetv2_100_imagenet.safetensors; without them nothing is measured. The
network is frozen; on its pooled features the metadata branch of `concat` and a linear head are trained on the
training lesions, for each rate and seed, and evaluated on the validation lesions with all fields known, without one of
them, and without any. The number of epochs is fixed beforehand.

Intervals: 95 %, lesions drawn with replacement 1,000 times, the same for all; values and differences (against the
same models with all fields known) are means over the seeds.
"""
import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

from skinlesion.data.prepared import Prepared
from skinlesion.stats.intervals import format_leaf
from skinlesion.stats.metrics import weighted_metrics
from skinlesion.stats.resamples import Resamples
from skinlesion.files import repo_root
from skinlesion.images import normalise
from skinlesion.model.inference import evaluating
from skinlesion.model.fusion import METADATA_WIDTHS, MetadataDropout, create_model, metadata_mlp
from skinlesion.model.losses import class_weights, create_loss
from skinlesion.model.recipe import Recipe

BACKBONE = 'mobilenetv2_100'
METRICS = ('auroc_macro', 'balanced_accuracy')
HIDDEN = dict(none=(), age=('age',), sex=('sex',), site=('site',), all=('age', 'sex', 'site'))


class Head(nn.Module):
    "The part of a `concat` model that is trained."
    def __init__(self, encoder, features, num_classes, rate):
        super().__init__()
        self.forget = MetadataDropout(encoder.groups(), encoder.dim, rate)
        self.branch = metadata_mlp(encoder.dim)
        self.drop = nn.Dropout(.2)
        self.head = nn.Linear(features + METADATA_WIDTHS[-1], num_classes)

    def forward(self, features, metadata):
        return self.head(self.drop(torch.cat([features, self.branch(self.forget(metadata))], 1)))


def pooled_features(store, ids, weights):
    "What the standing network sees in each image: (N,F) float32."
    model = create_model(BACKBONE, 7, pretrained=weights).to(memory_format=torch.channels_last)
    found = []
    with evaluating(model), torch.inference_mode():
        for k in range(0, len(ids), 64):
            spatial = model.forward_features(
                normalise(np.stack([store.image(i) for i in ids[k : k + 64]]), channels_last=True)
            )
            found.append(model.backbone.forward_head(spatial, pre_logits=True))
    return torch.cat(found)


def train(head, features, metadata, targets, epochs, seed):
    "AdamW, cross entropy, class weights by the root of the frequency."
    loss = create_loss(Recipe(), class_weights(targets, head.head.out_features, .5))
    optimizer = torch.optim.AdamW(head.parameters(), 1e-3, weight_decay=.05)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(targets), generator=generator).split(64):
            if len(rows) < 2:
                continue
            optimizer.zero_grad()
            loss(head(features[rows], metadata[rows]), targets[rows]).backward()
            optimizer.step()
    return head.eval()


def answers(args, parts, features, encoder, label_set):
    "Probabilities of the validation images: (rate, hidden) -> one array a seed."
    def encode(table):
        return torch.from_numpy(encoder.encode(table))
    hidden = {
        name: encode(parts['valid'].assign(**{f: np.nan if f == 'age' else '' for f in fields}))
        for name, fields in HIDDEN.items()
    }
    targets = torch.tensor(parts['train'].diagnosis.map(label_set.index).to_numpy())
    found = {(rate, name): [] for rate in args.rates for name in HIDDEN}
    for seed in range(args.seeds):
        for rate in args.rates:
            torch.manual_seed(seed)
            head = Head(encoder, features['train'].shape[1], label_set.num_classes, rate)
            train(head, features['train'], encode(parts['train']), targets, args.epochs, seed)
            with torch.inference_mode():
                for name, metadata in hidden.items():
                    found[rate, name].append(F.softmax(head(features['valid'], metadata).double(), 1).numpy())
    return found


def rows_of(found, table, label_set):
    "For each rate and each hidden field the mean over the seeds and what it is less than with all fields known."
    targets = table.diagnosis.map(label_set.index).to_numpy()
    resamples = Resamples(table.lesion_id.to_numpy(), 1000, 0)
    mean = {
        key: {m: np.mean([weighted_metrics(targets, p, resamples.weights)[m] for p in probs], 0) for m in METRICS}
        for key, probs in found.items()
    }
    def leaf(v):
        return format_leaf(resamples.leaf(v), 3)
    for (rate, name), values in mean.items():
        yield dict(rate=rate, unknown=name, **{m: leaf(values[m]) for m in METRICS},
                   **{f'{m} lost': '' if name == 'none' else leaf(mean[rate, 'none'][m] - values[m]) for m in METRICS})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    weights = repo_root().parent/'shared'/'data'/'weights'/'mobilenetv2_100_imagenet.safetensors'
    parser.add_argument('prepared', nargs='?', type=Path, default=repo_root()/'artifacts'/'prepared')
    parser.add_argument('--weights', type=Path, default=weights)
    for name, default in dict(seeds=5, epochs=25).items():
        parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--rates', type=float, nargs='+', default=[0., .1, .3, .5])
    args = parser.parse_args()
    absent = [path for path in (args.prepared, args.weights) if not path.exists()]
    if absent:
        print(f'{absent[0]} is absent: nothing is measured')
        return
    prepared = Prepared.open(args.prepared)
    store = prepared.store
    label_set = prepared.label_set
    encoder = prepared.encoder
    parts = {part: prepared.rows(part) for part in ('train', 'valid')}
    features = {
        part: pooled_features(store, table.image_id.tolist(), str(args.weights)) for part, table in parts.items()
    }
    centre = features['train'].mean(0)
    scale = features['train'].std(0) + 1e-6
    features = {part: (values - centre) / scale for part, values in features.items()}
    found = answers(args, parts, features, encoder, label_set)
    table = pd.DataFrame(rows_of(found, parts['valid'], label_set))
    train_rows = parts['train']
    valid_rows = parts['valid']
    print(
        f'{len(train_rows)} training images; {len(valid_rows)} validation images of '
        f'{valid_rows.lesion_id.nunique()} lesions; {args.seeds} seeds'
    )
    print(table.to_string(index=False))


if __name__ == '__main__':
    main()
