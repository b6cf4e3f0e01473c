"""Several Ray nodes on one machine: a head without CPUs, and nodes that are added and killed.

Where the machine allows network namespaces each node has an address of its own and is killed with everything in it; else
they are raylets beside each other on one address. Nothing here touches other Ray clusters of the machine: ports, folders
and the token are of this one.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
RAY = str(Path(sys.executable).parent / "ray")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=check, capture_output=True, text=True)


@dataclass
class Node:
    """A Ray node: the process that started it, its address, and its network namespace if it has one."""

    process: subprocess.Popen[bytes]
    address: str
    namespace: str | None

    def family(self) -> list[psutil.Process]:
        """Every process of the node."""
        if self.namespace is not None:
            pids = run("ip", "netns", "pids", self.namespace).stdout.split()
            return [psutil.Process(int(pid)) for pid in pids if psutil.pid_exists(int(pid))]
        try:
            mine = psutil.Process(self.process.pid)
            return [mine, *mine.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """SIGKILL all of it at once, as a machine that loses its power."""
        family = self.family()
        for one in family:
            try:
                one.suspend()
            except psutil.Error:
                continue
        for one in {*family, *self.family()}:
            try:
                one.kill()
            except psutil.Error:
                continue
        self.process.wait()


@dataclass
class Network:
    """A bridge and, on it, namespaces for nodes; `make` gives None where the machine does not allow it."""

    name: str
    prefix: str
    used: int = 1
    namespaces: list[str] = field(default_factory=list)

    @staticmethod
    def make() -> Network | None:
        number = random.SystemRandom().randrange(1, 250)
        network = Network(f"ecb{os.getpid() % 100000}", f"10.{random.SystemRandom().randrange(60, 250)}.{number}")
        try:
            run("ip", "link", "add", network.name, "type", "bridge")
            run("ip", "address", "add", f"{network.prefix}.1/24", "dev", network.name)
            run("ip", "link", "set", network.name, "up")
            run("ip", "netns", "add", f"{network.name}t")
            run("ip", "netns", "delete", f"{network.name}t")
        except (OSError, subprocess.CalledProcessError):
            network.close()
            return None
        return network

    def add(self) -> tuple[str, str]:
        """A namespace and its address."""
        self.used += 1
        space, address = f"{self.name}n{self.used}", f"{self.prefix}.{self.used}"
        run("ip", "netns", "add", space)
        self.namespaces.append(space)
        run("ip", "link", "add", f"v{space[3:]}", "type", "veth", "peer", "name", "node0", "netns", space)
        run("ip", "link", "set", f"v{space[3:]}", "master", self.name, "up")
        inside = ["ip", "netns", "exec", space, "ip"]
        run(*inside, "address", "add", f"{address}/24", "dev", "node0")
        run(*inside, "link", "set", "node0", "up")
        run(*inside, "link", "set", "lo", "up")
        return space, address

    def close(self) -> None:
        for space in self.namespaces:
            run("ip", "netns", "delete", space, check=False)
        run("ip", "link", "delete", self.name, check=False)


class Cluster:
    """A head and its nodes; `environment` is what a person needs who talks to it."""

    def __init__(self, head_cpus: int = 0, own_addresses: bool = True, token: bool = True, **environment: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ec", dir="/tmp"))  # sockets lie in it, whose paths must be short
        self.network = Network.make() if own_addresses else None
        self.address = f"{self.network.prefix}.1" if self.network else "127.0.0.1"
        self.nodes: list[Node] = []
        (self.folder / "home").mkdir()
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "RAY_"))} | {
            "HOME": str(self.folder / "home"), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
            "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache/torch_extensions")),
            "RAY_AUTH_MODE": "token" if token else "disabled",
            # a busy machine gives processes of Ray's own niceness, 15, next to nothing, and takes long to start a node
            "RAY_worker_niceness": "0", "RAY_raylet_start_wait_time_s": "600", **environment}
        if token:
            subprocess.run([RAY, "get-auth-token", "--generate"], env=self.environment, check=True, capture_output=True)
        try:
            self.start_head(head_cpus)
        except BaseException:
            self.close()
            raise

    def start_head(self, cpus: int = 0) -> None:
        self.port, self.dashboard_port = free_port(), free_port()
        self.dashboard = f"http://{self.address}:{self.dashboard_port}"
        self.environment["RAY_API_SERVER_ADDRESS"] = self.dashboard
        self.head = self._start(None, self.address, "--head", f"--port={self.port}", f"--num-cpus={cpus}",
                                f"--dashboard-host={self.address}", f"--dashboard-port={self.dashboard_port}",
                                f"--temp-dir={self.folder}/{self.port}", f"--ray-client-server-port={free_port()}")
        self._until(lambda: subprocess.run([RAY, "job", "list"], env=self.environment, capture_output=True).returncode == 0)

    def _start(self, space: str | None, address: str, *options: str, hidden: str | None = None) -> Node:
        inside = ["ip", "netns", "exec", space] if space else []
        # A namespace has mounts of its own too. Without them nodes have one session folder, and delete each other's files.
        for folder in [str(self.folder / str(self.port))] * bool(space) + [hidden] * bool(hidden):
            inside += ["sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', folder]
        own = {"GLOO_SOCKET_IFNAME": "node0"} if space else {}
        with open(self.folder / f"{len(self.nodes)}-{address}.log", "wb") as log:
            process = subprocess.Popen(
                [*inside, RAY, "start", "--block", f"--node-ip-address={address}", "--object-store-memory=150000000",
                 "--disable-usage-stats", *options], stdout=log, stderr=subprocess.STDOUT, env=self.environment | own,
                start_new_session=True)
        return Node(process, address, space)

    def add(self, cpus: int, hidden: str | None = None) -> Node:
        """One more node, which may see an empty folder in a place of this machine's; returns once the cluster has it."""
        space, address = self.network.add() if self.network else (None, self.address)
        before = self._until(self.alive)  # a node just killed may still be among them
        node = self._start(space, address, f"--address={self.address}:{self.port}", f"--num-cpus={cpus}",
                           hidden=hidden)
        self.nodes.append(node)
        self._until(lambda: self.alive() - before)
        return node

    def alive(self) -> set[str]:
        """Ids of the nodes that the head believes alive, itself among them; none while it does not answer."""
        found = subprocess.run([RAY, "list", "nodes", "--address", self.dashboard, "--format", "json", "--limit", "1000"],
                               env=self.environment, capture_output=True, text=True)
        listed = json.loads(found.stdout) if found.stdout.startswith("[") else []
        return {node["node_id"] for node in listed if node["state"] == "ALIVE"}

    def _until(self, done: Any, seconds: float = 600) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := done()):
            assert time.monotonic() < deadline and self.head.process.poll() is None, self.logs()
            time.sleep(0.5)
        return found

    def logs(self) -> str:
        return "\n".join(f"{path}:\n{path.read_text()[-3000:]}" for path in self.folder.glob("*.log"))

    def submit(self, *words: str, working_dir: Path = ROOT, **environment: str) -> subprocess.Popen[str]:
        """`ray job submit` of a command, as a person would."""
        excludes = ["data/", "runs/", ".venv", ".git", "tests/"]
        more = {"excludes": excludes, "env_vars": environment}
        return subprocess.Popen(
            [RAY, "job", "submit", "--working-dir", str(working_dir), "--runtime-env-json", json.dumps(more), "--", *words],
            env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def ray(self, *words: str) -> str:
        done = subprocess.run([RAY, *words], env=self.environment, capture_output=True, text=True)
        return done.stdout + done.stderr

    def lose_head(self) -> None:
        """SIGKILL the head and what runs on it, jobs too."""
        mine = str(self.folder)
        family = {*Node(self.head.process, self.head.address, None).family(), *(
            process for process in psutil.process_iter(["cmdline"]) if mine in " ".join(process.info["cmdline"] or []))}
        for process in family:
            try:
                process.kill()
            except psutil.Error:
                continue
        self.head.process.wait()

    def close(self) -> None:
        for node in self.nodes:
            node.kill()
        self.lose_head()
        if self.network is not None:
            self.network.close()
        shutil.rmtree(self.folder, ignore_errors=True)
