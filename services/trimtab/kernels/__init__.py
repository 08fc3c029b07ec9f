"""Log-prob, entropy, KL and the PPO loss straight from hidden states; one API, a Triton and a chunked torch backend."""
