"""Trains and predicts with the slide_torch that is installed; prints its version, its file, and the compilers
that are there. ``test_packaging.py`` runs it in an environment of its own."""

import importlib.metadata
import shutil

import torch
import torch.nn.functional as F
from torch import nn

import slide_torch
from slide_torch import LSHLinear
from slide_torch.optim import Adam


def main() -> None:
    torch.manual_seed(0)
    classes = 300
    model = nn.Sequential(nn.Embedding(classes, 32), LSHLinear(32, classes, sparse=True))
    optimizer = Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        x = torch.randint(classes, (128,))
        optimizer.zero_grad()
        F.cross_entropy(model(x), x).backward()
        optimizer.step()
    model.eval()
    everything = torch.arange(classes)
    _, best = model[1].predict(model[0](everything), 1)
    right = (best[:, 0] == everything).float().mean()
    assert right > 0.9, f"only {right:.2f} of the classes are found"

    version = importlib.metadata.version("slide_torch")
    assert version == slide_torch.__version__, (version, slide_torch.__version__)
    compilers = [name for name in ("cc", "c++", "gcc", "g++", "clang") if shutil.which(name)]
    print(version, slide_torch.__file__, *compilers, sep="\n")


if __name__ == "__main__":
    main()
