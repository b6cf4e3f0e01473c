"""Adapt a segmentation model to a new domain: labelled source images, unlabelled target images.

    python jobs/train_uda.py                                      # the built-in demo
    python jobs/train_uda.py --recipe daformer_gta2cityscapes data.labeled=s3://bucket/gta ...
    python jobs/train_uda.py --help                               # every recipe and key
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ecocseg.cli import main  # noqa: E402
from ecocseg.errors import run_main  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_main(lambda: main(__doc__.splitlines()[0], "demo")))
