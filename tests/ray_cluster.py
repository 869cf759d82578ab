"""A Ray cluster of two nodes in processes of their own; one dies while prepare.py works on both.

usage: python ray_cluster.py OUT PREPARE_FLAGS ...
"""

import subprocess
import sys
import time
from pathlib import Path

PREPARE = Path(__file__).resolve().parent.parent / "prepare.py"


def main(out, *flags):
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    other = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    command = [sys.executable, PREPARE, *flags, "--out", out, "--ray", cluster.address]
    process = subprocess.Popen(command)
    while (n := len(list(Path(out).glob(".work/0*.json")))) < 20 and process.poll() is None:
        time.sleep(0.01)
    still_running = process.poll() is None
    cluster.remove_node(other, allow_graceful=False)
    if still_running:
        print("a node was killed after", n, "tasks", flush=True)
    code = process.wait(150)
    cluster.shutdown()
    sys.exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
