"""The `nio-hf` command."""
