"""The store of published weights: versions that are whole or absent, and one pointer to the current one."""
