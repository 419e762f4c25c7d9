"""Cluster files against what will read them, and against our rules: each rule has a file that breaks it."""

import contextlib
import gzip
import hashlib
import io
import os
import shutil
import subprocess
import time
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from raymuse.cli.app import main
from raymuse.clusters.check import check
from raymuse.clusters.kustomize import build
from raymuse.clusters.pins import image_problems, install_problems
from raymuse.clusters.placement import ROLE
from raymuse.clusters.pods import cluster_of
from raymuse.clusters.schemas import RAY_KINDS
from raymuse.config.errors import UserError

ROOT = Path(__file__).parents[1]
AWS, GCP, ONPREM = (ROOT / "cluster" / f"{name}.yaml" for name in ("aws", "gcp", "onprem"))
KUBERAY = ROOT / "cluster" / "kuberay"
CLUSTER = KUBERAY / "base" / "raycluster.yaml"
FOLDERS = sorted(path.parent for path in KUBERAY.rglob("kustomization.yaml"))
FILES = sorted(path for path in (ROOT / "cluster").rglob("*.yaml") if path.name != "kustomization.yaml")


def changed(source: Path, folder: Path, *replacements: tuple[str, str]) -> Path:
    text = source.read_text()
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    (folder / "constraints.txt").write_text((ROOT / "constraints.txt").read_text())
    path = folder / "changed.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", [*FILES, *FOLDERS], ids=lambda path: str(path.relative_to(ROOT)))
def test_our_cluster_files_are_right(path: Path) -> None:
    assert check(path) == []


def test_a_launcher_file_is_told_all_its_errors(tmp_path: Path) -> None:
    path = changed(AWS, tmp_path, ("max_workers: 16", "max_worker: 16"), ("ssh_user: ubuntu", "ssh_user: 3"))
    assert check(path) == [
        "auth.ssh_user: 3 is not of type 'string'",
        "available_node_types.decoders.max_worker: no such key; did you mean max_workers?",
        "available_node_types.decoders: has no max_workers: say how many machines it may cost",
    ]


def test_rays_own_rules_are_asked_too(tmp_path: Path) -> None:
    problem, *_ = check(changed(AWS, tmp_path, ("head_node_type: head", "head_node_type: hed")))
    assert "must be one of `available_node_types`" in problem
    many = ("min_workers: 0\n    max_workers: 16", "min_workers: 99\n    max_workers: 16")
    (problem,) = check(changed(AWS, tmp_path, many))
    assert "smaller than the sum of `min_workers`" in problem


