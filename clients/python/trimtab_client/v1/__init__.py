"""Generated from protos/trimtab/v1; do not edit."""
