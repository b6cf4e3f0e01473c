"""Libraries that take seconds to import, imported at their first use.

torchvision brings torch's compiler with it, as many seconds as all else together; timm and segmentation_models_pytorch bring
torchvision. Most commands end, or ask a cluster, before they build a model. Where W&B and MLflow are installed, timm and
DeepSpeed import them for helpers that are not used here: seconds more in every worker, which are saved.
"""

import importlib
import sys
from typing import Any

_SPARED = {"timm": "wandb", "segmentation_models_pytorch": "wandb", "deepspeed": "mlflow"}


class _Library:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(sys.modules.get(self._name) or _imported(self._name), attribute)


def _imported(name: str) -> Any:
    spared = _SPARED.get(name)
    if spared is None or spared in sys.modules:
        return importlib.import_module(name)
    sys.modules[spared] = None  # type: ignore[assignment]
    try:
        return importlib.import_module(name)
    finally:
        del sys.modules[spared]


timm: Any = _Library("timm")
smp: Any = _Library("segmentation_models_pytorch")
TF: Any = _Library("torchvision.transforms.functional")
deepspeed: Any = _Library("deepspeed")
