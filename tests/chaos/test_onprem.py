"""`ray up cluster/onprem.yaml` on two machines of namespaces (onprem_lab.sh), where these are allowed.

What the test changes in the file: addresses, user, and that the machines' virtual environment is the one of this test.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from raymuse.clusters.check import check

ROOT = Path(__file__).parents[2]
LAB = Path(__file__).with_name("onprem_lab.sh")
ISOLATED = ["unshare", "--net", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child"]

WORK = """
import json, ray
from raymuse.clusters.placement import ROLE, place

ray.init(address="auto", log_to_driver=False)
@ray.remote(num_cpus=1, label_selector=place("decode", 0))
def where():
    return ray.util.get_node_ip_address()

decoded_on = ray.get(where.remote())  # waits for the worker to join
roles = {node["NodeManagerAddress"]: node["Labels"].get(ROLE) for node in ray.nodes() if node["Alive"]}
print("WORK", json.dumps({"roles": roles, "decoded_on": decoded_on}))
"""

STEPS = """
set -uo pipefail
for number in 10 11; do
  until ssh $SSH root@10.77.0.$number true; do sleep 0.2; done
done
ray up --yes --no-config-cache cluster.yaml || exit 11
for attempt in $(seq 40); do
  ray exec cluster.yaml "$RUN" > work.txt 2>&1; grep -q '"10.77.0.11"' work.txt && break; sleep 3
done
cat work.txt
listening=$(ssh $SSH root@10.77.0.10 'ss -Hltn')
echo "DASHBOARD $(echo "$listening" | grep -c '127.0.0.1:8265')"
echo "NOTOKEN $(ssh $SSH root@10.77.0.10 curl -s -o /dev/null -w %{http_code} http://127.0.0.1:8265/api/version)"
ssh $SSH root@10.77.0.10 'flock -n ~/mlflow/lock true || echo MLFLOW kept'
ray down --yes cluster.yaml || exit 12
for number in 10 11; do
  for attempt in $(seq 60); do   # a worker leaves a minute after its head; who has is a zombie where sshd is process 1
    left=$(ssh $SSH root@10.77.0.$number 'ps -eo stat,args | grep -E "[r]aylet|[g]cs_server" | grep -vc "^Z"')
    [ "$left" = 0 ] && break; sleep 2
  done
  echo "LEFT $left"
done
"""


def allowed() -> str | None:
    """Why this machine cannot do it; None where it can."""
    missing = [
        tool for tool in ("unshare", "ip", "ssh", "sshd", "ssh-keygen", "rsync") if not shutil.which(tool, path=_path())
    ]
    if missing:
        return f"there is no {', '.join(missing)}"
    tried = subprocess.run([*ISOLATED, "ip", "link", "add", "x", "type", "bridge"], capture_output=True, timeout=20)
    return None if tried.returncode == 0 else "namespaces are not allowed"


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.skipif(allowed() is not None, reason=str(allowed()))
def test_machines_with_ssh_become_a_cluster_and_machines_again(tmp_path: Path) -> None:
    client = tmp_path / "client"
    (client / ".ray").mkdir(parents=True)
    token = client / ".ray" / "auth_token"
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o600)
    config = yaml.safe_load((ROOT / "cluster" / "onprem.yaml").read_text())
    config["provider"] |= {"head_ip": "10.77.0.10", "worker_ips": ["10.77.0.11"]}
    config["max_workers"] = 1
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(client / ".ssh" / "id_ed25519")}
    config["file_mounts"] = {"~/.ray/auth_token": str(token), "~/raymuse": str(ROOT)}
    install = f"ln -sfn {sys.prefix} ~/raymuse-venv"  # what pip would put there
    token_is_private, _, _, *rest = config["setup_commands"]
    config["setup_commands"] = [token_is_private, install, *rest]
    file = client / "cluster.yaml"
    file.write_text(yaml.safe_dump(config))
    assert check(file) == []

    (client / "work.py").write_text(WORK)
    run = f"RAY_AUTH_MODE=token PYTHONPATH=~/raymuse/platform ~/raymuse-venv/bin/python {client}/work.py"
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
    options = (
        f"-i {client}/.ssh/id_ed25519 -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    )
    environment = clean | {
        "PATH": f"{Path(sys.executable).parent}:{_path()}",
        "HOME": str(client),
        "RAY_TMPDIR": str(client),
        "RAY_AUTH_MODE": "token",
        "SSH": options,
        "RUN": run.replace(str(client), "~/raymuse-work"),
    }
    for host in ("host-10", "host-11"):
        (tmp_path / host / "raymuse-work").mkdir(parents=True)
        (tmp_path / host / "raymuse-work" / "work.py").write_text(WORK)
    done = subprocess.run(
        [*ISOLATED, "bash", LAB, tmp_path, "bash", "-c", STEPS],
        cwd=client,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1100,
    )
    said = done.stdout + done.stderr + "".join(path.read_text() for path in tmp_path.glob("host-*/sshd.log"))
    assert done.returncode == 0, said[-6000:]
    (found,) = (json.loads(line.partition(" ")[2]) for line in done.stdout.splitlines() if line.startswith("WORK "))
    assert found == {"roles": {"10.77.0.10": "head", "10.77.0.11": "cpu"}, "decoded_on": "10.77.0.11"}, said[-6000:]
    assert "DASHBOARD 1" in done.stdout
    assert "NOTOKEN 401" in done.stdout
    assert "MLFLOW kept" in done.stdout
    assert done.stdout.count("LEFT 0") == 2, said[-3000:]
    assert token.read_text() not in said
