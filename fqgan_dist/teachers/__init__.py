"""Frozen pretrained encoders (CLIP, DINOv2) whose features supervise the semantic codebooks."""
