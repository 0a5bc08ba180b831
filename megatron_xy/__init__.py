"""Megatron-style 3D-parallel training, from bucketed data to released models; importing it patches nothing."""

__version__ = "0.1.0"
