"""The server of `fluxfire.serve` on many machines: `ray_app.py` for Ray Serve, `modal_app.py` for Modal."""
