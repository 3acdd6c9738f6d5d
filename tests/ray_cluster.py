"""A real Ray of one machine with fluxfire on it, for tests; a process of its own, since Ray starts threads and warns.

    python ray_cluster.py '{"max_replicas": 2, ...}'

Prints the URL as a line of JSON once the application runs. Then it answers each line on standard input with the numbers
of replicas by their state. It ends, and Ray with it, when its input does.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}

import ray
from ray import serve

from fluxfire.deploy.ray_app import Options, build


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def main() -> None:
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what Ray prints
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:  # short: Ray makes sockets in it
        ray.init(num_cpus=1, num_gpus=0, object_store_memory=100 * 2**20, include_dashboard=False, _temp_dir=folder)
        try:
            port = free_port()
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            serve.run(build(Options(**json.loads(sys.argv[1]))), name="fluxfire")
            print(json.dumps({"url": f"http://127.0.0.1:{port}"}), file=out)
            for _ in sys.stdin:
                deployment = serve.status().applications["fluxfire"].deployments["fluxfire"]
                print(json.dumps(deployment.replica_states), file=out)
        finally:
            serve.shutdown()
            ray.shutdown()


main()
