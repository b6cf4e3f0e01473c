"""How unlabelled images are used: one file per method, each a page that orders the shared parts."""

from __future__ import annotations

from ecocseg.methods.base import Method, StepInput
from ecocseg.methods.self_training import SelfTraining
from ecocseg.methods.supervised import Supervised

METHODS: dict[str, type[Method]] = {"supervised": Supervised, "self_training": SelfTraining}

__all__ = ["METHODS", "Method", "SelfTraining", "StepInput", "Supervised"]
