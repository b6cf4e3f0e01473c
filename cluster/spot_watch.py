"""Tell Ray that this machine is about to be taken away, so that training saves in time. Runs beside `ray start` on spot nodes.

    python cluster/spot_watch.py aws      # or gcp; ends once Ray knows

Ray marks the node as draining: it places nothing new there, and hands the notice on to the run, which saves and goes on
elsewhere.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime

METADATA = {"aws": "http://169.254.169.254", "gcp": "http://metadata.google.internal"}
POLL_SECONDS = {"aws": 5.0, "gcp": 1.0}
GCP_NOTICE_SECONDS = 30
"""Seconds from a preemption notice to the end, as Google states them."""


def ask(url: str, headers: dict[str, str], method: str = "GET") -> str | None:
    """The answer of the metadata server; None where it has none."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers, method=method), timeout=5) as answer:
            return str(answer.read().decode())
    except (OSError, urllib.error.HTTPError):  # 404: no notice; anything else passes, or the machine does
        return None


def aws_seconds_left(base: str) -> int | None:
    """Seconds until EC2 takes this instance away; None while it does not say so."""
    token = ask(f"{base}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "300"}, "PUT")
    notice = ask(f"{base}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token or ""})
    if notice is None:
        return None
    when = datetime.fromisoformat(json.loads(notice)["time"].replace("Z", "+00:00"))
    return max(1, int((when - datetime.now(UTC)).total_seconds()))


def gcp_seconds_left(base: str) -> int | None:
    """Seconds until Compute Engine takes this instance away; None while it does not say so."""
    answer = ask(f"{base}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return GCP_NOTICE_SECONDS if answer is not None and answer.strip() == "TRUE" else None


SECONDS_LEFT = {"aws": aws_seconds_left, "gcp": gcp_seconds_left}


def drain(seconds: int) -> bool:
    """Mark this machine's Ray node as draining; False when Ray could not be told."""
    command = ["ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot interruption notice",
               "--deadline-remaining-seconds", str(seconds)]
    return subprocess.run(command).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cloud", choices=sorted(METADATA))
    parser.add_argument("--metadata", metavar="URL", help="metadata server, when it is not the cloud's usual one")
    args = parser.parse_args()
    base = (args.metadata or METADATA[args.cloud]).rstrip("/")
    while True:
        seconds = SECONDS_LEFT[args.cloud](base)
        if seconds is not None:
            print(f"{datetime.now(UTC):%H:%M:%S} notice: {seconds} s left", flush=True)
            if drain(seconds):
                return
        time.sleep(POLL_SECONDS[args.cloud])


if __name__ == "__main__":
    main()
