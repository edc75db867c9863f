"""Hash families."""

from .base import HashFamily
from .dwta import DWTA
from .kmeans import KMeans
from .make import make_family
from .simhash import SimHash

__all__ = ["DWTA", "HashFamily", "KMeans", "SimHash", "make_family"]
