"""Shoestring trains DeepSeek-V3-class mixture-of-experts language models on a small budget."""

__version__ = "0.1.0"
