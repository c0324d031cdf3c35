"""A run as a JobSet on Kubernetes (jobset.x-k8s.io/v1alpha2): one indexed Job with a pod for each node, and one torchrun in each pod.

A pod that is lost, or was preempted, takes the set with it, which begins again from the newest checkpoint, `launch.k8s.max_restarts` times;
exit codes that would come again (a wrong configuration, a diverged loss ...) end it at once.
"""

import math
import re
from typing import Any

import yaml

from ...conf.errors import ConfigError
from .. import exit_codes
from .job import Job

_NODES, _RANKS = "node", "ranks"  # names of the Job in the set, and of the container in its pods


def manifest(job: Job) -> str:
    """YAML for `kubectl apply -f -`. Raises ConfigError where the image or the claim is not given."""
    k = job.config.launch.k8s
    wanted = {"image": "a container image that has Shoestring", "claim": "a PersistentVolumeClaim for runs and data, shared by all pods"}
    for name, what in wanted.items():
        if not getattr(k, name):
            raise ConfigError(f"launch.k8s.{name}", "", f"must be given: {what}")
    name = _name(job.config.name)
    head = (
        f"# {name}: {job.world_size:,} ranks in {job.nodes:,} pods. To start it: kubectl apply -f FILE. To follow it:\n"
        f"# kubectl logs -f -n {k.namespace} -l jobset.sigs.k8s.io/jobset-name={name} --max-log-requests={job.nodes} --tail=20\n"
    )
    return head + yaml.safe_dump(_job_set(job, name), sort_keys=False, width=1000)


def _job_set(job: Job, name: str) -> dict[str, Any]:
    k = job.config.launch.k8s
    again = (*exit_codes.PASSING, exit_codes.PREEMPTED, exit_codes.OK)
    final = sorted(code for code in exit_codes.MEANING if code not in again)
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name, "namespace": k.namespace, "labels": {"app.kubernetes.io/name": "shoestring"}},
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "successPolicy": {"operator": "All", "targetReplicatedJobs": [_NODES]},
            "failurePolicy": {
                "maxRestarts": k.max_restarts,
                "rules": [{"name": "final", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": _NODES, "replicas": 1, "template": {"spec": _job(job, name, final)}}],
        },
    }


def _job(job: Job, name: str, final: list[int]) -> dict[str, Any]:
    return {
        "parallelism": job.nodes,
        "completions": job.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [{"action": "FailJob", "onExitCodes": {"containerName": _RANKS, "operator": "In", "values": final}}],
        },
        "template": {"metadata": {"labels": {"app.kubernetes.io/name": "shoestring"}}, "spec": _pod(job, name)},
    }


def _pod(job: Job, name: str) -> dict[str, Any]:
    k = job.config.launch.k8s
    first = f"{name}-{_NODES}-0-0.{name}"  # the name that JobSet gives the first pod of the first Job
    line = job.torchrun(endpoint=f"{first}:{job.config.launch.port}", name=name, python="python3")
    if job.gpus:
        amounts = {k.gpu_resource: str(job.ranks_per_node)}
    else:
        amounts = {"cpu": str(job.cores), "memory": f"{math.ceil(job.ranks_per_node * job.config.cluster.memory_gb)}G"}
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": k.grace_s,
        "containers": [
            {
                "name": _RANKS,
                "image": k.image,
                "command": line,
                "workingDir": k.mount,
                "env": [{"name": "PYTHONSAFEPATH", "value": "1"}],
                "resources": {"limits": amounts, "requests": dict(amounts)},
                "volumeMounts": [{"name": "shared", "mountPath": k.mount}, {"name": "shm", "mountPath": "/dev/shm"}],
            }
        ],
        "volumes": [
            {"name": "shared", "persistentVolumeClaim": {"claimName": k.claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{k.shm_gb:g}G"}},
        ],
    }


def _name(text: str) -> str:
    """As Kubernetes wants names: of a set, so short that those of its pods are not too long."""
    return re.sub(r"[^a-z0-9-]+", "-", text.lower()).strip("-")[:40].strip("-") or "run"