LAUNCHER_RULES = [
    (AWS, "max_workers: 26", "max_workers: 20", "is 20, and the groups' add up to 26 (decoders 16 + trainers 2"),
    (ONPREM, "10.0.0.12]", "10.0.0.12, 10.0.0.13]", "provider.worker_ips names 3 machines: make them equal"),
    (
        AWS,
        "ray:2.60.0-py311\n  container",
        "ray:latest\n  container",
        "docker.image: rayproject/ray:latest: the tag latest",
    ),
    (AWS, "ray:2.60.0-py311\n  container", "ray\n  container", "has no tag, which means latest; pin a version"),
    (AWS, "ray:2.60.0-py311-gpu", "ray:2.59.0-py311-gpu", "has Ray 2.59.0, and constraints.txt pins 2.60.0"),
    (AWS, "ray:2.60.0-py311-gpu", "ray:2.60.0-gpu", "say the Python too, such as 2.60.0-py311"),
    (AWS, "-c /home/ray/raymuse/constraints.txt boto3", "boto3", "`pip install --no-cache-dir boto3` is not held to"),
    (AWS, "export RAY_AUTH_MODE=token ", "export ", "head_start_ray_commands: Ray would let everyone in: export"),
    (AWS, "export RAY_AUTH_MODE=token ", "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=a ", "which all users can read"),
    (AWS, "  /home/ray/.ray/auth_token: ~/.ray/auth_token\n", "", "file_mounts: the token must reach every machine"),
    (ONPREM, "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "the dashboard would listen on 0.0.0.0"),
    (AWS, "    - --ulimit nofile=65536:65536\n", "    - -p 8265:8265\n", "docker: `-p 8265:8265` opens the container"),
    (AWS, "raymuse/role: cpu,", "raymuse/role: decoder,", "raymuse/role must be one of head, cpu, trainer"),
    (AWS, "raymuse/role: cpu,", "raymuse/role: head,", "the head, and it alone, has the role head"),
    (
        AWS,
        "raymuse/role: cpu,",
        "raymuse/role: trainer,",
        "no group has the role cpu or all (raymuse/role): decoding would wait",
    ),
    (GCP, "resources: {CPU: 16, GPU: 1}", "resources: {CPU: 16}", "has the role generator and no GPU in `resources`"),
    (
        GCP,
        "resources: {CPU: 16}",
        "resources: {CPU: 16, GPU: 1}",
        "has the role cpu and 1 GPUs, which no stage would use",
    ),
    (AWS, " RAY_enable_autoscaler_v2=1", "", "labels need Ray's second autoscaler"),
    (AWS, "--labels=raymuse/role=head,", "--labels=", "the head must say its role itself"),
    (ONPREM, " RAY_enable_autoscaler_v2=0", "", "never starts the workers of provider.type local: export"),
]


@pytest.mark.parametrize(
    ("source", "old", "new", "said"), LAUNCHER_RULES, ids=[rule[3][:40] for rule in LAUNCHER_RULES]
)
def test_a_rule_of_ours_for_the_launcher(source: Path, old: str, new: str, said: str, tmp_path: Path) -> None:
    assert any(said in problem for problem in check(changed(source, tmp_path, (old, new))))


@pytest.mark.parametrize(
    ("protocol", "first", "last", "said"),
    [
        ("tcp", 8265, 8265, "opens port 8265 to the world"),
        ("tcp", 22, 65535, "opens ports 22 to 65535 to the world"),
        ("-1", None, None, "opens all ports to the world"),
        ("tcp", 22, 22, None),
    ],
)
def test_the_world_may_not_come_in(protocol: str, first: Any, last: Any, said: str | None, tmp_path: Path) -> None:
    rule = {"FromPort": first, "ToPort": last, "IpProtocol": protocol, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}
    config = yaml.safe_load(AWS.read_text())
    config["provider"]["security_group"] = {"GroupName": "open", "IpPermissions": [rule]}
    path = tmp_path / "open.yaml"
    path.write_text(yaml.safe_dump(config))
    (tmp_path / "constraints.txt").write_text((ROOT / "constraints.txt").read_text())
    found = [problem for problem in check(path) if "to the world" in problem]
    assert [said in problem for problem in found] == ([True] if said else [])


def test_a_kuberay_file_is_told_all_its_errors(tmp_path: Path) -> None:
    path = changed(CLUSTER, tmp_path, ("mode: token", "mode: tokn"), ("maxReplicas: 8", "maxReplica: 8"))
    found = check(path)
    assert "RayCluster raymuse: spec.authOptions.mode: 'tokn' is not one of ['disabled', 'token']" in found
    assert "RayCluster raymuse: spec.workerGroupSpecs.2.maxReplica: no such key; did you mean maxReplicas?" in found
    assert "RayCluster raymuse: spec.authOptions: Ray would let everyone in: mode: token" in found


BASE, TRAIN, SERVE = KUBERAY / "base", KUBERAY / "train" / "rayjob.yaml", KUBERAY / "serve" / "rayservice.yaml"
OVERRIDES = "containers.0.securityContext: overrides the pod's, and may run as root"
KUBERNETES_RULES = [
    (CLUSTER, "mode: token", "mode: disabled", "spec.authOptions: Ray would let everyone in: mode: token"),
    (CLUSTER, 'rayVersion: "2.60.0"', 'rayVersion: "2.50.0"', "is 2.50.0, and constraints.txt pins ray 2.60.0"),
    (CLUSTER, "version: v2", "version: v1", "autoscalerOptions.version: must be v2"),
    (
        CLUSTER,
        "raymuse:0.1.0-gpu",
        "raymuse:latest",
        "workerGroupSpecs.1.template.spec.containers.0.image: raymuse:latest",
    ),
    (CLUSTER, "raymuse:0.1.0-gpu", "registry:5000/raymuse", "has no tag, which means latest"),
    (CLUSTER, "{raymuse/role: head}", "{raymuse/role: cpu}", "which count only where the head says raymuse/role: head"),
    (CLUSTER, "{raymuse/role: trainer}", "{raymuse/role: training}", "must be one of cpu, trainer, generator, all"),
    (CLUSTER, "{raymuse/role: trainer}", "{a: b}", "has no label raymuse/role: no stage would run there"),
    (CLUSTER, ', nvidia.com/gpu: "4"', "", "has the role trainer and no limit of nvidia.com/gpu"),
    (
        CLUSTER,
        'limits: {cpu: "44", memory: 320Gi, nvidia.com/gpu: "4"}',
        "limits: {cpu: 44, memory: 1Gi}",
        "requests 4 GPUs",
    ),
    (CLUSTER, 'limits: {cpu: "14", memory: 28Gi}', 'limits: {cpu: "14"}', "says no request and limit of memory"),
    (CLUSTER, "minReplicas: 0\n      maxReplicas: 2", "minReplicas: 3\n      maxReplicas: 2", "minReplicas 3 is above"),
    (CLUSTER, "  headGroupSpec:\n", "  headGroupSpec:\n    enableIngress: true\n", "opens the head to the outside"),
    (CLUSTER, "runAsNonRoot: true", "runAsNonRoot: false", "pods may run as root"),
    (CLUSTER, "allowPrivilegeEscalation: false", "privileged: true", "a process may gain rights"),
    (
        CLUSTER,
        "allowPrivilegeEscalation: false",
        "allowPrivilegeEscalation: false\n              runAsUser: 0",
        OVERRIDES,
    ),
    (
        CLUSTER,
        "allowPrivilegeEscalation: false",
        "allowPrivilegeEscalation: false\n              runAsNonRoot: false",
        OVERRIDES,
    ),
    (CLUSTER, "runAsUser: 1000", "runAsUser: 0", "runAsUser: 0 is root"),
    (
        CLUSTER,
        "        containers:\n          - name: ray-head",
        "        initContainers: [{name: first, image: 'busybox:1', securityContext: {privileged: true}}]\n"
        "        containers:\n          - name: ray-head",
        "headGroupSpec.template.spec.initContainers.0.securityContext: a process may gain rights",
    ),
    *(
        (CLUSTER, "        automount", f"        {key}: true\n        automount", f"machine's own {what}")
        for key, what in (("hostNetwork", "addresses"), ("hostPID", "processes"), ("hostIPC", "shared memory"))
    ),
    (CLUSTER, "persistentVolumeClaim: {claimName: raymuse-shared}", "hostPath: {path: /}", "hostPath gives pods"),
    (
        CLUSTER,
        "  headGroupSpec:\n",
        "  headGroupSpec:\n    headService: {spec: {type: LoadBalancer}}\n",
        "spec.headGroupSpec.headService.spec.type: LoadBalancer opens it to the outside",
    ),
    (
        SERVE,
        "spec:\n  serviceUn",
        "spec:\n  serveService: {spec: {type: NodePort}}\n  serviceUn",
        "spec.serveService.spec.type: NodePort opens it to the outside",
    ),
    (
        TRAIN,
        "spec:\n  entrypoint",
        "spec:\n  submitterPodTemplate: {spec: {containers: [{name: s, image: 'raymuse:0.1.0'}]}}\n  entrypoint",
        "spec.submitterPodTemplate.spec.securityContext: pods may run as root",
    ),
    (CLUSTER, "containerPort: 8265}", "containerPort: 8265, hostPort: 8265}", "8265 would be open on the machine"),
    (CLUSTER, 'RAY_USAGE_STATS_ENABLED, value: "0"', "MY_TOKEN, value: abc", "MY_TOKEN stands in the file"),
    (TRAIN, "shutdownAfterJobFinishes: true", "shutdownAfterJobFinishes: false", "the machines would stay"),
    (TRAIN, "entrypoint:", "entrypont:", "spec.entrypont: no such key; did you mean entrypoint?"),
    (SERVE, "replicas: 1\n", "replicas: none\n", "spec.serveConfigV2: raymuse: replicas: "),
    (
        SERVE,
        "/mnt/raymuse/model\n",
        "/mnt/raymuse/a b\n",
        "raymuse: /mnt/raymuse/a b: 'a b' is no name that clients can",
    ),
    (SERVE, "import_path:", "import_pth:", "spec.serveConfigV2: applications.0.import_path: Field required"),
    (
        BASE / "redis.yaml",
        "    - {name: redis, port: 6379",
        "    - {name: redis, prt: 6379",
        "ports.0.prt: no such key; did you mean port?",
    ),
    (BASE / "redis.yaml", "spec:\n  selector", "spec:\n  type: LoadBalancer\n  selector", "opens it to the outside"),
    (
        BASE / "redis.yaml",
        "runAsNonRoot: true",
        "runAsNonRot: true",
        "runAsNonRot: no such key; did you mean runAsNonRoot?",
    ),
    (BASE / "network.yaml", "policyTypes: [Ingress]", "policyTypes: [Egress]", "the rules of ingress would not count"),
    (
        BASE / "network.yaml",
        "podSelector:\n    match",
        "podSelectr:\n    match",
        "podSelectr: no such key; did you mean podSelector?",
    ),
    (BASE / "storage.yaml", "storage: 1Ti", "storage: much", "'much' does not match"),
    (BASE / "account.yaml", "kind: ServiceAccount", "kind: RayClusters\nspec: {}", None),
]


@pytest.mark.parametrize(
    ("source", "old", "new", "said"), KUBERNETES_RULES, ids=[str(rule[3])[:40] for rule in KUBERNETES_RULES]
)
def test_a_rule_of_ours_for_kubernetes(source: Path, old: str, new: str, said: str | None, tmp_path: Path) -> None:
    found = check(changed(source, tmp_path, (old, new)))
    assert any(said in problem for problem in found) if said else found == []  # a kind that nothing is known of


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"kind": "Secret", "data": {"key": "YQ=="}}, "holds its value in the file"),
        ({"kind": "NetworkPolicy", "spec": {"podSelector": {}, "ingress": [{}]}}, "has no `from`, so that everyone"),
        ({"kind": "NetworkPolicy", "spec": {"podSelector": {}, "egress": [{}]}}, "rules of egress would not count"),
        (
            {
                "kind": "NetworkPolicy",
                "spec": {"podSelector": {}, "ingress": [{"from": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}]},
            },
            "lets the whole world in",
        ),
        (
            {"kind": "NetworkPolicy", "spec": {"podSelector": {}, "ingress": [{"from": [{"namespaceSelector": {}}]}]}},
            "lets every pod of every namespace in",
        ),
        (
            {
                "kind": "NetworkPolicy",
                "spec": {
                    "podSelector": {},
                    "ingress": [{"from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {}}}]}],
                },
            },
            "lets every pod of every namespace in",
        ),
        ({"kind": "RayClutser", "apiVersion": "ray.io/v1"}, "no such kind; did you mean RayCluster?"),
        ({"kind": "RayCluster", "apiVersion": "ray.io/v9"}, "apiVersion must be ray.io/v1, was ray.io/v9"),
        ({"kind": "Service", "apiVersion": "v2"}, "'v1' was expected"),
        ({"apiVersion": "v1"}, "a document has no kind"),
    ],
)
def test_a_document_of_ones_own(document: dict[str, Any], said: str, tmp_path: Path) -> None:
    policy = document.get("kind") == "NetworkPolicy"
    whole = {"apiVersion": "networking.k8s.io/v1" if policy else "v1", "metadata": {"name": "x"}, **document}
    path = tmp_path / "it.yaml"
    path.write_text(yaml.safe_dump(whole))
    assert any(said in problem for problem in check(path))


