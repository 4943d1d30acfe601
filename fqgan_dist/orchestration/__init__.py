"""Who runs the stages where: the only package that may import ray."""
