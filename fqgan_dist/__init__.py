"""Train FQGAN tokenizers and FAR generators (arXiv 2411.16681) at cluster scale."""
