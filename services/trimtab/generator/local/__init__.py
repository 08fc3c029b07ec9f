"""The embedded engine: continuous batching over a Hugging Face causal LM with a preallocated KV cache."""
