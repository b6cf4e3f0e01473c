"""Train a segmentation model on few labelled images and many unlabelled ones of the same kind.

    python jobs/train_ssl.py                                      # the built-in demo
    python jobs/train_ssl.py --recipe unimatch_voc_1_16 data.labeled=s3://bucket/voc/1_16/labeled ...
    python jobs/train_ssl.py --help                               # every recipe and key
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ecocseg.cli import main  # noqa: E402
from ecocseg.errors import run_main  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_main(lambda: main(__doc__.splitlines()[0], "demo_ssl")))
