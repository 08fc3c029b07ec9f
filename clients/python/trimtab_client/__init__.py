"""trimtab SDK."""
