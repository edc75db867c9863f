"""Hash families."""

from .base import HashFamily
from .bins import DWTA, MinHash
from .cross_polytope import CrossPolytope
from .kmeans import KMeans
from .make import make_family
from .simhash import SimHash

__all__ = ["DWTA", "CrossPolytope", "HashFamily", "KMeans", "MinHash", "SimHash", "make_family"]
