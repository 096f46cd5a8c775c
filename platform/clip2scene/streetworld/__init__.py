"""A synthetic street world in the official nuScenes format, and the small CLIP for its images."""
