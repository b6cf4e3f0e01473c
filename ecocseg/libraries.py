"""timm, segmentation_models_pytorch and torchvision, imported at their first use.

torchvision brings torch's compiler with it, as many seconds as all else together, and the others bring torchvision. Most
commands end, or ask a cluster, before they build a model.
"""

import importlib
import sys
from typing import Any


class _Library:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if "timm" not in sys.modules and "wandb" not in sys.modules:
            sys.modules["wandb"] = None  # type: ignore[assignment] # timm imports it for a helper of its own: seconds more
            importlib.import_module("timm")
            del sys.modules["wandb"]
        return getattr(importlib.import_module(self._name), name)


timm: Any = _Library("timm")
smp: Any = _Library("segmentation_models_pytorch")
TF: Any = _Library("torchvision.transforms.functional")
