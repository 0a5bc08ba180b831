"""`python -m megatron_xy` = `megatron-xy`."""

from megatron_xy.cli import main

main()
