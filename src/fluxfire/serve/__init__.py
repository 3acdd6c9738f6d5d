"""The server around one optimized pipeline: `fluxfire serve`.

Two processes. The *worker* (`worker.py`) owns the pipeline and makes pictures; it can be slow, run out of memory or
die. The *server* (everything else) answers HTTP, holds the queue and never touches a tensor, so it answers while the
worker computes, and starts a new one when it dies. They exchange JSON and raw bytes over pipes (`wire.py`).

    HTTP -> guard.py    who may, and how many bytes
         -> routes      inference.py, openai.py, status.py, web.py (the page for people)
                        asks.py: what is asked, and whether the model can do it; stream.py: as it happens
         -> desk.py     repeated requests, quotas, clients that go
         -> engine.py   the queue (queue.py), batches, deadlines, cancellation; the worker's life (supervisor.py)
         -> results.py  pixels to PNG, JPEG or WebP; kept in storage.py when a URL is asked for

How to run it: `docs/serving.md`.
"""
