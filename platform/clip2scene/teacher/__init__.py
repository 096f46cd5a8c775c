"""The frozen CLIP teacher: dense image features, class prompts, and the store that they are kept in."""
