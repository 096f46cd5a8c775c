"""The frozen CLIP teacher: dense image features, the store that holds them, and class prompts."""
