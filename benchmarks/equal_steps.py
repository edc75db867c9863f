"""LSHLinear at the steps where a recorded dense run was evaluated: accuracy at equal steps.

    python benchmarks/equal_steps.py --dense benchmarks/results/quickstart_dense.json \
        --json benchmarks/results/quickstart_lsh.json

The dense record comes from ``benchmarks/dense_reference.py``. Data, batches, initialisation, learning
rate and seed are the same; only the head differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from common import machine, median, print_table, write_json
from dense_reference import evaluate
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import places

from slide_torch import LSHLinear
from slide_torch.optim import Adam


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dense", type=Path, required=True)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    dense = json.loads(args.dense.read_text())
    torch.set_num_threads(dense["threads"])
    torch.manual_seed(dense["seed"])
    data = places.load_places(args.data_dir)
    embedding = nn.EmbeddingBag(
        data.num_features, 128, mode="sum", include_last_offset=True, sparse=True
    )
    nn.init.normal_(embedding.weight, std=0.3)
    head = LSHLinear(128, data.num_labels, sparse=True)
    optimizer = Adam([*embedding.parameters(), *head.parameters()], lr=dense["lr"])
    wanted = {point["step"] for point in dense["curve"]}
    steps, epoch, step, seconds = dense["steps"], 0, 0, 0.0
    step_ms, curve = [], []
    while step < steps:
        for indices, offsets, values, labels in places.batches(
            data.train, dense["batch"], seed=dense["seed"] + epoch
        ):
            started = time.perf_counter()
            hidden = torch.relu(embedding(indices, offsets, per_sample_weights=values))
            loss = F.cross_entropy(head(hidden), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step_ms.append((time.perf_counter() - started) * 1e3)
            seconds += step_ms[-1] / 1e3
            step += 1
            if step in wanted:
                head.eval()
                p1, _ = evaluate(embedding, head, data.validation, 5120)
                head.train()
                curve.append({"step": step, "seconds": seconds, "validation_p1": p1})
            if step == steps:
                break
        epoch += 1
    head.eval()
    test_p1, test_p5 = evaluate(embedding, head, data.test)
    result = {
        "contender": "LSHLinear",
        **{key: dense[key] for key in ("lr", "batch", "seed", "threads", "steps")},
        "machine": machine(),
        "ms_step": median(step_ms),
        "curve": curve,
        "test_p1": test_p1,
        "test_p5": test_p5,
    }
    write_json(args.json, result)
    rows = [
        [str(d["step"]), f"{d['validation_p1']:.4f}", f"{o['validation_p1']:.4f}"]
        for d, o in zip(dense["curve"], curve, strict=True)
    ]
    print_table(["steps", "dense: P@1, validation part", "LSHLinear: P@1, validation part"], rows)
    print(
        f"held out after {steps} steps: dense P@1 {dense['test_p1']:.4f} P@5 {dense['test_p5']:.4f}, "
        f"LSHLinear P@1 {test_p1:.4f} P@5 {test_p5:.4f}; "
        f"ms a step: {dense['ms_step']:.0f}, {result['ms_step']:.1f}"
    )


if __name__ == "__main__":
    main()
