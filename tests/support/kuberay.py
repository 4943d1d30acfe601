"""KubeRay's custom resources, strictly: what its CRD accepts, in the parts that cluster/ uses.

Fields and their types follow the API reference of KubeRay 1.6 (docs.ray.io, "KubeRay CRD API
reference"); pods in them are Kubernetes' own, and are checked against its published schemas.
"""

from __future__ import annotations

from typing import Any, Literal

import kubernetes_validate
from pydantic import BaseModel, ConfigDict, Field, model_validator

KUBERNETES_VERSION = "1.33"


class Object(BaseModel):
    """One that has no other fields than these."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Object):
    name: str | None = Field(
        default=None, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=50
    )
    generateName: str | None = None
    namespace: str
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class AuthOptions(Object):
    mode: Literal["disabled", "token"]
    secretName: str | None = None
    enableK8sTokenAuth: bool = False


class AutoscalerOptions(Object):
    idleTimeoutSeconds: int = 60
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] = "Default"
    version: Literal["v1", "v2"] | None = None
    image: str | None = None
    imagePullPolicy: str | None = None
    resources: dict[str, dict[str, Any]] = {}
    env: list[dict[str, Any]] = []
    securityContext: dict[str, Any] = {}


class Group(Object):
    rayStartParams: dict[str, str]
    template: dict[str, Any]

    @model_validator(mode="after")
    def _check_pod(self) -> Group:
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}}
        kubernetes_validate.validate(pod | {"template": self.template}, KUBERNETES_VERSION, True)
        return self


class HeadGroup(Group):
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer"] = "ClusterIP"
    enableIngress: bool = False


class WorkerGroup(Group):
    groupName: str
    replicas: int = Field(ge=0)
    minReplicas: int = Field(ge=0)
    maxReplicas: int = Field(ge=0)
    numOfHosts: int = 1
    idleTimeoutSeconds: int | None = None
    suspend: bool = False


class RayClusterSpec(Object):
    rayVersion: str
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]
    enableInTreeAutoscaling: bool = False
    autoscalerOptions: AutoscalerOptions = AutoscalerOptions()
    authOptions: AuthOptions | None = None
    headServiceAnnotations: dict[str, str] = {}
    suspend: bool = False


class RayCluster(Object):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: RayClusterSpec


class SubmitterConfig(Object):
    backoffLimit: int = Field(ge=0)


class RayJobSpec(Object):
    entrypoint: str
    rayClusterSpec: RayClusterSpec
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]
    backoffLimit: int = Field(default=0, ge=0)
    submitterConfig: SubmitterConfig | None = None
    submitterPodTemplate: dict[str, Any] | None = None
    shutdownAfterJobFinishes: bool = False
    ttlSecondsAfterFinished: int = Field(default=0, ge=0)
    activeDeadlineSeconds: int | None = Field(default=None, gt=0)
    runtimeEnvYAML: str = ""
    entrypointNumCpus: float = 0
    entrypointNumGpus: float = 0
    entrypointResources: str = ""
    jobId: str = ""
    metadata: dict[str, str] = {}
    suspend: bool = False


class RayJob(Object):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec
