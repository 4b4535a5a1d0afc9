"""The files of cluster/, checked without a cluster: by Ray's and Kubernetes' own rules, by ours, and against each other.

No API server, operator, Kueue or cloud can run here. So no test shows what only they could: that the operator makes a lost head anew and
when it gives a RayJob up, that Kueue admits a job, that a node's driver suits the image, that a file system lets the nodes in. The files
and cluster/README.md say what to set there. What is advice alone (a group for each kind of GPU, Redis, containers under Slurm) is text.
Slurm can run here: `test_slurm.py` has the script with stand-ins for Slurm's commands, `test_slurm_real.py` with Slurm.
"""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import jsonpatch
import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.docker import docker_start_cmds
from ray.autoscaler._private.util import prepare_config, validate_config
from transformers import LlamaConfig

from pharmacist_ray.config import load_config
from pharmacist_ray.doctor.estimate import memory, setup_of, total
from pharmacist_ray.doctor.shape import shape_of

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
SCHEMA = json.loads((Path(__file__).parent / "kuberay.schema.json").read_text())
RAY = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE).group(1)  # type: ignore[union-attr]
KUBERNETES = "1.37"
KUBERAY = ["kuberay/raycluster.yaml", "kuberay/rayjob.yaml"]

Document = dict[str, Any]


def _load(name: str) -> Document:
    document: Document = yaml.safe_load((CLUSTER / name).read_text())
    return document


def _spec(document: Document) -> Document:
    """Return the cluster's specification, which a RayJob has inside its own."""
    spec: Document = document["spec"]
    return spec["rayClusterSpec"] if document["kind"] == "RayJob" else spec


def _templates(document: Document) -> dict[str, Document]:
    """Return all pod templates by where they are."""
    spec = _spec(document)
    found = {"head": spec["headGroupSpec"]["template"]}
    found |= {f"worker group {group['groupName']}": group["template"] for group in spec["workerGroupSpecs"]}
    if "submitterPodTemplate" in document["spec"]:
        found["submitter"] = document["spec"]["submitterPodTemplate"]
    return found


def _check_pod(template: Document) -> None:
    metadata = {"name": "pod"} | template.get("metadata", {})
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def _faults(document: Document) -> list[str]:
    """Return what KubeRay would refuse: by the schema, then by the rules that its operator checks besides."""
    rules = {"$ref": f"#/$defs/{document['kind']}", "$defs": SCHEMA["$defs"]}
    faults = [f"{error.json_path}: {error.message}" for error in jsonschema.Draft202012Validator(rules).iter_errors(document)]
    return faults or list(_broken_rules(document))


def _broken_rules(document: Document) -> Iterator[str]:
    job, spec = document["spec"], _spec(document)
    for group in spec["workerGroupSpecs"]:
        low, high = group["minReplicas"], group["maxReplicas"]
        if not low <= group.get("replicas", low) <= high:
            yield f"{group['groupName']}: minReplicas <= replicas <= maxReplicas does not hold"
    for where, template in _templates(document).items():
        if where != "submitter" and spec.get("enableInTreeAutoscaling") and template["spec"].get("restartPolicy") != "Never":
            yield f"{where}: the autoscaler (v2) replaces pods itself, restartPolicy must be Never"
    if spec.get("authOptions", {}).get("mode") == "token" and tuple(map(int, spec["rayVersion"].split("."))) < (2, 52, 0):
        yield "token authentication needs Ray 2.52"
    if document["kind"] != "RayJob":
        return
    if job.get("ttlSecondsAfterFinished") and not job.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if job.get("submissionMode") == "SidecarMode" and {"submitterPodTemplate", "submitterConfig"} & set(job):
        yield "SidecarMode has no submitter pod"
    if job.get("submissionMode") == "InteractiveMode" and job.get("backoffLimit"):
        yield "InteractiveMode cannot be repeated"


# --- by KubeRay's and Kubernetes' rules


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_would_take_it(name: str) -> None:
    assert _faults(_load(name)) == []


def _set(*path: str | int, to: Any) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = to  # type: ignore[index]

    return change


