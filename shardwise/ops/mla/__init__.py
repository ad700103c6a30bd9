"""Multi-head latent attention operators: keys and values are expanded from one latent vector a token."""
