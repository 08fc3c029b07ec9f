"""Log-prob, entropy, log-sum-exp and KL straight from hidden states; one API, one file a backend."""