HEAD = ("spec", "rayClusterSpec", "headGroupSpec")
GROUP = ("spec", "rayClusterSpec", "workerGroupSpecs", 0)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (_set("spec", "backofLimit", to=3), "Additional properties are not allowed ('backofLimit' was unexpected)"),
        (_set("spec", "entrypoint", to=["python"]), "$.spec.entrypoint: ['python'] is not of type 'string'"),
        (_set("spec", "submissionMode", to="K8SJobMode"), "$.spec.submissionMode: 'K8SJobMode' is not one of"),
        (_set("spec", "backoffLimit", to="3"), "$.spec.backoffLimit: '3' is not of type 'integer'"),
        (_set("spec", "runtimeEnvYAML", to={"pip": []}), "$.spec.runtimeEnvYAML: {'pip': []} is not of type 'string'"),
        (_set("spec", "clusterSelector", to={"ray.io/cluster": "x"}), "is valid under each of"),
        (_set("spec", "shutdownAfterJobFinishes", to=False), "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"),
        (_set("spec", "submissionMode", to="SidecarMode"), "SidecarMode has no submitter pod"),
        (_set("spec", "submissionMode", to="InteractiveMode"), "InteractiveMode cannot be repeated"),
        (_set("spec", "rayClusterSpec", "authOptions", "mode", to="Token"), "authOptions.mode: 'Token' is not one of"),
        (_set("spec", "rayClusterSpec", "rayVersion", to=2.6), "rayVersion: 2.6 is not of type 'string'"),
        (_set("spec", "rayClusterSpec", "rayVersion", to="2.51.0"), "token authentication needs Ray 2.52"),
        (_set("spec", "rayClusterSpec", "autoscalerOptions", "version", to="V2"), "version: 'V2' is not one of"),
        (_set(*HEAD, "rayStartParams", "num-cpus", to=0), "rayStartParams['num-cpus']: 0 is not of type 'string'"),
        (_set(*HEAD, "replicas", to=1), "('replicas' was unexpected)"),
        (_set(*HEAD, "template", "containers", to=[]), "('containers' was unexpected)"),
        (_set(*HEAD, "template", "spec", "restartPolicy", to="Always"), "head: the autoscaler (v2) replaces pods itself"),
        (_set(*GROUP, "rayStartParams", to=None), "rayStartParams: None is not of type 'object'"),
        (_set(*GROUP, "maxReplicas", to="2"), "maxReplicas: '2' is not of type 'integer'"),
        (_set(*GROUP, "minReplicas", to=1), "gpu: minReplicas <= replicas <= maxReplicas does not hold"),
        (_set(*GROUP, "replicas", to=3), "gpu: minReplicas <= replicas <= maxReplicas does not hold"),
        (_set("apiVersion", to="ray.io/v1alpha1"), "$.apiVersion: 'ray.io/v1' was expected"),
        (_set("metadata", "name", to="Pharmacist"), "$.metadata.name: 'Pharmacist' does not match"),
    ],
)
def test_a_mistake_is_refused(change: Callable[[Document], None], fault: str) -> None:
    document = copy.deepcopy(_load("kuberay/rayjob.yaml"))
    change(document)
    assert fault in "\n".join(_faults(document))


@pytest.mark.parametrize("name", KUBERAY)
def test_kubernetes_would_take_the_pods(name: str) -> None:
    for template in _templates(_load(name)).values():
        _check_pod(template)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (_set("spec", "containers", 0, "imagePullPolice", to="Always"), "imagePullPolice"),
        (_set("spec", "containers", 0, "livenessProbe", "httpGet", "prot", to=1), "prot"),
        (_set("spec", "containers", 0, "env", 0, "value", to=1), "1 is not of type 'string'"),
        (_set("spec", "securityContext", "runAsUser", to="1000"), "'1000' is not of type 'integer'"),
    ],
)
def test_a_mistake_in_a_pod_is_refused(change: Callable[[Document], None], fault: str) -> None:
    template = copy.deepcopy(_templates(_load("kuberay/raycluster.yaml"))["worker group gpu"])
    change(template)
    with pytest.raises(kubernetes_validate.ValidationError, match=re.escape(fault)):
        _check_pod(template)


@pytest.mark.parametrize("name", ["kuberay/storage.yaml", "kuberay/networkpolicy.yaml", "kuberay/load.yaml"])
def test_kubernetes_would_take_the_rest(name: str) -> None:
    kubernetes_validate.validate(_load(name), KUBERNETES, strict=True)


