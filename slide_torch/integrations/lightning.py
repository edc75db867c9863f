"""For Lightning, installed as ``lightning`` or as ``pytorch_lightning``."""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import Any

import torch

from ..checks import checked_int
from ..nn.linear import LSHLinear
from ..optim.clipping import clip_grad_norm_
from ..persistence import load_sampler_state, sampler_state
from ..tuning.probe import RecallProbe
from .gradients import any_row_sparse

__all__ = ["LSHCallback"]

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")
_KEY = "slide_torch"


def _callback_class() -> Any:
    """``Callback`` of the package that the program uses already, or of one that is installed. The trainers of
    both packages take either."""
    for name in sorted(_PACKAGES, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name).Callback
        except ImportError as error:
            reason = error
    raise ImportError(
        "slide_torch.integrations.lightning: expected the package lightning or pytorch_lightning, got "
        f"{reason}: install one with pip install lightning"
    ) from reason


class LSHCallback(_callback_class()):  # type: ignore[misc]
    """Logs, clips and resumes the :class:`slide_torch.LSHLinear` layers of a Lightning module.

    - **Logging**: whenever the trainer writes its logs, as ``lsh/<layer>/<name>``: the recall and the softmax
      mass that a :class:`slide_torch.RecallProbe` measured last, and what ``layer.stats()`` returns.
      Training is bit for bit the same as without.
    - **Clipping**: ``Trainer(gradient_clip_val=...)``, and ``self.clip_gradients`` in a module, use
      :func:`slide_torch.clip_grad_norm_` where a gradient is row-sparse. Clipping by value remains torch's,
      which raises an error there.
    - **Resuming**: checkpoints hold the sampler's state, and that of torch's random numbers, which Lightning
      does not save. In one process ``fit(ckpt_path=...)`` from the end of an epoch then continues bit for
      bit. In several, each continues with the sampler of the first one, and with its own random numbers.
      A checkpoint that was saved without the callback gives a warning, and new tables.

    Args:
        every: training forwards of a layer from one measurement of recall to the next, at least 1.
        k: number of largest logits to look for, from 1 to N.
        rows: number of inputs to measure, at least 1.

    Raises:
        ValueError: an argument is out of its range; k above N is found when training starts.

    Examples:
        >>> trainer = lightning.Trainer(gradient_clip_val=1.0, callbacks=[LSHCallback()])
        >>> trainer.fit(module, loader, ckpt_path="last")
    """

    def __init__(self, *, every: int = 100, k: int = 10, rows: int = 16) -> None:
        self.every = checked_int(every, 1, None, "LSHCallback: every")
        self.k = checked_int(k, 1, None, "LSHCallback: k")
        self.rows = checked_int(rows, 1, None, "LSHCallback: rows")
        self._probes: dict[str, tuple[LSHLinear, RecallProbe]] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._probes = {
            name: (layer, RecallProbe(layer, every=self.every, k=self.k, rows=self.rows))
            for name, layer in pl_module.named_modules()
            if isinstance(layer, LSHLinear)
        }
        _clip_row_sparse(trainer.precision_plugin)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.log_every_n_steps and trainer.global_step % trainer.log_every_n_steps == 0:
            for name, (layer, probe) in self._probes.items():
                found = {**probe.last, **layer.stats()}
                pl_module.log_dict({f"lsh/{name}/{key}": float(v) for key, v in found.items()})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        for _, probe in self._probes.values():
            probe.remove()
        self._probes = {}
        vars(trainer.precision_plugin).pop("clip_grad_by_norm", None)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint[_KEY] = {"sampler": sampler_state(pl_module), "rng": torch.get_rng_state()}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        if _KEY not in checkpoint:
            warnings.warn(
                "LSHCallback: the checkpoint has no sampler state, as it was saved without this callback: "
                "training continues with new tables",
                stacklevel=2,
            )
            return
        load_sampler_state(pl_module, checkpoint[_KEY]["sampler"])  # the weights are loaded already
        if trainer.world_size == 1:
            # here, as the loader of the resumed epoch draws its seed before on_train_start
            torch.set_rng_state(checkpoint[_KEY]["rng"])


def _clip_row_sparse(plugin: Any) -> None:
    """Has the precision plugin clip row-sparse gradients by our function, all others by its own."""
    dense = plugin.clip_grad_by_norm

    def clip_grad_by_norm(optimizer: Any, clip_val: float) -> None:
        parameters = list(plugin.main_params(optimizer))
        if any_row_sparse(parameters):
            clip_grad_norm_(parameters, clip_val)
        else:
            dense(optimizer, clip_val)

    plugin.clip_grad_by_norm = clip_grad_by_norm
