"""Manifests read as an API server that rejects unknown fields would: Kubernetes' own kinds by the models of its client,
KubeRay's by the fields of its version 1.6 that cluster/ uses, pod templates by both.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from kubernetes import client
from pydantic import BaseModel, ConfigDict, Field

KINDS = {"ServiceAccount": "V1ServiceAccount", "PersistentVolumeClaim": "V1PersistentVolumeClaim", "Service": "V1Service",
         "Deployment": "V1Deployment"}
QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?")


def check(value: Any, kind: str, where: str) -> None:
    """A value against a type of the client, given as its models give it: `str`, `list[V1Container]`, `V1PodSpec`, ..."""
    inner = re.fullmatch(r"(?:list\[(?P<item>.+)\]|dict\([^,]+, (?P<entry>.+)\))", kind)
    if inner and inner["item"]:
        assert isinstance(value, list), f"{where} must be a list"
        for index, one in enumerate(value):
            check(one, inner["item"], f"{where}[{index}]")
    elif inner:
        assert isinstance(value, dict), f"{where} must be a mapping"
        for key, one in value.items():
            check(one, inner["entry"], f"{where}.{key}")
            assert not where.endswith((".requests", ".limits")) or QUANTITY.fullmatch(one), f"{where}.{key}: {one}"
    elif kind in ("str", "int", "bool", "float"):
        wanted = {"str": str, "int": int, "bool": bool, "float": (int, float)}[kind]
        assert isinstance(value, wanted) and (kind == "bool" or not isinstance(value, bool)), f"{where} must be {kind}"
    elif kind != "object":
        check_model(value, getattr(client, kind), where)


def check_model(value: Any, model: Any, where: str) -> None:
    assert isinstance(value, dict), f"{where} must be a mapping"
    names = {external: internal for internal, external in model.attribute_map.items()}
    unknown = value.keys() - names.keys()
    assert not unknown, f"{where} has no field {', '.join(sorted(unknown))}"
    model(**{names[key]: one for key, one in value.items()})  # raises where a required field is missing
    for key, one in value.items():
        check(one, model.openapi_types[names[key]], f"{where}.{key}")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Auth(Strict):
    mode: Literal["disabled", "token"]
    secretName: str | None = None


class Credential(Strict):
    valueFrom: dict[str, Any]


class Redis(Strict):
    redisAddress: str
    redisPassword: Credential | None = None
    redisUsername: Credential | None = None
    externalStorageNamespace: str | None = None


class Autoscaler(Strict):
    version: Literal["v1", "v2"] | None = None
    idleTimeoutSeconds: int | None = None
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] | None = None
    resources: dict[str, Any] | None = None


class Head(Strict):
    rayStartParams: dict[str, str]
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer"] | None = None
    template: dict[str, Any]


class Group(Strict):
    groupName: str = Field(pattern=r"^[a-z0-9-]+$")
    replicas: int = Field(ge=0)
    minReplicas: int = Field(ge=0)
    maxReplicas: int = Field(ge=0)
    numOfHosts: int = 1
    idleTimeoutSeconds: int | None = None
    rayStartParams: dict[str, str]
    template: dict[str, Any]


class Cluster(Strict):
    rayVersion: str
    authOptions: Auth
    gcsFaultToleranceOptions: Redis | None = None
    enableInTreeAutoscaling: bool
    autoscalerOptions: Autoscaler
    headGroupSpec: Head
    workerGroupSpecs: list[Group]


class Job(Strict):
    entrypoint: str
    runtimeEnvYAML: str | None = None
    backoffLimit: int = Field(ge=0)
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: int
    activeDeadlineSeconds: int | None = None
    submissionMode: Literal["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"] = "K8sJobMode"
    rayClusterSpec: Cluster


def check_manifest(manifest: dict[str, Any]) -> None:
    """One document of a manifest.

    Raises:
        AssertionError, ValueError: naming the field that is unknown, missing or of another type.
    """
    kind = manifest["kind"]
    if kind in KINDS:
        check(manifest, KINDS[kind], kind)
        return
    assert manifest["apiVersion"] == "ray.io/v1" and manifest.keys() == {"apiVersion", "kind", "metadata", "spec"}
    check(manifest["metadata"], "V1ObjectMeta", f"{kind}.metadata")
    spec = manifest["spec"]
    cluster = Job.model_validate(spec).rayClusterSpec if kind == "RayJob" else Cluster.model_validate(spec)
    groups = {"head": cluster.headGroupSpec.template} | {group.groupName: group.template for group in cluster.workerGroupSpecs}
    for name, template in groups.items():
        check(template, "V1PodTemplateSpec", f"{kind}.{name}")
    redis = cluster.gcsFaultToleranceOptions
    if redis is not None and redis.redisPassword is not None:
        check(redis.redisPassword.valueFrom, "V1EnvVarSource", f"{kind}.redisPassword")
