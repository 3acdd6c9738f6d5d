"""FLUX.1 Kontext on every GPU of a Ray cluster, as many as the queue asks for.

pip install 'fluxfire[ray]'; on every node: export HF_TOKEN=... FLUXFIRE_API_KEYS='[{"name": "me", "key": "..."}]'

    ray start --head                  # and `ray start --address=HEAD:6379` on the others
    python examples/ray_serve.py
"""

from __future__ import annotations

import ray
from ray import serve

from fluxfire.deploy.ray_app import Options, build


def main() -> None:
    """Runs the application on the cluster of this machine, until Ctrl-C."""
    ray.init(address="auto")
    options = Options(
        min_replicas=1,
        max_replicas=max(1, int(ray.cluster_resources().get("GPU", 0))),
        model="black-forest-labs/FLUX.1-Kontext-dev",
        warm_sizes=((1024, 1024), (768, 1360)),
    )
    serve.start(http_options={"host": "0.0.0.0", "port": 8000})
    serve.run(build(options), name="fluxfire", blocking=True)


if __name__ == "__main__":
    main()
