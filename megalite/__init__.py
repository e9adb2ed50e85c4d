"""MegaLite: Megatron-style parallel training of decoder-only language models on DeepSpeed."""

__version__ = "0.1.0"
