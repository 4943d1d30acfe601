"""The campaign of faults: see faults.py."""
