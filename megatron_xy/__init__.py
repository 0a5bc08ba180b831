"""Megatron-style 3D-parallel training, from bucketed data to released models. Importing this package patches nothing."""

__version__ = "0.1.0"
