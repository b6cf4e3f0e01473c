"""cluster/: what can be seen of its files without a cloud. Schemas, what recipes ask of the nodes, the image, the README."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from conftest import load_job
from kubernetes_strict import check_manifest
from ray.autoscaler._private.util import prepare_config, validate_config

from ecocseg import cli, launch, scale, sweep
from ecocseg.config import RunConfig, load, recipe_names

ROOT = Path(__file__).resolve().parents[1]
FILES = ROOT / "cluster"
CLOUDS = ("aws", "gcp")
MANIFESTS = ("kuberay-rayjob", "kuberay-raycluster")
SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
# vCPUs, GPUs and GB of memory as the providers state them.
MACHINES = {"m6i.2xlarge": (8, 0, 32), "g5.4xlarge": (16, 1, 64), "g5.48xlarge": (192, 8, 768), "c6i.8xlarge": (32, 0, 64),
            "n2-standard-8": (8, 0, 32), "g2-standard-16": (16, 1, 64), "g2-standard-96": (96, 8, 384),
            "n2-standard-32": (32, 0, 128)}
# A recipe, workers and the machines they go on.
PLACES = (("daformer_gta2cityscapes", 1, {"gpu": 1}), ("mic_gta2cityscapes", 2, {"gpu": 2}),
          ("unimatch_voc_1_16", 2, {"gpu": 2}), ("unimatch_cityscapes_1_16", 4, {"gpu": 4}),
          ("unimatch_coco_1_32", 8, {"gpu8": 1}), ("unimatch_v2_coco_1_32", 8, {"gpu8": 1}),
          ("unimatch_v2_voc_1464_base", 4, {"gpu": 4}))


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((FILES / f"{name}.yaml").read_text())


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FILES / f"{name}.yaml").read_text()))


def check_launcher_file(config: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` checks before it asks the cloud for anything, and its schema."""
    jsonschema.validate(config, SCHEMA)
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("name", (*CLOUDS, "local"))
def test_launcher_files(name: str) -> None:
    config = read(name)
    check_launcher_file(config)
    options = config["docker"]["run_options"]
    assert "--env RAY_AUTH_MODE=token" in options and "~/.ray/auth_token" in config["file_mounts"]
    grace = [int(option.rpartition("=")[2]) for option in options if "RAY_JOB_STOP_WAIT_TIME_S" in option]
    assert grace and grace[0] >= 120
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])


@pytest.mark.parametrize("change", ({"max_worker": 3}, {"head_node_type": "boss"}, {"docker": {"images": "x"}},
                                    {"available_node_types": {"gpu": {"resources": {"CPU": "many"}, "node_config": {}}}}))
def test_launcher_files_with_mistakes_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises((jsonschema.ValidationError, ValueError, SystemExit)):
        check_launcher_file(read("aws") | change)