@pytest.mark.parametrize(
    ("text", "said"),
    [("a: 1", "is no cluster file"), ("a: [", "is not YAML"), ("", "is no cluster file"), ("- 1", "is no cluster")],
)
def test_what_is_no_cluster_file(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "it.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        check(path)
    with pytest.raises(UserError, match="cannot read"):
        check(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="is no kustomize folder"):
        check(tmp_path)


def test_the_definitions_are_the_operators_own() -> None:
    """What is shipped is whole and unchanged: the sums in its README are those of KubeRay's own files."""
    folder = resources.files("raymuse") / "clusters" / "crds"
    said = (folder / "README.md").read_text()
    for plural in RAY_KINDS.values():
        assert hashlib.sha256(gzip.decompress((folder / f"{plural}.yaml.gz").read_bytes())).hexdigest() in said
    assert sum(len((folder / f"{plural}.yaml.gz").read_bytes()) for plural in RAY_KINDS.values()) < 150_000


# --- kustomize


@pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl to compare with")
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(KUBERAY)))
def test_folders_are_built_as_kubectl_builds_them(folder: Path) -> None:
    made = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60, check=True)
    assert in_order(yaml.safe_load_all(made.stdout)) == in_order(build(folder))


def in_order(documents: Any) -> list[dict[str, Any]]:
    return sorted(documents, key=lambda document: (document["kind"], document["metadata"]["name"]))


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    """A folder with a config map and a policy, to be patched."""
    (tmp_path / "map.yaml").write_text(
        "{apiVersion: v1, kind: ConfigMap, metadata: {name: m}, data: {a/b: x, list: y}}"
    )
    return tmp_path


