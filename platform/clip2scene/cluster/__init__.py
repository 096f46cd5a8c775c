"""Where jobs run: an embedded Ray here, or a cluster."""