def _variant(name: str) -> Document:
    """Return the job as kustomize would make it of a folder: the base's, with the folder's JSON patches."""
    base, folder = CLUSTER / "kuberay", CLUSTER / "variants" / name
    assert yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"] == ["../../kuberay"]
    assert not folder.is_relative_to(base), "kustomize takes that for a circle"
    for resource in yaml.safe_load((base / "kustomization.yaml").read_text())["resources"]:
        assert (base / resource).exists()
    document = copy.deepcopy(_load("kuberay/rayjob.yaml"))
    document = json.loads(json.dumps(document))  # YAML's anchors stand for one value in several places, which patches would share
    for patch in yaml.safe_load((folder / "kustomization.yaml").read_text())["patches"]:
        assert patch["target"] == {"kind": "RayJob"}
        document = jsonpatch.apply_patch(document, yaml.safe_load(patch["patch"]))
    return document


def test_kueue_would_take_the_autoscaler_as_the_variants_head_says() -> None:
    """The other way: the queue's label, and an annotation in the place of the other patches."""
    text = (CLUSTER / "variants" / "kueue" / "kustomization.yaml").read_text()
    (patch,) = yaml.safe_load(text)["patches"]
    (annotation,) = re.findall(r"^#   (\{op: .*\})$", text, re.MULTILINE)
    document = jsonpatch.apply_patch(
        _load("kuberay/rayjob.yaml"), [yaml.safe_load(patch["patch"])[0], yaml.safe_load(annotation)]
    )
    assert _faults(document) == []
    assert document["metadata"]["annotations"] == {"kueue.x-k8s.io/elastic-job": "true"}
    assert _spec(document)["enableInTreeAutoscaling"] is True