def kustomization(folder: Path, **fields: Any) -> Path:
    path = folder / "kustomization.yaml"
    path.write_text(yaml.safe_dump({"kind": "Kustomization", "resources": ["map.yaml"], **fields}))
    return path


def patches(*operations: dict[str, Any], name: str = "m") -> list[dict[str, Any]]:
    return [{"target": {"kind": "ConfigMap", "name": name}, "patch": yaml.safe_dump(list(operations))}]


def test_patches_change_what_they_name(overlay: Path) -> None:
    kustomization(
        overlay,
        namespace="n",
        patches=patches(
            {"op": "test", "path": "/data/list", "value": "y"},
            {"op": "replace", "path": "/data/a~1b", "value": "z"},
            {"op": "remove", "path": "/data/list"},
            {"op": "add", "path": "/metadata/labels", "value": {"c": "d"}},
        ),
    )
    (document,) = build(overlay)
    assert document["data"] == {"a/b": "z"}
    assert document["metadata"] == {"name": "m", "namespace": "n", "labels": {"c": "d"}}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"configMapGenerator": []},
            "configMapGenerator: only apiVersion, images, kind, namespace, patches, resources",
        ),
        ({"kind": "Component"}, "kind: Component: only"),
        ({"resources": ["none.yaml"]}, "resources: there is no"),
        ({"patches": patches({"op": "remove", "path": "/data/c"})}, "cannot .* there is no /data/c"),
        ({"patches": patches({"op": "test", "path": "/data/list", "value": "n"})}, "test does not hold"),
        ({"patches": patches(name="other")}, "there is no ConfigMap other to patch"),
        ({"patches": [{"patch": "a: b"}]}, "each needs a `target`"),
        ({"patches": [{"target": {"kind": "ConfigMap"}, "patch": "a: b"}]}, "must be a list of operations"),
    ],
)
def test_what_cannot_be_built_is_said(fields: dict[str, Any], said: str, overlay: Path) -> None:
    kustomization(overlay, **fields)
    with pytest.raises(UserError, match=said):
        check(overlay)


