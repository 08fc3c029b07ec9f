"""Drivers of other systems. Each runs in an environment of its own and shares only files with the rest."""
