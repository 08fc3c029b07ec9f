"""Measurements of trimtab beside its peers, side by side in one run. Nothing here is a test."""
