"""KID of two halves of the data set emoji: python benchmarks/kid_emoji.py

Features are those of EfficientNet-Lite0, so that the numbers compare with each other alone.
"""

import json

import torch

from fastxm.data import open_dataset
from fastxm.encoders import EfficientNetLite0
from fastxm.evaluation import kid
from fastxm.evaluation.evaluator import ordinary, shuffled


def main() -> None:
    dataset = open_dataset("emoji", 64, "train")
    chosen, features = ordinary(dataset, EfficientNetLite0(), True)
    order = shuffled(len(features), 0)
    half = len(order) // 2
    kinds = torch.tensor([i.startswith(chosen.ids[0].partition("/")[0]) for i in chosen.ids])
    pairs = {
        "two random halves": (features[order[:half]], features[order[half:]]),
        "one style against the other": (features[kinds], features[~kinds]),
    }
    for name, (a, b) in pairs.items():
        found = kid(a, b, subsets=20, subset_size=min(1000, len(a), len(b)))
        print(json.dumps({"sets": name, "rows": [len(a), len(b)], **found._asdict()}))


if __name__ == "__main__":
    main()
