"""Hash families."""

from .base import HashFamily
from .cross_polytope import CrossPolytope
from .dwta import DWTA
from .kmeans import KMeans
from .make import make_family
from .simhash import SimHash

__all__ = ["DWTA", "CrossPolytope", "HashFamily", "KMeans", "SimHash", "make_family"]
