"""The DeepSeek-V3-shaped decoder."""
