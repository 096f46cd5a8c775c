"""The sparse 3D network that learns from the teacher; the only importer of spconv."""
