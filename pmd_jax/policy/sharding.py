"""The device mesh, and one table from logical axes to mesh axes.

Axes of the mesh: `data` replicates the model, `fsdp` cuts parameters and batch, `tensor` cuts
heads, the MLP and the vocabulary. The code names logical axes only ("embed", "heads", "batch");
to move something to another mesh axis, edit AXES.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pmd_jax.policy.families import ModelConfig

MESH_AXES = ("data", "fsdp", "tensor")
AXES: dict[str, str | tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 (one axis at most) takes what the others leave."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


def _divisors(number: int) -> str:
    """The first dozen, for messages."""
    return ", ".join([str(n) for n in range(1, number + 1) if number % n == 0][:12])


def mesh_sizes(config: MeshConfig, num_devices: int) -> tuple[int, int, int]:
    """Devices along each mesh axis. Raises ValueError when the sizes do not fit."""
    sizes = [config.data, config.fsdp, config.tensor]
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise ValueError(f"mesh: sizes must be positive, one of them may be -1; got {sizes}")
    rest = math.prod(size for size in sizes if size > 0)
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(num_devices // rest, 1)
    if math.prod(sizes) != num_devices:
        raise ValueError(
            f"mesh: data x fsdp x tensor must equal the number of devices, {num_devices}; "
            f"got {' x '.join(map(str, sizes))}; each must be one of {_divisors(num_devices)}, or "
            f"-1 for what the others leave"
        )
    data, fsdp, tensor = sizes
    return data, fsdp, tensor


def make_mesh(config: MeshConfig | None = None, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (all by default). Raises ValueError when the sizes do not fit.

    Of several processes, each has consecutive rows of the batch axes and whole `tensor` groups.
    """
    devices = list(jax.devices()) if devices is None else devices
    sizes = mesh_sizes(config or MeshConfig(), len(devices))
    by_process: dict[int, list[jax.Device]] = {}
    for device in devices:
        by_process.setdefault(device.process_index, []).append(device)
    if len(by_process) == 1:
        return jax.make_mesh(sizes, MESH_AXES, (AxisType.Auto,) * 3, devices=devices)
    owned, tensor = {len(own) for own in by_process.values()}, sizes[2]
    if len(owned) > 1 or min(owned) % tensor:
        common = math.gcd(*owned)
        fits = [str(n) for n in range(1, common + 1) if common % n == 0]
        raise ValueError(
            f"mesh.tensor: must divide the devices of each process, {sorted(owned)}, since each "
            f"samples on its own; got {tensor}; sizes that work: {', '.join(fits)}"
        )
    rows = [_block(by_process[p], tensor) for p in sorted(by_process)]
    return Mesh(np.concatenate(rows).reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def _block(devices: list[jax.Device], tensor: int) -> np.ndarray:
    """The devices of one process as [batch, tensor], neighbours next to each other."""
    sizes = 1, len(devices) // tensor, tensor
    return jax.make_mesh(sizes, MESH_AXES, (AxisType.Auto,) * 3, devices=devices).devices[0]


def local_mesh(mesh: Mesh) -> Mesh:
    """The part of a mesh that this process owns, where it samples; all of it in one process."""
    if not mesh.is_multi_process:
        return mesh
    own = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    devices = np.array(own).reshape(1, -1, mesh.shape["tensor"])
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def single_device_mesh() -> Mesh:
    return make_mesh(MeshConfig(), devices=jax.local_devices()[:1])


def spec(*logical: str | None) -> P:
    """Logical axes -> PartitionSpec, e.g. spec("batch", None, "embed")."""
    return P(*(AXES[axis] if axis else None for axis in logical))


def named(mesh: Mesh, *logical: str | None) -> NamedSharding:
    return NamedSharding(mesh, spec(*logical))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Pins the layout of an intermediate array; does nothing where no mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*logical))


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts the batch axis is cut."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_divides(config: ModelConfig, mesh: Mesh | AbstractMesh) -> None:
    """Raises ValueError, with the sizes that would work, when the model cannot be cut evenly."""
    cuts = {
        "tensor": {
            "attention heads": config.num_heads,
            "key-value heads": config.num_kv_heads,
            "MLP width": config.mlp_width,
            "vocabulary": config.vocab_size,
        },
        "fsdp": {"model width": config.width},
    }
    for axis, sizes in cuts.items():
        ways = mesh.shape[axis]
        common = math.gcd(*sizes.values())
        if common % ways:
            what = ", ".join(f"{name} {size}" for name, size in sizes.items() if size % ways)
            raise ValueError(
                f"mesh.{axis}: must divide the model's {what}; got {ways}; "
                f"sizes that work: {_divisors(common)}"
            )
