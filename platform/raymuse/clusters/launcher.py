"""`ray up` files: Ray's own schema and preparation, and our rules."""

import copy
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raymuse.clusters.documents import Document, mapping, mappings, schema_problems
from raymuse.clusters.pins import image_problems, install_problems
from raymuse.clusters.placement import ROLE, ROLES

_COMMANDS = ("setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands")
_STARTS = ("head_start_ray_commands", "worker_start_ray_commands")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def problems(config: Document, path: Path) -> list[str]:
    """Everything that is wrong with a file for `ray up`, a sentence each."""
    found = list(_schema(config))
    if not found:
        found += _prepared(config)
    return [*found, *_rules(config, path)]


def _schema(config: Document) -> Iterator[str]:
    """Ray's schema, asked for all errors: Ray itself would stop at the first."""
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text("utf-8"))
    return schema_problems(_filled(config), schema)


def _prepared(config: Document) -> Iterator[str]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    logging.getLogger("ray.autoscaler").setLevel(logging.WARNING)  # it tells of each default that it fills in
    try:
        validate_config(prepare_config(_filled(config)))
    except Exception as error:  # Ray raises whatever a broken file leads it into: every kind is the file's fault
        yield f"{type(error).__name__}: {error}"


def _filled(config: Document) -> Document:
    filled = copy.deepcopy(config)
    for node_type in _node_types(filled).values():
        node_type.setdefault("resources", {})  # the launcher asks the cloud for them before it validates
    return filled


def _node_types(config: Document) -> dict[str, Document]:
    types = mapping(config.get("available_node_types"))
    return {name: value for name, value in types.items() if isinstance(value, dict)}


def _rules(config: Document, path: Path) -> Iterator[str]:
    yield from _counts(config)
    yield from _roles(config)
    yield from _own_machines(config)
    yield from _images(config, path)
    yield from _commands(config)
    yield from _authentication(config)
    yield from _open_doors(config)


def _counts(config: Document) -> Iterator[str]:
    workers = {name: group for name, group in _node_types(config).items() if name != config.get("head_node_type")}
    total, said = config.get("max_workers"), [group.get("max_workers") for group in workers.values()]
    most: list[int] = [count for count in said if isinstance(count, int)]
    if workers and isinstance(total, int) and len(most) == len(said) and total != sum(most):
        yield (
            f"max_workers: is {total}, and the groups' add up to {sum(most)} "
            f"({' + '.join(f'{name} {count}' for name, count in zip(workers, most, strict=True))}): make them equal"
        )
    for name, group in workers.items():
        if not isinstance(group.get("max_workers"), int):
            yield f"available_node_types.{name}: has no max_workers: say how many machines it may cost"
    ips = mapping(config.get("provider")).get("worker_ips")
    if isinstance(ips, list) and isinstance(total, int) and total != len(ips):
        yield f"max_workers: is {total}, and provider.worker_ips names {len(ips)} machines: make them equal"


def _roles(config: Document) -> Iterator[str]:
    types, head = _node_types(config), config.get("head_node_type")
    roles = {name: mapping(group.get("labels")).get(ROLE) for name, group in types.items()}
    if not any(roles.values()):
        return  # Ray then places by CPU and GPU alone
    for name, role in roles.items():
        where = f"available_node_types.{name}"
        if role not in ROLES:
            yield f"{where}.labels: {ROLE} must be one of {', '.join(ROLES)}, was {role}"
            continue
        if (role == "head") != (name == head):
            yield f"{where}.labels: the role {role} does not fit: the head, and it alone, has the role head"
        gpus = mapping(types[name].get("resources")).get("GPU")
        if role == "cpu" and gpus:
            yield f"{where}: has the role cpu and {gpus} GPUs, which no stage would use: give it the role all"
        detected = mapping(config.get("provider")).get("type") == "aws"  # the launcher asks AWS what a machine has
        if role not in ("cpu", "head") and not gpus and not detected:
            yield f"{where}: has the role {role} and no GPU in `resources`: no work that asks for one would start it"
    if not {"cpu", "all"} & set(roles.values()):
        yield f"available_node_types: no group has the role cpu or all ({ROLE}): decoding would wait for ever"
    starts = " ".join(_lines(config, "head_start_ray_commands"))
    if "RAY_enable_autoscaler_v2=1" not in starts:
        yield "head_start_ray_commands: labels need Ray's second autoscaler: export RAY_enable_autoscaler_v2=1"
    if f"{ROLE}=head" not in starts:
        yield f"head_start_ray_commands: the head must say its role itself: `ray start --head --labels={ROLE}=head`"


