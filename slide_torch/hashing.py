"""Hash families: rows of a matrix -> one code per table."""

from __future__ import annotations

import abc

import torch
from torch import Tensor, nn

from . import ops
from .options import LSHOptions


class HashFamily(nn.Module, abc.ABC):
    """K hashes packed into one code, for each of L tables; the functions are determined by a seed.

    Functions are integer or float32 buffers that no state dict holds: the seed remakes them.

    Attributes:
        bits: bits of a code.
        seed: what the functions were drawn from.
    """

    def __init__(self, in_features: int, K: int, L: int, *, has_bias: bool, seed: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.K = K
        self.L = L
        self.has_bias = has_bias
        self.center: Tensor | None
        self.register_buffer("center", None, persistent=False)
        self.bits = K
        self.draw(seed)

    def draw(self, seed: int) -> None:
        """Replaces the hash functions by those of ``seed``."""
        self.seed = seed
        self._draw(torch.Generator().manual_seed(seed))

    @abc.abstractmethod
    def _draw(self, generator: torch.Generator) -> None: ...

    @abc.abstractmethod
    def _codes(
        self,
        input: Tensor,
        bias: Tensor | None,
        rows: Tensor | None = None,
        center: Tensor | None = None,
    ) -> Tensor: ...

    def center_on(self, weight: Tensor, bias: Tensor | None) -> None:
        """Hashes rows from now on relative to their mean (of up to 8,192 of them).

        It shifts a query's inner products with all rows alike, so their order stays; but rows that
        training has pushed in one common direction no longer share a bucket.
        """
        self.center = ops.mean_row(weight.detach(), None if bias is None else bias.detach(), 8192)

    def row_codes(
        self, weight: Tensor, bias: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Codes of neurons: the rows of ``weight``, the bias appended as one more coordinate.

        Args:
            weight: float32 or float64 (N, d).
            bias: the same dtype, (N), or None for a family made without one.
            rows: int64 (n), the rows to hash; None for all.

        Returns:
            int16 (up to 15 bits) or int32 (L, n). The code of a row that holds NaN or Inf is -1.
        """
        center = None if self.center is None else self.center.to(weight.dtype)
        return self._codes(weight.detach(), None if bias is None else bias.detach(), rows, center)

    def query_codes(self, input: Tensor) -> Tensor:
        """Codes of inputs, (B, d) -> (L, B): a 1 is appended where rows append their bias."""
        input = input.detach()
        return self._codes(input, input.new_ones(input.shape[0]) if self.has_bias else None)


class SimHash(HashFamily):
    """Signs of random projections (Charikar 2002): two vectors at angle t agree in a hash with
    probability 1 - t / pi.

    ``projection``: ``"hadamard"``, ``"gaussian"`` or ``"sparse"``, see :class:`LSHOptions`. The sparse one
    is multiplied as a dense matrix.
    """

    signs: Tensor
    bias_projection: Tensor
    matrix: Tensor

    def __init__(
        self,
        in_features: int,
        K: int,
        L: int,
        *,
        has_bias: bool,
        seed: int,
        projection: str = "hadamard",
    ) -> None:
        self._projection = projection
        super().__init__(in_features, K, L, has_bias=has_bias, seed=seed)

    def _draw(self, generator: torch.Generator) -> None:
        hashes = self.K * self.L
        if self._projection == "hadamard":
            size = 1 << max(0, self.in_features - 1).bit_length()
            rotations = -(-hashes // size)
            signs = torch.randint(0, 2, (rotations, 3, size), generator=generator) * 2 - 1
            self.register_buffer("signs", signs.to(torch.int8), persistent=False)
            gauss = torch.randn(rotations, size, generator=generator)
            self.register_buffer("bias_projection", gauss, persistent=False)
            return
        shape = (hashes, self.in_features + self.has_bias)
        if self._projection == "gaussian":
            matrix = torch.randn(shape, generator=generator)
        else:
            matrix = torch.randint(0, 6, shape, generator=generator).float()
            matrix = (matrix == 0).float() - (matrix == 1).float()
        self.register_buffer("matrix", matrix, persistent=False)

    def _codes(
        self,
        input: Tensor,
        bias: Tensor | None,
        rows: Tensor | None = None,
        center: Tensor | None = None,
    ) -> Tensor:
        if self._projection == "hadamard":
            gauss = self.bias_projection.float()
            return ops.simhash_hadamard(
                input, bias, rows, center, self.signs, gauss, self.K, self.L
            )
        return ops.simhash_dense(input, bias, rows, center, self.matrix.float(), self.K, self.L)

    def extra_repr(self) -> str:
        return f"K={self.K}, L={self.L}, projection={self._projection!r}"


class DWTA(HashFamily):
    """Densified winner-take-all (Yagnik et al. 2011; Chen & Shrivastava 2018): a hash is the place of the
    largest of ``bin_size`` randomly chosen coordinates.

    Coordinates that are zero count as absent, so sparse vectors (a ReLU's output) hash by what they
    have; a hash whose coordinates are all absent borrows that of another bin.
    """

    coordinates: Tensor

    def __init__(
        self,
        in_features: int,
        K: int,
        L: int,
        *,
        has_bias: bool,
        seed: int,
        bin_size: int = 8,
    ) -> None:
        self.bin_size = bin_size
        super().__init__(in_features, K, L, has_bias=has_bias, seed=seed)
        self.bits = K * (bin_size.bit_length() - 1)

    def _draw(self, generator: torch.Generator) -> None:
        width = self.in_features + self.has_bias
        needed = self.K * self.L * self.bin_size
        # whole permutations, cut into bins: within one permutation no coordinate is seen twice
        permutations = -(-needed // width)
        order = torch.rand(permutations, width, generator=generator).argsort(dim=1).flatten()
        coordinates = order[:needed].view(-1, self.bin_size).to(torch.int32).contiguous()
        self.register_buffer("coordinates", coordinates, persistent=False)

    def _codes(
        self,
        input: Tensor,
        bias: Tensor | None,
        rows: Tensor | None = None,
        center: Tensor | None = None,
    ) -> Tensor:
        return ops.dwta(input, bias, rows, center, self.coordinates, self.K, self.L)

    def extra_repr(self) -> str:
        return f"K={self.K}, L={self.L}, bin_size={self.bin_size}"


def make_family(options: LSHOptions, in_features: int, *, has_bias: bool, seed: int) -> HashFamily:
    """The family that resolved ``options`` name."""
    assert options.K != "auto" and options.L != "auto"
    if options.family == "dwta":
        return DWTA(
            in_features,
            options.K,
            options.L,
            has_bias=has_bias,
            seed=seed,
            bin_size=options.bin_size,
        )
    return SimHash(
        in_features,
        options.K,
        options.L,
        has_bias=has_bias,
        seed=seed,
        projection=options.projection,
    )