@pytest.mark.parametrize("name", CLOUDS)
def test_machines_are_what_they_say(name: str) -> None:
    types = read(name)["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    for kind, node in types.items():
        machine = node["node_config"].get("InstanceType") or node["node_config"]["machineType"]
        cpus, gpus, _ = MACHINES[machine]
        assert kind == "head" or node["resources"] == {"CPU": cpus} | ({"GPU": gpus} if gpus else {}), machine
        spot = (node["node_config"].get("InstanceMarketOptions") == {"MarketType": "spot"}
                or node["node_config"].get("scheduling", {}).get("provisioningModel") == "SPOT")
        assert spot == (kind != "head") and (kind == "head" or node["min_workers"] == 0)
        assert kind == "head" and name == "gcp" or node["node_config"].keys() & {"IamInstanceProfile", "serviceAccounts"}


def shapes(name: str) -> dict[str, tuple[float, int]]:
    """CPUs and GPUs of each kind of node of a file."""
    if name in CLOUDS:
        return {kind: (node["resources"]["CPU"], node["resources"].get("GPU", 0))
                for kind, node in read(name)["available_node_types"].items()}
    spec = documents(name)[-1]["spec"]
    groups = spec.get("rayClusterSpec", spec)["workerGroupSpecs"]
    limits = {group["groupName"]: group["template"]["spec"]["containers"][0]["resources"]["limits"] for group in groups}
    return {kind: (float(limit["cpu"]), int(limit.get("nvidia.com/gpu", 0))) for kind, limit in limits.items()}


@pytest.mark.parametrize("name", (*CLOUDS, *MANIFESTS))
@pytest.mark.parametrize(("recipe", "workers", "machines"), PLACES)
def test_recipes_fit(name: str, recipe: str, workers: int, machines: dict[str, int]) -> None:
    nodes = shapes(name)
    if not machines.keys() <= nodes.keys():
        pytest.skip("the file has no such nodes")
    there = [(float(nodes[kind][0]), nodes[kind][1]) for kind, count in machines.items() for _ in range(count)]
    for extra in ((), ("data.decode=ray", "data.decode_threads=2")):
        config = load(recipe, overrides=[f"launch.workers={workers}", "launch.gpu=true", *extra])
        readers = [(float(nodes["ingest"][0]), 0)] if extra else []
        planned = launch.plan_on_nodes(config, [*there, *readers])
        assert planned.workers == workers and planned.gpu and planned.cpus_per_worker == scale.WORKER_CPUS


@pytest.mark.parametrize(("recipe", "workers", "machines"), PLACES)
def test_the_autoscaler_starts_what_a_recipe_waits_for(recipe: str, workers: int, machines: dict[str, int]) -> None:
    from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for

    def score(*node: Any) -> Any:
        return _default_utilization_scorer(*node, node_availability_summary=None)

    asked = scale.wanted(load(recipe, overrides=[f"launch.workers={workers}", "launch.gpu=true"]))
    for name in CLOUDS:
        config = check_launcher_file(read(name))
        types = config["available_node_types"]
        added, left = get_nodes_for(types, {"head": 1}, "head", config["max_workers"], asked, score)
        assert not left and sum(types[kind]["resources"].get("GPU", 0) * count for kind, count in added.items()) == workers
        assert not added.keys() - {"gpu", "gpu8"}, "readers have room beside the workers"
        if workers == 8:
            assert added == machines


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests(name: str) -> None:
    for document in documents(name):
        check_manifest(document)


def cluster_spec(name: str) -> dict[str, Any]:
    spec = documents(name)[-1]["spec"]
    return spec.get("rayClusterSpec", spec)


@pytest.mark.parametrize("path", ("spec.entrypont", "spec.rayClusterSpec.rayversion",
                                  "spec.rayClusterSpec.workerGroupSpecs.0.minReplica",
                                  "spec.rayClusterSpec.workerGroupSpecs.0.template.spec.toleration",
                                  "spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.resources.limit",
                                  "metadata.label"))
def test_unknown_fields_of_manifests_are_refused(path: str) -> None:
    job = documents("kuberay-rayjob")[-1]
    *way, key = path.split(".")
    place: Any = job
    for step in way:
        place = place[int(step) if step.isdigit() else step]
    place[key] = "x"
    with pytest.raises((AssertionError, ValueError)):
        check_manifest(job)


def test_missing_and_mistyped_fields_of_manifests_are_refused() -> None:
    for spoil in (lambda pod: pod["containers"][0].pop("name"), lambda pod: pod.update(terminationGracePeriodSeconds="200"),
                  lambda pod: pod["containers"][0]["resources"]["limits"].update(memory="52 GB")):
        job = documents("kuberay-rayjob")[-1]
        spoil(job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"])
        with pytest.raises((AssertionError, ValueError)):
            check_manifest(job)


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_have_time_to_save(name: str) -> None:
    spec = cluster_spec(name)
    assert spec["authOptions"] == {"mode": "token"} and spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for one in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        pod = one["template"]["spec"]
        env = {one["name"]: one["value"] for one in pod["containers"][0]["env"]}
        drain, stop = (int(env[key]) for key in ("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "RAY_JOB_STOP_WAIT_TIME_S"))
        assert pod["terminationGracePeriodSeconds"] > drain >= 30 and stop >= 120
        limits = pod["containers"][0]["resources"]
        assert limits["limits"] == limits["requests"], "Ray counts on what a pod may use, Kubernetes on what it asks for"
        assert pod["serviceAccountName"] == "ecocseg"
        gpu = "nvidia.com/gpu" in limits["limits"]
        # The image asks for all of a machine's GPUs; a pod without one must not count what it might see.
        assert gpu == (one["rayStartParams"].get("num-gpus") != "0")
        assert not gpu or "nvidia.com/gpu" in {toleration["key"] for toleration in pod["tolerations"]}
    head = spec["headGroupSpec"]["template"]["spec"]
    assert head["terminationGracePeriodSeconds"] > stop


def test_the_job_of_the_manifest_is_one_that_runs() -> None:
    words = shlex.split(documents("kuberay-rayjob")[-1]["spec"]["entrypoint"])
    check_script(words[1].removeprefix("/opt/ecocseg/"), words[2:])
    assert words[words.index("--resume") + 1] == "auto" and any(word.startswith("run.name=") for word in words)


def test_versions_agree() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert {cluster_spec(name)["rayVersion"] for name in MANIFESTS} == {pins["ray"]}
    images = set()
    for name in (*CLOUDS, "local"):
        images.add(read(name)["docker"]["image"])
    for name in MANIFESTS:
        spec = cluster_spec(name)
        images |= {one["template"]["spec"]["containers"][0]["image"]
                   for one in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]}
    assert len(images) == 1 and images.pop() in (FILES / "Dockerfile").read_text()


def test_no_keys() -> None:
    for file in FILES.iterdir():
        text = file.read_text() if file.is_file() else ""
        assert not re.search(r"AKIA|AWS_SECRET|AWS_ACCESS_KEY|BEGIN .*PRIVATE KEY", text), file


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments, comments out and continued lines joined."""
    lines = [line for line in (FILES / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def test_dockerfile() -> None:
    found = instructions()
    known = {"FROM", "RUN", "ENV", "WORKDIR", "COPY"}
    assert {name for name, _ in found} <= known and found[0][0] == "FROM"
    for name, rest in found:
        if name == "COPY":
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
    installs = [rest for name, rest in found if name == "RUN" and "pip install" in rest]
    assert installs and all("-c constraints.txt" in rest for rest in installs)
    asked = set(re.findall(r'"\.\[(\w+)\]"', installs[0]))
    assert asked <= set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    environment = dict(pair.split("=", 1) for name, rest in found if name == "ENV" for pair in rest.split())
    assert environment["DS_BUILD_OPS"] == "0" and environment["RAY_AUTH_MODE"] == "token"
    assert environment["NVIDIA_VISIBLE_DEVICES"] == "all"
    copied = {source for name, rest in found if name == "COPY" for source in rest.split()[:-1]}
    assert {"ecocseg", "jobs", "tune", "cluster", "pyproject.toml", "README.md", "LICENSE"} <= copied  # for pip
    (check,) = [rest for name, rest in found if name == "RUN" and "--dry-run" in rest]
    words = shlex.split(check.split("&&")[0])
    check_script(words[1], words[2:])


def test_working_directory_is_small(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import _zip_files

    for folder in ("ecocseg", "jobs", "tune", "cluster", "tests"):
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                copy_of = tmp_path / "project" / file.relative_to(ROOT)
                copy_of.parent.mkdir(parents=True, exist_ok=True)
                copy_of.write_bytes(file.read_bytes())
    project = tmp_path / "project"
    for file in (".rayignore", ".gitignore", "pyproject.toml", "constraints.txt"):
        (project / file).write_bytes((ROOT / file).read_bytes())
    for big in ("data/gta/part-0.parquet", "runs/demo/checkpoints/step_1/model.safetensors", ".venv/lib/torch.so",
                ".git/objects/ab", "weights.pth", "ecocseg/__pycache__/config.cpython-311.pyc", "tests/pictures.png"):
        (project / big).parent.mkdir(parents=True, exist_ok=True)
        (project / big).write_bytes(os.urandom(3_000_000))
    _zip_files(str(project), [], str(tmp_path / "package.zip"), include_gitignore=True)
    assert (tmp_path / "package.zip").stat().st_size < 2_500_000
    names = set(zipfile.ZipFile(tmp_path / "package.zip").namelist())
    needed = {"ecocseg/data/pipeline.py", "ecocseg/recipes/demo.yaml", "ecocseg/embeddings/class_names.safetensors",
              "jobs/train_uda.py", "jobs/variants/demo.yaml", "tune/spaces/uda.yaml", "tune/sweep.py"}
    assert needed <= names and not any(name.startswith(("tests/", "data/", "runs/", ".git/", ".venv/")) for name in names)


def commands(text: str) -> list[list[str]]:
    """The commands of a page's code blocks, as words, continued lines joined and comments left out."""
    found = []
    for block in re.findall(r"^```\n(.*?)^```", text, re.M | re.S):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            for part in line.split(" && "):
                words = shlex.split(part, comments=True)
                if words:
                    found.append(words)
    return found


def check_script(script: str, words: list[str]) -> None:
    """A script of this project with arguments that it takes: flags, recipe, keys and files."""
    assert (ROOT / script).is_file(), script
    folder, name = script.split("/")
    if folder == "jobs" and name in ("train_uda.py", "train_ssl.py"):
        args = cli.parse("", "demo", words)
        assert args.recipe in recipe_names()
        check_data(load(args.recipe, args.config, args.overrides))
    elif folder == "tune":
        args = load_job("sweep", "tune").parse(words)
        check_data(sweep.base_config(sweep.read_sweep(ROOT / args.space, args.overrides)))
    else:
        assert script == "jobs/in_venv.py" and not words, (script, words)


def test_every_submission_has_a_token() -> None:
    for section in (ROOT / "README.md").read_text().split("\n## "):
        for line in re.findall(r"^.*\bray job submit .*$", section, re.M):
            before = section[:section.index(line)]
            bare = not line.startswith("RAY_AUTH_MODE=token ") and "export RAY_AUTH_MODE=token" not in before
            assert not bare or "`ray job submit" in line, line


def check_data(config: RunConfig) -> None:
    """Where runs lie in a bucket, no data may be left on the machine that submits."""
    if config.run.directory.startswith("s3://"):
        urls = [config.data.labeled, config.data.unlabeled, *config.data.eval.values()]
        assert all(str(url).startswith("s3://") for url in urls), urls


def check_ray(words: list[str]) -> None:
    """A command of Ray's own program: it and its options exist, what follows `--` runs, files are there."""
    from ray.scripts.scripts import cli as command

    path = iter(words)
    for word in path:
        if not hasattr(command, "commands"):
            break
        command = command.commands[word]
    rest = words[next(i for i, word in enumerate(words) if command.name == word) + 1:]
    options = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    own, _, script = " ".join(rest).partition(" -- ")
    unknown = [word for word in own.split() if word.startswith("--") and word.partition("=")[0] not in options]
    assert not unknown, f"ray {' '.join(words)}: no option {unknown}"
    for word in own.split():
        assert not word.startswith("cluster/") or (ROOT / word).is_file(), word
    if script:
        job = script.split()
        assert job[0] == "python"
        check_script(job[1], job[2:])


@pytest.mark.parametrize("page", ("cluster/README.md", "README.md"))
def test_commands_of_the_readme(page: str) -> None:
    text = (ROOT / page).read_text()
    if page == "README.md":
        text = text.partition("\n## On a cluster\n")[2].partition("\n## ")[0]
    checked = set()
    for words in commands(text):
        program, rest = words[0], words[1:]
        checked.add(program)
        if program == "ray":
            check_ray(rest)
        elif "=" in program:
            assert program.partition("=")[0] in ("job", "head"), words
        elif program == "kubectl":
            for index, word in enumerate(rest):
                assert word != "-f" or (ROOT / rest[index + 1]).is_file(), words
        elif program == "sbatch":
            at = next(i for i, word in enumerate(rest) if not word.startswith("--"))
            assert rest[at] == "cluster/slurm.sh"
            given = {word.split("=")[0] for word in rest[:at]}
            assert given <= set(re.findall(r"^#SBATCH (--[\w-]+)", (FILES / "slurm.sh").read_text(), re.M)), words
            check_script(rest[at + 1], rest[at + 2:])
        elif program == "docker":
            assert "-f" not in rest or (ROOT / rest[rest.index("-f") + 1]).is_file()
        elif program in ("python", "python3"):
            check_script(rest[0], rest[1:])
        else:
            assert program in ("export", "scancel"), words
    assert {"ray", "kubectl", "sbatch", "export"} <= checked
    assert 0 < text.index("export RAY_AUTH_MODE=token") < text.index("ray job ")
    for number in re.findall(r"RAY_JOB_STOP_WAIT_TIME_S`: (\d+) s", text):
        assert f"RAY_JOB_STOP_WAIT_TIME_S={number}" in (FILES / "aws.yaml").read_text()
