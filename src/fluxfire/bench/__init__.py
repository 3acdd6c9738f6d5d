"""Measuring: how far pictures are apart (`quality`). The outer ring: it may import the core, never the other way."""
