"""Wait until the Ray cluster in RAY_ADDRESS has so many nodes.

    RAY_ADDRESS=HEAD:6379 python cluster/wait_for_nodes.py 4 --seconds 600
"""

from __future__ import annotations

import argparse
import logging
import sys
import time

import ray


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nodes", type=int, help="number of nodes, the head included")
    parser.add_argument("--seconds", type=float, default=600, help="time to wait (default 600)")
    args = parser.parse_args()
    ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    end = time.monotonic() + args.seconds
    while (there := sum(node["Alive"] for node in ray.nodes())) < args.nodes:
        if time.monotonic() > end:
            print(f"{there} of {args.nodes} nodes after {args.seconds:g} s; see what their `ray start` says", file=sys.stderr)
            return 1
        time.sleep(1)
    total = ray.cluster_resources()
    print(f"{there} nodes, {total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
