"""`python -m nio_hf.cli`, the same as `nio-hf`."""

from nio_hf.cli.main import main

main()
