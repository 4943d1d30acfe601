"""FAR, the factorized autoregressive model: a class label to K grids of codes."""
