"""Figures of one run: charts of its numbers, and its labels on images and from above."""
