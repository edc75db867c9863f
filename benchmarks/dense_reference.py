"""Dense torch on the quickstart's problem, however long it takes: what LSHLinear is held against.

The model, data, batches and learning rate of ``examples/quickstart.py`` with ``nn.Linear`` and torch's
fused Adam over every weight. Writes P@1 on the first 5,120 validation rows (they are ordered by place,
so this is a curve to compare along, not an estimate) against steps, and P@1 and P@5 on all held-out
names at the end, as JSON.

    python benchmarks/dense_reference.py --json benchmarks/results/quickstart_dense.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import places


def evaluate(embedding, head, split, limit=None):
    """P@1 and P@5 over the first `limit` rows, exact."""
    hits1 = hits5 = rows = 0
    with torch.no_grad():
        for indices, offsets, values, labels in places.batches(split, 256):
            scores = head(torch.relu(embedding(indices, offsets, per_sample_weights=values)))
            hit = (scores.topk(5).indices.unsqueeze(2) == labels.unsqueeze(1)).any(2)
            hits1 += hit[:, 0].sum().item()
            hits5 += hit.sum().item()
            rows += len(labels)
            if limit is not None and rows >= limit:
                break
    return hits1 / rows, hits5 / rows / 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--steps", type=int, default=1000, help="0: one epoch")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--every", type=int, default=250, help="steps between validations")
    parser.add_argument("--save", type=Path, help="where the trained state dict goes")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    data = places.load_places(args.data_dir)
    embedding = nn.EmbeddingBag(
        data.num_features, 128, mode="sum", include_last_offset=True, sparse=True
    )
    nn.init.normal_(embedding.weight, std=0.3)
    head = nn.Linear(128, data.num_labels)
    sparse_adam = torch.optim.SparseAdam(embedding.parameters(), lr=args.lr)
    adam = torch.optim.Adam(head.parameters(), lr=args.lr, fused=True)
    steps = args.steps or -(-len(data.train) // args.batch)
    curve, seconds, step, epoch = [], 0.0, 0, 0
    step_ms = []
    while step < steps:
        for indices, offsets, values, labels in places.batches(
            data.train, args.batch, seed=args.seed + epoch
        ):
            started = time.perf_counter()
            hidden = torch.relu(embedding(indices, offsets, per_sample_weights=values))
            scores = F.log_softmax(head(hidden), dim=1)
            mask = labels >= 0
            own = scores.gather(1, labels.clamp(min=0)) * mask / mask.sum(1, keepdim=True)
            loss = -own.sum(1).mean()
            sparse_adam.zero_grad()
            adam.zero_grad()
            loss.backward()
            sparse_adam.step()
            adam.step()
            step_ms.append((time.perf_counter() - started) * 1e3)
            seconds += step_ms[-1] / 1e3
            step += 1
            if step % args.every == 0 or step == steps:
                p1, _ = evaluate(embedding, head, data.validation, 5120)
                curve.append({"step": step, "seconds": seconds, "validation_p1": p1})
                print(
                    f"step {step} loss {loss.item():.3f} {seconds:.0f} s P@1 {p1:.4f}", flush=True
                )
            if step == steps:
                break
        epoch += 1
    result = {
        "contender": "dense torch, fused Adam",
        "lr": args.lr,
        "batch": args.batch,
        "seed": args.seed,
        "threads": args.threads,
        "torch": torch.__version__,
        "steps": steps,
        "ms_step": sorted(step_ms)[len(step_ms) // 2],
        "curve": curve,
    }
    if args.save:
        torch.save({"embedding": embedding.state_dict(), "head": head.state_dict()}, args.save)
    if args.json:
        result["test_p1"], result["test_p5"] = evaluate(embedding, head, data.test)
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"held out: P@1 {result['test_p1']:.4f} P@5 {result['test_p5']:.4f}")


if __name__ == "__main__":
    main()
