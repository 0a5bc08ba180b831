"""`build_dataset` as tests call it: the fields of BuildOptions by name, beside its own arguments."""

from dataclasses import fields

from megatron_xy.data.building import build
from megatron_xy.data.building.options import BuildOptions


def build_dataset(inputs, **arguments):
    options = {field.name: arguments.pop(field.name) for field in fields(BuildOptions) if field.name in arguments}
    return build.build_dataset(inputs, options=BuildOptions(**options), **arguments)