def test_an_overlay_is_judged_as_a_whole(tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "base")
    (tmp_path / "constraints.txt").write_text((ROOT / "constraints.txt").read_text())
    path = tmp_path / "base" / "kustomization.yaml"
    path.write_text(path.read_text().replace("  - network.yaml\n", "").replace("  - storage.yaml\n", ""))
    assert check(path) == [
        "RayCluster raymuse: no NetworkPolicy selects pods of Ray (ray.io/is-ray-node): add one",
        "RayCluster raymuse: asks for the PersistentVolumeClaim raymuse-shared, which is not among the resources: "
        "add it",
    ]


def test_a_policy_that_closes_the_way_out_alone_guards_nothing(tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "base")
    (tmp_path / "constraints.txt").write_text((ROOT / "constraints.txt").read_text())
    (tmp_path / "base" / "network.yaml").write_text(
        "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: out},"
        " spec: {podSelector: {}, policyTypes: [Egress]}}"
    )
    found = check(tmp_path / "base")
    assert found == ["RayCluster raymuse: no NetworkPolicy selects pods of Ray (ray.io/is-ray-node): add one"]


# --- what the files say to one another


def test_the_files_place_stages_alike() -> None:
    """Every cluster has decoders, trainers and generators, from none up, with the same roles and a head apart."""
    for path in (AWS, GCP):
        types = yaml.safe_load(path.read_text())["available_node_types"]
        assert {name: group["labels"][ROLE] for name, group in types.items()} == {
            "head": "head",
            "decoders": "cpu",
            "trainers": "trainer",
            "generators": "generator",
        }
        assert types["head"]["resources"] == {"CPU": 0}
        assert all(group["min_workers"] == 0 for name, group in types.items() if name != "head")
    for folder in (BASE, KUBERAY / "overlays" / "eks", KUBERAY / "overlays" / "gke"):
        (cluster,) = (document for document in build(folder) if document["kind"] == "RayCluster")
        roles = {group["groupName"]: group["labels"][ROLE] for group in cluster["spec"]["workerGroupSpecs"]}
        assert roles == {"decoders": "cpu", "trainers": "trainer", "generators": "generator"}
        assert all(group["minReplicas"] == 0 for group in cluster["spec"]["workerGroupSpecs"])


