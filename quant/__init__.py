"""lowbit: turns float Hugging Face checkpoints into low-bit ones that load where people already serve."""
__version__ = "0.1.0"
