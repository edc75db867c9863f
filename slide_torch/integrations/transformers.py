"""For the ``Trainer`` of transformers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..optim.clipping import clip_grad_norm_
from ..persistence import load_sampler_state, sampler_state
from .gradients import any_row_sparse

try:
    from transformers import Trainer
except ImportError as error:
    raise ImportError(
        f"slide_torch.integrations.transformers: expected the package transformers, got {error}: "
        "install it with pip install transformers accelerate"
    ) from error

__all__ = ["LSHTrainer", "LSHTrainerMixin"]

_FILE = "sampler_state.pt"


class LSHTrainerMixin:
    """Clips and resumes models with :class:`slide_torch.LSHLinear` layers in a ``Trainer`` of transformers,
    or a subclass of it. :class:`LSHTrainer` is ``Trainer`` with this mixin.

    - **Clipping**: ``max_grad_norm``, and the ``grad_norm`` in the logs, use
      :func:`slide_torch.clip_grad_norm_` where a gradient is row-sparse.
    - **Resuming**: checkpoints hold the sampler's state, in ``sampler_state.pt`` beside the optimizer's. In
      one process ``train(resume_from_checkpoint=...)`` then continues bit for bit. In several, each
      continues with the sampler of the first one. A checkpoint without this file gives a warning, and new
      tables; ``save_only_model=True`` leaves it out.

    With ``sparse=True`` pass an optimizer that takes row-sparse gradients, as in the example of
    :class:`LSHTrainer`: AdamW, the trainer's default, raises an error.

    This is a mixin because a ``TrainerCallback`` cannot do either: the trainer computes the norm before the
    first event after backward, and no event says which checkpoint training resumes from.

    Examples:
        >>> class Seq2SeqLSHTrainer(LSHTrainerMixin, Seq2SeqTrainer): ...
    """

    accelerator: Any
    args: Any
    model: Any

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        _clip_row_sparse(self.accelerator)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.args.should_save:
            torch.save(sampler_state(self.model), os.path.join(output_dir, _FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is None:
            return
        file = os.path.join(checkpoint, _FILE)
        if os.path.isfile(file):  # the weights are loaded already
            load_sampler_state(self.model, torch.load(file, weights_only=True))
        else:
            warnings.warn(
                f"{type(self).__name__}: {checkpoint} has no {_FILE}, as it was saved by another trainer: "
                "training continues with new tables",
                stacklevel=2,
            )


class LSHTrainer(LSHTrainerMixin, Trainer):  # type: ignore[misc]
    """``transformers.Trainer`` with :class:`LSHTrainerMixin`; its arguments are those of ``Trainer``.

    Examples:
        >>> convert_(model, lambda module, name: name == "lm_head", sparse=True)
        >>> optimizers = Adam(model.parameters(), lr=1e-3), None
        >>> LSHTrainer(model=model, args=args, train_dataset=data, optimizers=optimizers).train()
    """


def _clip_row_sparse(accelerator: Any) -> None:
    """Has the accelerator clip row-sparse gradients by our function, all others by its own."""
    dense = accelerator.clip_grad_norm_

    def clip(parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2) -> Any:
        parameters = list(parameters)
        if not any_row_sparse(parameters):
            return dense(parameters, max_norm, norm_type)
        accelerator.unscale_gradients()
        return clip_grad_norm_(parameters, max_norm, norm_type)

    accelerator.clip_grad_norm_ = clip
