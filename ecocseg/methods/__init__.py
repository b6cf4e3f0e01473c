"""How unlabelled images are used: one file per method, each a page that orders the shared parts."""

from __future__ import annotations

from ecocseg.methods.base import Method, StepInput
from ecocseg.methods.fixmatch import FixMatch
from ecocseg.methods.mic import MaskedConsistency
from ecocseg.methods.self_training import SelfTraining
from ecocseg.methods.supervised import StPlusPlus, Supervised
from ecocseg.methods.unimatch import UniMatch
from ecocseg.methods.unimatch_v2 import UniMatchV2

METHODS: dict[str, type[Method]] = {"supervised": Supervised, "self_training": SelfTraining, "mic": MaskedConsistency,
                                    "fixmatch": FixMatch, "unimatch": UniMatch, "unimatch_v2": UniMatchV2,
                                    "stpp": StPlusPlus}

__all__ = ["METHODS", "Method", "SelfTraining", "StepInput", "Supervised"]
