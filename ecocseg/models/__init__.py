"""Encoders, heads and the segmenter that joins them."""

import sys

if "wandb" not in sys.modules:  # timm imports it, where it is installed, for a helper of its own: seconds in every worker
    sys.modules["wandb"] = None  # type: ignore[assignment]
    import timm  # noqa: F401

    del sys.modules["wandb"]
