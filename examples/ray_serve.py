"""FLUX.1 Kontext on every GPU of a Ray cluster, as many as the queue asks for, until Ctrl-C.

pip install 'fluxfire[ray]'; on every node: export HF_TOKEN=... FLUXFIRE_API_KEYS='[{"name": "me", "key": "..."}]'

    python examples/ray_serve.py --tiny    # the embedded model on a CPU, in a Ray of its own
    ray start --head                       # and `ray start --address=HEAD:6379` on the others
    python examples/ray_serve.py
"""

import argparse
from contextlib import suppress

import ray
from ray import serve

from fluxfire.deploy.ray_app import Options, build

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--tiny", action="store_true", help="the embedded model on this machine's CPU, without a cluster")
parser.add_argument("--port", type=int, default=8000)
options = parser.parse_args()

if options.tiny:
    ray.init(include_dashboard=False)
    app = Options(gpus=0, cpus=1, min_replicas=1)
else:
    ray.init(address="auto")
    gpus = max(1, int(ray.cluster_resources().get("GPU", 0)))
    model, sizes = "black-forest-labs/FLUX.1-Kontext-dev", ((1024, 1024), (768, 1360))
    app = Options(min_replicas=1, max_replicas=gpus, model=model, warm_sizes=sizes)

serve.start(http_options={"host": "127.0.0.1" if options.tiny else "0.0.0.0", "port": options.port})
with suppress(KeyboardInterrupt):
    serve.run(build(app), name="fluxfire", blocking=True)
