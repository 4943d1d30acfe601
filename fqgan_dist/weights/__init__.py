"""Weights that this project did not train in the run at hand: where from, checked, named."""
