"""FQGAN, the factorized tokenizer: an image to K grids of codes and back."""
