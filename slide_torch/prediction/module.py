"""Predictor: approximate prediction as a module that is saved, loaded, compiled and exported."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..checks import checked_int
from ..precision import DTYPES
from .calibration import Calibration, state_of
from .inputs import flat_inputs
from .partition import RowPartition, Search, codes_of_centers
from .saved_index import DERIVED, INDEX, PARTITION, Settings, fault_of, fingerprint
from .topk import TopK, as_topk


class Predictor(nn.Module):
    """The approximate prediction of a calibrated :class:`LSHLinear` as a module to save and serve;
    ``LSHLinear.predictor()`` makes one.

    Its results are those of ``layer.predict(input, k, exact=False)``, bit for bit, with the k of the layer's
    calibration. Its state dict holds the layer's ``weight`` and ``bias``, and the index that
    :meth:`LSHLinear.calibrate` made: another process predicts without calibrating. Loading refuses an index
    that was made for other weights; a checksum (CRC-32) of all their bytes tells, by one sequential read.

    A Predictor made by its constructor is empty until it loads a state dict. To load an index for weights
    that are in memory already, assign them to ``weight`` and ``bias``, and load a state dict that lacks these
    with ``strict=False``.

    Args:
        in_features: width d of an input.
        out_features: number of neurons N.
        bias: whether there is a bias.
        device: the CPU; or ``"meta"``, for ``load_state_dict(..., assign=True)``.
        dtype: of the weights: float32 (default), float64 or bfloat16.

    Shape:
        - Input: (\\*, d), of the weight's dtype; of any floating-point dtype under autocast.
        - Output: a :class:`TopK` of (\\*, k) each.

    Attributes:
        weight: (N, d), the very Parameter of the layer that it was made from, until another is loaded.
        bias: (N), or None; likewise.
        search: how far it looks, see ``k`` there; None while it is empty.

    Raises:
        ValueError: shape or dtype of an input is wrong.
        RuntimeError: it is empty, or its weights are not those that its index was made for. Compiled and
            exported predictors do not look at this.

    Examples:
        >>> layer.calibrate(validation_inputs, 10, recall=0.95)
        >>> torch.save(layer.predictor().state_dict(), "predictor.pt")
        >>> state = torch.load("predictor.pt", mmap=True)
        >>> values, indices = Predictor.from_state_dict(state)(x)
    """

    weight: Tensor
    bias: Tensor | None
    settings: Tensor | None
    centers: Tensor
    center_bias: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        N = checked_int(out_features, 1, 2**31 - 2, "Predictor: out_features")
        d = checked_int(in_features, 1, 2**24, "Predictor: in_features")
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in DTYPES:
            raise ValueError(
                f"Predictor: dtype: expected float32, float64 or bfloat16, got {dtype}"
            )
        super().__init__()
        self.weight = nn.Parameter(torch.empty((N, d), device=device, dtype=dtype))
        own_bias = nn.Parameter(torch.empty(N, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", own_bias)
        for name in INDEX:
            self.register_buffer(name, None)
        for name in DERIVED:
            self.register_buffer(name, None, persistent=False)
        self.search: Search | None = None
        self._checked: tuple[int, ...] | None = None  # state of the weights when they were right

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, calibration: Calibration) -> Predictor:
        """One that shares these Parameters and the calibration that is valid for them."""
        made = cls(
            weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=weight.dtype
        )
        made.weight, made.bias = weight, bias
        settings = Settings.of(calibration, weight, bias)
        for name in PARTITION:
            setattr(made, name, getattr(calibration.partition, name))
        made.settings = settings.to_tensor()
        made.search = settings.search(calibration.partition)
        made._checked = calibration.state
        return made.eval()

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Tensor]) -> Predictor:
        """A Predictor of the sizes and with the tensors of a state dict, which are not copied: those of
        ``torch.load(path, mmap=True)`` stay in the file until they are read.

        Raises:
            RuntimeError: it is not the state dict of a Predictor, or is damaged.
        """
        weight = state_dict.get("weight") if isinstance(state_dict, dict) else None
        if (
            not isinstance(weight, Tensor)
            or weight.dim() != 2
            or weight.numel() == 0
            or weight.dtype not in DTYPES
        ):
            got = list(state_dict) if isinstance(state_dict, dict) else type(state_dict).__name__
            raise RuntimeError(
                f"Predictor.from_state_dict: expected the state dict of a Predictor, got {got}"
            )
        sizes = (weight.shape[1], weight.shape[0], "bias" in state_dict)
        made = cls(*sizes, device="meta", dtype=weight.dtype)
        made.load_state_dict(state_dict, assign=True)
        return made.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, input: Tensor) -> TopK:
        if self.search is None:
            raise RuntimeError(
                "Predictor: expected one with an index, got an empty one: call load_state_dict first, or "
                "make it by layer.predictor()"
            )
        flat = flat_inputs("Predictor", input, self.weight, self.bias)
        if not torch.compiler.is_compiling():
            self._check_weights()
        weight = self.weight.contiguous()
        bias = None if self.bias is None else self.bias.contiguous()
        return as_topk(self._partition().best(flat, weight, bias, self.search), input)

    def _partition(self) -> RowPartition:
        found: dict[str, Any] = self._buffers  # a module's attributes are slow to look up
        return RowPartition(**{name: found[name] for name in PARTITION})

    def _check_weights(self) -> None:
        """Reads the weights only where torch has recorded a write to them, or they lie elsewhere."""
        state = state_of(self.weight, self.bias)
        if state == self._checked:
            return
        assert self.settings is not None
        made_for = Settings.from_tensor(self.settings).fingerprint
        if fingerprint(self.weight, self.bias) != made_for:
            raise RuntimeError(
                "Predictor: weight: expected the weights that its index was made for, got others: they have "
                "changed since: calibrate the layer again, and make another by layer.predictor()"
            )
        self._checked = state

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Loads everything or, where something is wrong, nothing."""
        assign = local_metadata.get("assign_to_params_buffers", False)
        names = ("weight", "bias", *INDEX)
        given = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        fault = self._fault(given, assign=assign)
        if fault is not None:
            error_msgs.append(f"Predictor.load_state_dict: {prefix}{fault}")
            return
        for name in INDEX:
            if name not in given:
                missing_keys.append(prefix + name)
            else:
                setattr(self, name, given[name] if assign else torch.empty_like(given[name]))
        arguments = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        if self.settings is not None:
            self.center_codes, self.center_terms = codes_of_centers(self.centers, self.center_bias)
            self.search = Settings.from_tensor(self.settings).search(self._partition())
            self._checked = state_of(self.weight, self.bias)

    def _fault(self, given: dict[str, Any], *, assign: bool) -> str | None:
        """What is wrong with an index, weights or both that are to be loaded, and with the two together."""
        for name, tensor in given.items():
            if not isinstance(tensor, Tensor) or tensor.device.type != "cpu":
                got = tensor.device if isinstance(tensor, Tensor) else type(tensor).__name__
                return f"{name}: expected a tensor on the CPU, got {got}"
        fault = self._fault_of_weights(given, assign=assign)
        if fault is not None:
            return fault
        missing = [name for name in INDEX if name not in given]
        if 0 < len(missing) < len(INDEX):
            return f"{missing[0]}: expected it beside the rest of an index, got none"
        weight = given.get("weight", self.weight)
        if not missing and (fault := fault_of(given, weight)):
            return fault
        settings = given.get("settings", self.settings)
        if settings is None or Settings.from_tensor(settings).fingerprint == fingerprint(
            weight, given.get("bias", self.bias)
        ):
            return None
        return (
            "weight: expected the weights that the index was made for, got others, as their checksum tells: "
            "load both from one file, or assign the right Parameters first"
        )

    def _fault_of_weights(self, given: dict[str, Any], *, assign: bool) -> str | None:
        for name, own in (("weight", self.weight), ("bias", self.bias)):
            new = given.get(name)
            if own is None:
                if new is not None:
                    return f"{name}: expected none, got one: make the predictor with {name}=True"
            elif new is None:
                if "weight" in given:
                    return f"{name}: expected one beside a weight, got none"
                if own.device.type == "meta":
                    return (
                        f"{name}: expected values, got a meta tensor: load it too, or assign the layer's "
                        "Parameters first"
                    )
            elif (new.shape, new.dtype) != (own.shape, own.dtype):
                return (
                    f"{name}: expected {own.dtype} {tuple(own.shape)}, got {new.dtype} {tuple(new.shape)}: "
                    "make the predictor with the sizes that were saved, or by Predictor.from_state_dict"
                )
            elif own.device.type == "meta" and not assign:
                return f"{name}: expected assign=True, as the predictor is on meta, got False"
        return None

    def _apply(self, fn: Any, recurse: bool = True) -> Predictor:
        old = self.weight.dtype
        new = fn(torch.empty(0, dtype=old)).dtype
        if new != old:
            raise TypeError(
                f"Predictor: dtype: expected to stay {old}, for which the index was made, got {new}: convert "
                "the layer, calibrate it, and make another by layer.predictor()"
            )

        def keeping_dtypes(tensor: Tensor) -> Tensor:
            found: Tensor = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        return super()._apply(keeping_dtypes, recurse)  # type: ignore[no-untyped-call,no-any-return]

    def extra_repr(self) -> str:
        N, d = self.weight.shape
        text = f"in_features={d}, out_features={N}, bias={self.bias is not None}"
        if self.settings is None:
            return f"{text}, empty"
        s = Settings.from_tensor(self.settings)
        return f"{text}, k={s.k}, recall={s.recall:.3f}, probes={s.probes} of {self._partition().lists}"