def test_prometheus_reaches_the_metrics_of_pods() -> None:
    """A namespace or pod with the label gets to Ray's exporter, and of the API to its own."""
    asked = {"matchLabels": {"raymuse/monitoring": "yes"}}
    for folder, port in ((BASE, 8080), (KUBERAY / "serve", 8000)):
        policies = [document["spec"] for document in build(folder) if document["kind"] == "NetworkPolicy"]
        open_to = [
            [peer for peer in rule["from"] if asked in peer.values()]
            for policy in policies
            for rule in policy["ingress"]
            if policy["podSelector"] == {"matchLabels": {"ray.io/is-ray-node": "yes"}}
            and port in [given["port"] for given in rule.get("ports", [])]
        ]
        assert [{"namespaceSelector": asked}, {"podSelector": asked}] in open_to


@pytest.mark.parametrize("cloud", ["eks", "gke"])
def test_an_autoscaler_finds_a_machine_for_every_group(cloud: str) -> None:
    """Groups that grow from none ask by what a machine to come is known by: no label that is set once it is there."""
    selectors: dict[str, dict[str, Any]] = {}
    for folder in (path for path in FOLDERS if f"overlays/{cloud}" in str(path)):
        for document in build(folder):
            assert document["metadata"]["namespace"] == "raymuse"
            for group in cluster_of(document).get("workerGroupSpecs", []):
                selector = group["template"]["spec"]["nodeSelector"]
                assert "nvidia.com/gpu.present" not in selector
                assert selectors.setdefault(group["groupName"], selector) == selector
    which = {"eks": "node.kubernetes.io/instance-type", "gke": "cloud.google.com/gke-accelerator"}[cloud]
    assert [name for name, selector in selectors.items() if which in selector] == ["trainers", "generators"]