def _own_machines(config: Document) -> Iterator[str]:
    """Machines of one's own join by Ray's first autoscaler alone (ray-project/ray issue 57153)."""
    starts = " ".join(_lines(config, "head_start_ray_commands"))
    if mapping(config.get("provider")).get("type") == "local" and "RAY_enable_autoscaler_v2=0" not in starts:
        yield (
            "head_start_ray_commands: Ray's second autoscaler, which `ray up` turns on, never starts the workers of "
            "provider.type local: export RAY_enable_autoscaler_v2=0"
        )


def _images(config: Document, path: Path) -> Iterator[str]:
    holders = {"docker": mapping(config.get("docker"))}
    holders |= {f"available_node_types.{n}.docker": mapping(g.get("docker")) for n, g in _node_types(config).items()}
    for where, docker in holders.items():
        for key in ("image", "head_image", "worker_image"):
            if docker.get(key):
                yield from image_problems(f"{where}.{key}", docker[key], path)


def _commands(config: Document) -> Iterator[str]:
    for key in _COMMANDS:
        for line in _lines(config, key):
            yield from install_problems(key, line)


def _authentication(config: Document) -> Iterator[str]:
    for key in _STARTS:
        starts = [line for line in _lines(config, key) if re.search(r"\bray start\b", line)]
        if not starts:
            yield f"{key}: nothing here starts Ray with authentication: export RAY_AUTH_MODE=token before `ray start`"
        for line in starts:
            if not re.search(r"\bRAY_AUTH_MODE=token\b", line.partition("ray start")[0]):
                yield f"{key}: Ray would let everyone in: export RAY_AUTH_MODE=token in the command with `ray start`"
            if re.search(r"\bRAY_AUTH_TOKEN=", line):
                yield f"{key}: RAY_AUTH_TOKEN stands in a command line, which all users can read: use a file"
    if not any(str(remote).endswith("/.ray/auth_token") for remote in mapping(config.get("file_mounts"))):
        yield "file_mounts: the token must reach every machine: ~/.ray/auth_token: ~/.ray/auth_token"


def _open_doors(config: Document) -> Iterator[str]:
    for key in _STARTS:
        for host in re.findall(r"--dashboard-host[= ](\S+)", " ".join(_lines(config, key))):
            if host.strip("'\"") not in _LOOPBACK:
                yield f"{key}: the dashboard would listen on {host}: say --dashboard-host=127.0.0.1"
    group = mapping(mapping(config.get("provider")).get("security_group"))
    for rule in mappings(group.get("IpPermissions")):
        for world in [*mappings(rule.get("IpRanges")), *mappings(rule.get("Ipv6Ranges"))]:
            ports = rule.get("FromPort"), rule.get("ToPort")
            is_ssh = ports == (22, 22) and rule.get("IpProtocol") == "tcp"
            if (world.get("CidrIp") or world.get("CidrIpv6")) in ("0.0.0.0/0", "::/0") and not is_ssh:
                yield f"provider.security_group: opens {_ports(*ports)} to the world: name the addresses that may come"
    options: list[Any] = []
    for docker in (config.get("docker"), *(group.get("docker") for group in _node_types(config).values())):
        for key in ("run_options", "head_run_options", "worker_run_options"):
            options += mapping(docker).get(key) or []
    for option in options:
        if re.search(r"(^|\s)(-p|--publish|--privileged)\b", str(option)):
            yield f"docker: `{option}` opens the container to the world or the machine to it: leave it away"


def _ports(first: Any, last: Any) -> str:
    if first is None:
        return "all ports"
    return f"port {first}" if first == last else f"ports {first} to {last}"


def _lines(config: Document, key: str) -> list[str]:
    value = config.get(key)
    return [line for line in value if isinstance(line, str)] if isinstance(value, list) else []
