"""`megatron-xy launch`: from a RUN.yaml and a cluster to the command, the batch script or the manifest that starts it.

Templates and the reasons for what they set are files in `templates`. Nothing here imports torch.
"""
