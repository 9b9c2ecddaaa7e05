"""A cluster of Ray on this machine: a head without CPUs, and nodes with three each.

Lines on stdin are commands, answered by a line of JSON: `kill PID` sends SIGKILL to a raylet and adds another
node, `left` lists the actors and placement groups that there are. It ends with its input.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import ray
from ray.cluster_utils import Cluster

from launch.backends.ray.cluster import SYSTEM_CONFIG

CPUS = 3


def main() -> None:
    output = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": SYSTEM_CONFIG}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=CPUS) for _ in range(int(sys.argv[1]))]
    ray.init(cluster.address, log_to_driver=False)
    print(json.dumps({"address": cluster.address}), file=output)
    for line in sys.stdin:
        command, *arguments = line.split()
        answer = left() if command == "left" else kill(cluster, nodes, int(arguments[0]))
        print(json.dumps(answer), file=output)
    ray.shutdown()
    cluster.shutdown()


def left() -> dict[str, Any]:
    groups = ray.util.placement_group_table().values()
    return {
        "actors": sorted(actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)),
        "groups": sorted(group["name"] for group in groups if group["state"] != "REMOVED"),
    }


def kill(cluster: Cluster, nodes: list[Any], pid: int) -> dict[str, Any]:
    raylets = [node.all_processes["raylet"][0].process for node in nodes]
    (number,) = [number for number, raylet in enumerate(raylets) if raylet.pid == pid]
    raylets[number].send_signal(signal.SIGKILL)
    nodes[number] = cluster.add_node(num_cpus=CPUS, wait=False)
    return {"killed": pid}


if __name__ == "__main__":
    main()
