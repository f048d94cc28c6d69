"""The network: Mixture-of-Transformers decoder, ViT, VAE, flow matching, tokenizer and weights."""
