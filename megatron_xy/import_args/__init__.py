"""`megatron-xy import-args`: a Megatron-LM launch script, which is read and never run, as a RUN.yaml."""