@pytest.mark.parametrize("folder", ["train", "batch"])
def test_the_recipes_in_jobs_are_recipes(folder: str, tmp_path: Path) -> None:
    from raymuse.config.load import load

    config, job = build(KUBERAY / folder)
    assert job["spec"]["entrypoint"].endswith(" /recipe/recipe.yaml")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config["data"]["recipe.yaml"])
    load(str(recipe), stage={"train": ["train-base"], "batch": ["generate"]}[folder])


# --- the commands


def said_by(*words: str) -> tuple[int, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main(["cluster", *words])
    return code, out.getvalue()


def test_check_takes_several_files_and_tells_all(tmp_path: Path) -> None:
    bad = changed(AWS, tmp_path, ("max_workers: 26", "max_workers: 20"), ("RAY_AUTH_MODE=token", "A=b"))
    other = tmp_path / "other.yaml"
    other.write_text("{apiVersion: v1, kind: ConfigMap, metadata: {name: c}}\n---\n{apiVersion: a/v1, kind: Odd}")
    code, out = said_by("check", str(ONPREM), str(bad), str(other))
    assert code == 2
    assert f"OK: {ONPREM}" in out
    assert f"OK: {other}" in out
    assert f"{other}: Odd is not checked" in out
    assert "3 files: 3 problems" in out
    assert out.count(str(bad)) == 3


# --- the image


def test_the_image_is_pinned_and_not_root() -> None:
    lines = [line for line in (ROOT / "cluster" / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines)
    (base,) = (line.partition("=")[2] for line in lines if line.startswith("ARG BASE="))
    assert list(image_problems("base", base, ROOT / "cluster" / "Dockerfile")) == []
    assert list(install_problems("image", text.replace("\\\n", " "))) == []
    users = [line.partition(" ")[2] for line in lines if line.startswith("USER")]
    assert users
    assert not {"0", "root"} & set(users)
    assert not any(word in text for word in ("sudo", "curl", "wget", "ADD ", "latest", "--trusted-host"))
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[2:-1]}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[0] == "*"  # nothing but what is named: no token and no .git reaches the image
    assert copied == {line[1:] for line in ignored if line.startswith("!")}


# --- what the files start


def exported(folder: Path, head: str | None) -> dict[str, str]:
    """What cluster/mlflow.sh tells a machine of a cluster whose token lies in `folder`."""
    show = f". {ROOT}/cluster/mlflow.sh; env"
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), **({"RAY_HEAD_IP": head} if head else {})}
    done = subprocess.run(
        ["bash", "-euc", show], env=environment, capture_output=True, text=True, timeout=20, check=True
    )
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if line.startswith("MLFLOW_"))


def test_every_machine_derives_the_same_password_for_mlflow(tmp_path: Path) -> None:
    machines = []
    for name, token in (("a", "secret"), ("b", "secret\n"), ("c", "other")):
        (tmp_path / name / ".ray").mkdir(parents=True)
        (tmp_path / name / ".ray" / "auth_token").write_text(token)
        machines.append(exported(tmp_path / name, "10.0.0.10"))
    assert machines[0] == machines[1]
    assert machines[0]["MLFLOW_TRACKING_URI"] == "http://10.0.0.10:5000"
    password = machines[0]["MLFLOW_TRACKING_PASSWORD"]
    assert len(password) == 40
    assert password != machines[2]["MLFLOW_TRACKING_PASSWORD"]
    assert "secret" not in str(machines)


