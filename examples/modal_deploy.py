"""FLUX.1 Kontext on H100s of Modal: started by requests, none when nobody asks.

pip install 'fluxfire[modal]'; modal setup

    modal secret create fluxfire HF_TOKEN=... FLUXFIRE_API_KEYS='[{"name": "me", "key": "..."}]' \
        FLUXFIRE_S3_ACCESS_KEY_ID=... FLUXFIRE_S3_SECRET_ACCESS_KEY=...
    modal run examples/modal_deploy.py::app.fetch  # the weights, once, without a GPU
    modal deploy examples/modal_deploy.py          # prints the URL
"""

from fluxfire.deploy.modal_app import make_app

app = make_app(
    model="black-forest-labs/FLUX.1-Kontext-dev",
    gpu="H100",
    snapshot="cpu",  # or "gpu", Modal's alpha feature
    max_containers=10,
    settings={
        "warm_sizes": [[1024, 1024], [768, 1360]],
        "storage": "s3",  # pictures by URL, in R2
        "s3_bucket": "my-pictures",
        "s3_endpoint": "https://my-account.r2.cloudflarestorage.com",
    },
)
