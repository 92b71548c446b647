"""The `nio-hf` command: one module per subcommand."""