@pytest.mark.parametrize("name", ["kueue", "on-demand"])
def test_kustomize_itself_makes_what_is_checked_here(name: str) -> None:
    command = next(
        ([tool, *words] for tool, *words in (("kubectl", "kustomize"), ("kustomize", "build")) if shutil.which(tool)), []
    )
    if not command:
        pytest.skip("neither kubectl nor kustomize on this machine")
    built = subprocess.run([*command, str(CLUSTER / "variants" / name)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    documents = {document["kind"]: document for document in yaml.safe_load_all(built.stdout)}
    assert documents["RayJob"] == _variant(name)
    assert documents["PersistentVolumeClaim"] == _load("kuberay/storage.yaml")
    assert documents["NetworkPolicy"] == _load("kuberay/networkpolicy.yaml")


@pytest.mark.parametrize("name", ["kueue", "on-demand"])
def test_kuberay_would_take_the_variants(name: str) -> None:
    document = _variant(name)
    assert _faults(document) == []
    for template in _templates(document).values():
        _check_pod(template)


def test_kueue_gets_a_cluster_of_a_fixed_size_and_a_queue() -> None:
    document = _variant("kueue")
    assert document["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert document["spec"]["shutdownAfterJobFinishes"] is True
    spec = _spec(document)
    assert spec["enableInTreeAutoscaling"] is False
    assert "autoscalerOptions" not in spec
    (group,) = spec["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 2
    for template in (spec["headGroupSpec"]["template"], group["template"]):
        environment = {entry["name"]: entry.get("value") for entry in template["spec"]["containers"][0]["env"]}
        assert environment["PHARMACIST_AUTOSCALING"] == "0"


def test_the_variant_on_demand_asks_for_no_spot_machine() -> None:
    (group,) = _spec(_variant("on-demand"))["workerGroupSpecs"]
    assert "spot" not in json.dumps(group)
    assert "nvidia.com/gpu" in json.dumps(group["template"]["spec"]["tolerations"])


def test_no_pod_is_moved_to_save_a_node_and_a_job_ends_some_day() -> None:
    for name in KUBERAY:
        for where, template in _templates(_load(name)).items():
            assert template["metadata"]["annotations"] == {
                "karpenter.sh/do-not-disrupt": "true",
                "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
            }, where
    job = _load("kuberay/rayjob.yaml")["spec"]
    assert job["activeDeadlineSeconds"] > 86400
    assert job["submitterConfig"] == {"backoffLimit": 4}
    assert job["submitterPodTemplate"]["spec"]["nodeSelector"] == {"karpenter.sh/capacity-type": "on-demand"}


def test_what_is_loaded_lies_where_the_clusters_look() -> None:
    job = _load("kuberay/load.yaml")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert load_config(str(CLUSTER / "llama-3-8b.yaml")).model.path in container["args"][0]
    (token,) = [entry for entry in container["env"] if entry["name"] == "HF_TOKEN"]
    assert "secretKeyRef" in token["valueFrom"]
    claim = _load("kuberay/storage.yaml")["metadata"]["name"]
    assert job["spec"]["template"]["spec"]["volumes"] == [{"name": "cluster", "persistentVolumeClaim": {"claimName": claim}}]
    assert container["securityContext"]["allowPrivilegeEscalation"] is False


# A comment that is a field, and what of it stands in the lines below.
_FIELD = re.compile(
    r"^( *)# ( *(?:- )?\{?(?:imagePullSecrets|from|namespaceSelector|matchLabels|ports|protocol|name|valueFrom)\b.*)$"
)


def _with_comments(name: str) -> Document:
    """Return a manifest with what its comments offer."""
    text = (CLUSTER / name).read_text()
    document: Document = yaml.safe_load("\n".join(_FIELD.sub(r"\1\2", line) for line in text.splitlines()))
    return document


@pytest.mark.parametrize("name", KUBERAY)
def test_what_the_comments_offer_would_be_taken_as_well(name: str) -> None:
    """Pull secrets for every pod, and the keys of an object store."""
    document = _with_comments(name)
    assert _faults(document) == []
    for where, template in _templates(document).items():
        _check_pod(template)
        assert template["spec"]["imagePullSecrets"] == [{"name": "registry"}], where
    variables = {entry["name"] for entry in _templates(document)["head"]["spec"]["containers"][0]["env"]}
    assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= variables
    assert document != _load(name)


def test_prometheus_may_read_metrics_and_nothing_else_where_that_is_asked_for() -> None:
    policy = _with_comments("kuberay/networkpolicy.yaml")
    kubernetes_validate.validate(policy, KUBERNETES, strict=True)
    *others, prometheus = policy["spec"]["ingress"]
    assert others == _load("kuberay/networkpolicy.yaml")["spec"]["ingress"]
    assert prometheus["ports"] == [{"protocol": "TCP", "port": 8080}]
    assert prometheus["from"][0]["namespaceSelector"]["matchLabels"]


# --- by Ray's rules


def _check_launcher(config: Document) -> None:
    validate_config(prepare_config(copy.deepcopy(config)))


def test_rays_launcher_would_take_it() -> None:
    _check_launcher(_load("launcher/aws.yaml"))


@pytest.mark.parametrize(
    "change",
    [
        _set("idle_timeout_minuts", to=5),
        _set("max_workers", to="2"),
        _set("head_node_type", to="leader"),
        _set("docker", "img", to="x"),
        _set("available_node_types", "gpu", "spot", to=True),
    ],
)
def test_a_mistake_in_the_launcher_is_refused(change: Callable[[Document], None]) -> None:
    config = _load("launcher/aws.yaml")
    change(config)
    with pytest.raises((jsonschema.ValidationError, ValueError, AssertionError)):
        _check_launcher(config)


def test_the_launchers_head_stays_and_its_workers_are_spot() -> None:
    config = _load("launcher/aws.yaml")
    types = config["available_node_types"]
    assert "InstanceMarketOptions" not in types[config["head_node_type"]]["node_config"]
    assert types["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]


def test_the_launcher_mounts_the_token_where_the_images_user_looks_for_it() -> None:
    """What Ray's launcher runs on a machine: it knows the home folder from the image's own HOME alone, else takes root's."""
    home = next(line.partition("=")[2] for line in chain.from_iterable(_stages().values()) if line.startswith("ENV HOME="))
    config = _load("launcher/aws.yaml")
    docker = config["docker"]
    command = docker_start_cmds(
        "ubuntu", docker["image"], config["file_mounts"], docker["container_name"], docker["run_options"], "c", home, "docker"
    )
    assert re.search(r"-v \S+/~/\.ray:/home/ray/\.ray ", command)
    assert "useradd --uid 1000 --gid 1000 --create-home --shell /bin/bash ray" in " ".join(_stages()["base"])
    made, given = config["initialization_commands"][-2:]
    assert "mount -t nfs4" in made
    assert given.startswith("sudo install -d -o 1000 -g 1000 /mnt/cluster/runs ")


# --- by ours


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_have_no_more_rights_than_they_need(name: str) -> None:
    """What the `restricted` Pod Security Standard asks for, so that a namespace may enforce it."""
    document = _load(name)
    contexts = [_spec(document)["autoscalerOptions"]["securityContext"]]
    for where, template in _templates(document).items():
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True, where
        assert pod["securityContext"]["runAsUser"] == 1000, where
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod), where
        assert {kind for volume in pod.get("volumes", []) for kind in set(volume) - {"name"}} <= {
            "persistentVolumeClaim", "emptyDir",
        }  # fmt: skip
        # The autoscaler runs in the head's pod and asks the Kubernetes API for others.
        assert pod.get("automountServiceAccountToken", True) is (where == "head"), where
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            contexts.append(container["securityContext"])
            for kind in ("requests", "limits"):
                assert {"cpu", "memory"} <= set(container["resources"][kind]), (where, kind)
    assert contexts == [
        {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
        }
    ] * len(contexts)


@pytest.mark.parametrize("name", KUBERAY)
def test_work_stays_off_the_head_and_every_cluster_asks_for_a_token(name: str) -> None:
    spec = _spec(_load(name))
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert spec["enableInTreeAutoscaling"] is True
    (group,) = spec["workerGroupSpecs"]
    assert group["minReplicas"] == 0
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    for template in (spec["headGroupSpec"]["template"], group["template"]):
        (container,) = template["spec"]["containers"]
        environment = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert environment["PHARMACIST_AUTOSCALING"] == "1"
        assert int(environment["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"]) >= 600  # a node with GPUs takes minutes to come
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        claim = _load("kuberay/storage.yaml")
        assert volumes[mounts["/mnt/cluster"]]["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_job_has_the_cluster_that_stays() -> None:
    assert _spec(_load("kuberay/rayjob.yaml")) == _spec(_load("kuberay/raycluster.yaml"))


def test_the_network_policy_lets_the_submitter_in() -> None:
    policy = json.dumps(_load("kuberay/networkpolicy.yaml"))
    assert json.dumps({"app.kubernetes.io/component": "kuberay-operator"}) in policy  # however the operator was installed
    labels = _templates(_load("kuberay/rayjob.yaml"))["submitter"]["metadata"]["labels"]
    assert json.dumps({"pharmacist-ray/role": labels["pharmacist-ray/role"]}) in policy


def test_image_and_ray_are_the_same_everywhere() -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)  # type: ignore[union-attr]
    image = f"registry.example.com/pharmacist-ray:{version}-ray{RAY}"
    for name in KUBERAY:
        document = _load(name)
        assert _spec(document)["rayVersion"] == RAY
        for template in _templates(document).values():
            assert [container["image"] for container in template["spec"]["containers"]] == [image]
    assert _load("launcher/aws.yaml")["docker"]["image"] == f"{image}-launcher"
    # Nothing else names another one, in a comment or in the text.
    for path in [*CLUSTER.rglob("*.y*ml"), CLUSTER / "Dockerfile", CLUSTER / "README.md"]:
        assert {found.removesuffix("-launcher") for found in re.findall(r"registry\.example\.com\S+", path.read_text())} <= {
            image
        }


def test_the_job_runs_an_entry_point_and_a_configuration_that_the_image_has() -> None:
    document = _load("kuberay/rayjob.yaml")
    python, option, module, flag, config, *overrides = shlex.split(document["spec"]["entrypoint"])
    assert (python, option, flag) == ("python", "-m", "--config")
    assert (ROOT / f"{module.replace('.', '/')}.py").exists()
    # The Dockerfile puts cluster/*.yaml into /app/cluster.
    path = CLUSTER / Path(config).relative_to("/app/cluster")
    assert path.exists()
    assert path.parent == CLUSTER
    settings = load_config(str(path), overrides)
    assert str(settings.run_dir).startswith("/mnt/cluster/")

    (group,) = _spec(document)["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    resources = settings.resources
    per_pod = min(int(limits["nvidia.com/gpu"]) // resources.gpus_per_worker, int(limits["cpu"]) // resources.cpus_per_worker)
    for wanted in (resources.workers * resources.parallel_runs, resources.actors):
        assert wanted <= per_pod * group["maxReplicas"]
    # Readers and Ray's own tasks need room beside the workers.
    assert int(limits["cpu"]) - per_pod * resources.cpus_per_worker >= 2


@pytest.mark.parametrize("path", sorted(CLUSTER.glob("*.yaml")), ids=lambda path: path.name)
def test_every_configuration_is_one(path: Path) -> None:
    assert load_config(str(path)).run_dir.is_absolute()


def test_eight_billion_fit_the_gpus_that_are_promised(tmp_path: Path) -> None:
    LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336,
        vocab_size=128256, tie_word_embeddings=False,
    ).save_pretrained(tmp_path)  # fmt: skip
    config = load_config(str(CLUSTER / "llama-3-8b.yaml"), [f"model.path={tmp_path}"])
    shape = shape_of(config.model)
    assert config.selector.reference is not None
    for train in (config.selector.warmup, config.selector.reference, config.alignment.train):
        assert total(memory(shape, setup_of(config, train, config.alignment.objective))) < 40e9


# --- the image


def _stages() -> dict[str, list[str]]:
    """Return the Dockerfile's instructions by stage."""
    text = re.sub(r"^#.*\n", "", (CLUSTER / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    stages: dict[str, list[str]] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("FROM "):
            stages[line.split(" AS ")[1]] = current = []
        current.append(line)
    return stages


def test_the_image_installs_what_was_tested_and_is_nobodys_root() -> None:
    stages = _stages()
    assert list(stages)[-1] == "runtime"  # what is built if no target is named
    for name in ("base", "launcher", "runtime"):
        assert stages[name][-1] == "USER 1000:1000", name
    for line in chain.from_iterable(stages.values()):
        assert not re.search(r"\.venv|--editable|runs/|(TOKEN|SECRET|PASSWORD|_KEY)=", line), line
        for command in re.findall(r"pip install [^&]*", line):
            assert "--constraint constraints.txt" in command, command
            # Another build of torch comes from an index beside the default one, which has all the rest.
            assert "--index-url" not in command, command
    torch = re.search(r"^torch==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE).group(1)  # type: ignore[union-attr]
    text = (CLUSTER / "Dockerfile").read_text()
    assert set(re.findall(r"torch==([\d.]+)\+", text)) == {torch}
    assert "version 580 or newer" in text
    assert "version 580 or newer" in (CLUSTER / "README.md").read_text()
    for base in (stages["wheel"][0], stages["base"][0]):
        assert re.match(r"FROM python:3\.11\.\d+-slim-\w+ AS ", base), base


def test_only_what_is_copied_goes_to_the_builder() -> None:
    first, *rest = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert first == "*"
    given = {line[1:] for line in rest if line.startswith("!")}
    copies = [line.split() for line in chain.from_iterable(_stages().values()) if line.startswith("COPY ")]
    copied = {source for words in copies for source in words[1:-1]}
    assert given == copied
    for name in given:
        assert list(ROOT.glob(name)), name


# --- the text


def test_the_text_names_files_that_exist_and_says_of_each_where_it_is() -> None:
    text = (CLUSTER / "README.md").read_text()
    named = {name for name in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in name}
    for name in named:
        assert (CLUSTER / name).exists(), name
    ours = {str(path.relative_to(CLUSTER)) for path in CLUSTER.rglob("*") if path.is_file()} - {"README.md"}
    assert ours <= named


@pytest.mark.parametrize("path", [path for path in CLUSTER.rglob("*") if path.is_file()], ids=lambda path: path.name)
def test_no_secret_is_written_down(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"AKIA[0-9A-Z]{16}|-----BEGIN|kind: Secret|stringData", text)
    assert not re.search(r"(?:AUTH_TOKEN|SECRET_ACCESS_KEY|PASSWORD)[\"']?[:=] *[\"']?[\w/+]{8,}", text)
