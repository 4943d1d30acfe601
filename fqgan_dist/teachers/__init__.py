"""Frozen teacher networks: CLIP (open_clip) and DINOv2 (transformers)."""
