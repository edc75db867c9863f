"""Options chosen by measured recall and cost; recall watched in training."""

from .probe import RecallProbe
from .result import TuneResult
from .tune import tune

__all__ = ["RecallProbe", "TuneResult", "tune"]
