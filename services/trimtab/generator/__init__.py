"""The generator: samples completions from a policy, over gRPC, while new versions of it arrive."""
