"A bundle of two untrained members and a few pictures: what they answer means nothing, how they answer is what the faces are tested with."
import numpy as np
import pandas as pd
import torch

from skinlesion.data.metadata import MetadataEncoder
from skinlesion.images import save_png
from skinlesion.model.bundle import Member, save_bundle
from skinlesion.model.fusion import create_model
from skinlesion.taxonomy import get_label_set


def build_bundle(folder, label_set=None, size=64):
    "Write a bundle of an image-only and a fused member."
    torch.set_num_threads(1)
    label_set = label_set or get_label_set("ham10000")
    encoder = MetadataEncoder.fit(pd.DataFrame({"age": [30.0, 60.0, 45.0], "sex": ["female", "male", ""], "site": ["back", "scalp", ""]}))
    models = {"image": create_model("resnet10t", label_set.num_classes, seed=1),
              "fused": create_model("resnet10t", label_set.num_classes, encoder.dim, "concat", seed=2)}
    members = [Member(name, model.eval(), model.config) for name, model in models.items()]
    return save_bundle(folder, members, label_set, encoder, size, {"note": "untrained"})


def build_pictures(folder, names=("a", "b", "c")):
    "Write PNGs of noise over a spot; name -> path."
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:60, :90]
    spot = ((y - 30) ** 2 + (x - 45) ** 2 < 300)[..., None]
    return {name: save_png(np.clip(np.where(spot, 90, 200) + rng.integers(-40, 40, (60, 90, 3)), 0, 255).astype(np.uint8), folder / f"{name}.png")
            for name in names}
