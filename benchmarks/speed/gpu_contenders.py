"""Dense torch on a device, for gpu.py: ways to compute the same layer, and what trains by them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.common.classifier import Classifier
from examples.common.machine import reset_peak_memory, resident_gb
from slide_torch.data import IGNORE_INDEX

__all__ = ["WAYS", "DenseTrainer", "Device", "Way", "on_device"]


@dataclass(frozen=True)
class Way:
    """How logits and loss are computed. Parameters, gradients and Adam's moments are float32 in all of them.

    Attributes:
        tf32: float32 products on a GPU may round their factors to TF32.
        bf16: the product under autocast; the loss, of its result, in float32.
        compiled: product and loss under ``torch.compile``, shapes fixed.
        chunked: ``F.linear_cross_entropy`` of bfloat16 copies, which never holds the logits of a whole batch;
            it takes the first label of each row.
        sparse: the embedding has row-sparse gradients and learns by SparseAdam, which updates the rows of a
            batch alone. Otherwise torch's fused Adam, which takes no row-sparse gradients, updates all rows.
    """

    tf32: bool = False
    bf16: bool = False
    compiled: bool = False
    chunked: bool = False
    sparse: bool = False


WAYS = {
    "dense_fp32": Way(),
    "dense_tf32": Way(tf32=True),
    "dense_bf16": Way(tf32=True, bf16=True),
    "dense_bf16_compile": Way(tf32=True, bf16=True, compiled=True),
    "dense_bf16_sparse": Way(tf32=True, bf16=True, sparse=True),
    "dense_bf16_compile_sparse": Way(tf32=True, bf16=True, compiled=True, sparse=True),
    "dense_linear_cross_entropy": Way(tf32=True, chunked=True),
}


class Device:
    """A GPU; or the CPU, on which the same code can be checked."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._base_gb = 0.0
        if kind == "cuda":
            torch.cuda.init()  # else its peak cannot be forgotten

    def synchronize(self) -> None:
        if self.kind == "cuda":
            torch.cuda.synchronize()

    def forget_peak(self) -> None:
        """Peaks count from here on."""
        if self.kind == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            self._base_gb = reset_peak_memory()

    def peak_gb(self) -> float:
        """Gigabytes held at most: by this process's tensors on a GPU, or added to its resident memory."""
        if self.kind == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return resident_gb("VmHWM") - self._base_gb

    def release(self) -> None:
        """Gives what the allocator caches back to the device, for other processes."""
        if self.kind == "cuda":
            torch.cuda.empty_cache()


class DenseTrainer:
    """A classifier that trains on a device with every class at every step.

    Args:
        model: moved to the device.
        loss_of: of logits (B, N) and labels (B, M), padded with IGNORE_INDEX.
        decay: of the output layer, decoupled as in AdamW.
    """

    def __init__(
        self,
        model: Classifier,
        way: Way,
        loss_of: Callable[[Tensor, Tensor], Tensor],
        device: Device,
        *,
        lr: float,
        decay: float = 0.0,
    ) -> None:
        if device.kind == "cuda":
            torch.set_float32_matmul_precision("high" if way.tf32 else "highest")
        self.model = model.to(device.kind)
        model.embedding.sparse = way.sparse
        compute = partial(_dense_loss, way=way, loss_of=loss_of)
        self._compute = torch.compile(compute, dynamic=False) if way.compiled else compute
        embedding, head = list(model.embedding.parameters()), list(model.head.parameters())
        groups = [{"params": head, "weight_decay": decay}]
        self.optimizers: list[torch.optim.Optimizer] = []
        if way.sparse:
            self.optimizers.append(torch.optim.SparseAdam(embedding, lr=lr))
        else:
            groups.append({"params": embedding, "weight_decay": 0.0})
        self.optimizers.append(torch.optim.AdamW(groups, lr=lr, fused=True))
        self._lr = lr

    def step(self, batch: tuple[Tensor, ...], share_left: float = 1.0) -> Tensor:
        """One training step at that share of the learning rate; returns the loss, without waiting for it."""
        loss = self._backward(batch)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._lr * share_left
            optimizer.step()
        return loss

    def warm_up(self, batch: tuple[Tensor, ...]) -> None:
        """Compiles and allocates for batches of this size; learns nothing."""
        self._backward(batch)
        self.model.zero_grad()

    def _backward(self, batch: tuple[Tensor, ...]) -> Tensor:
        *features, labels = batch
        head = self.model.head
        self.model.zero_grad()
        loss = self._compute(self.model.hidden(*features), head.weight, head.bias, labels)
        loss.backward()
        return loss.detach()


def _dense_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    *,
    way: Way,
    loss_of: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    if way.chunked:
        return F.linear_cross_entropy(
            hidden.bfloat16(),
            weight.bfloat16(),
            labels[:, 0].contiguous(),
            linear_bias=bias.bfloat16(),
            options=nn.LinearCrossEntropyOptions(),
        )
    with torch.autocast(hidden.device.type, torch.bfloat16, enabled=way.bf16):
        logits = F.linear(hidden, weight, bias)
    return loss_of(logits.float(), labels)


def on_device(batch: tuple[Tensor, ...], width: int, device: Device) -> tuple[Tensor, ...]:
    """The batch there, its labels padded to ``width``, so that compiled code meets one shape."""
    *features, labels = batch
    labels = F.pad(labels, (0, width - labels.shape[1]), value=IGNORE_INDEX)
    return tuple(part.to(device.kind) for part in (*features, labels))
