"""The Open Inference Protocol v2: its proto file as published by the KServe authors, and stubs generated from it."""
