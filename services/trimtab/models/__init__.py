"""Policies and scalar-head models as plain Hugging Face folders, and the one packed forward they share."""
