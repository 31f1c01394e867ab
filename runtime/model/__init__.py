"""config.json to ModelConfig, safetensors to weights, vision tower, decoder, M-RoPE."""