SERVER = """#!/bin/sh
echo "$$ $MLFLOW_AUTH_ADMIN_PASSWORD $MLFLOW_BACKEND_STORE_URI" >> "$HOME/started"
trap 'echo "$$" >> "$HOME/ended"; exit 0' TERM
while :; do sleep 0.1; done
"""


def test_a_new_token_or_setting_gets_a_new_server_for_mlflow(tmp_path: Path) -> None:
    """The script with a program in MLflow's place that notes how it is started, and when it is ended."""
    for folder in ("bin", ".ray", "mlflow"):
        (tmp_path / folder).mkdir()
    (tmp_path / "bin" / "mlflow").write_text(SERVER)
    (tmp_path / "bin" / "mlflow").chmod(0o755)
    token, settings = tmp_path / ".ray" / "auth_token", tmp_path / "mlflow" / "server.env"
    environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "HOME": str(tmp_path), "RAY_HEAD_IP": "10.0.0.10"}

    def noted(name: str) -> list[list[str]]:
        path = tmp_path / name
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def serve(text: str) -> None:
        token.write_text(text)
        subprocess.run(["bash", "-euc", f". {ROOT}/cluster/mlflow.sh serve"], env=environment, timeout=20, check=True)

    def until(started: int, ended: int) -> None:
        deadline = time.monotonic() + 15
        while (len(noted("started")), len(noted("ended"))) != (started, ended):
            assert time.monotonic() < deadline, (noted("started"), noted("ended"))
            time.sleep(0.05)

    try:
        serve("first")
        until(1, 0)
        serve("first")
        serve("second")
        until(2, 1)  # the same once more has changed nothing
        settings.write_text("MLFLOW_BACKEND_STORE_URI=postgresql://elsewhere/mlflow\n")
        serve("second")
        until(3, 2)
    finally:
        (tmp_path / "mlflow" / "wanted").write_text("none\n")
        until(len(noted("started")), len(noted("started")))
    (_, first, _), (_, second, _), (_, third, where) = noted("started")
    assert first != second == third
    assert where == "postgresql://elsewhere/mlflow"
    assert [pid for pid, *_ in noted("started")] == [pid for (pid,) in noted("ended")]
    assert settings.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "mlflow").stat().st_mode & 0o777 == 0o700


def test_the_service_is_built_from_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """`serveConfigV2` names a function and its arguments: it refuses to be without keys, and builds."""
    from ray.serve import Application

    from raymuse.serving.deploy import application

    spec = yaml.safe_load(SERVE.read_text())["spec"]
    (described,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    monkeypatch.delenv("RAYMUSE_API_KEY", raising=False)
    with pytest.raises(UserError, match="needs an API key"):
        application(described["args"])
    monkeypatch.setenv("RAYMUSE_API_KEY", "key")
    monkeypatch.setattr("raymuse.serving.replicas.place", lambda work, gpus: {})  # it would ask a cluster
    assert isinstance(application(described["args"]), Application)
    monkeypatch.setattr("raymuse.tracking.registry.registered_folder", lambda address, uri: f"/{address[8:]} of {uri}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    bound: list[Any] = []
    monkeypatch.setattr("raymuse.serving.deploy.bound_api", lambda config, keys: bound.append(config))
    application({**described["args"], "model": "models:/a@champion", "models": {"other": {"model": "models:/b/3"}}})
    assert (bound[0].called, bound[0].model) == ("a", "/a@champion of http://mlflow:5000")
    assert bound[0].models["other"].model == "/b/3 of http://mlflow:5000"
