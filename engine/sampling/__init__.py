"""Samplers of teachers and generators, and the images of stored models."""
