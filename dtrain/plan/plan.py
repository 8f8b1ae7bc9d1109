"""A plan: one simulated step, its peak, its price, and whether it fits.

Of a GPU's memory, `CONTEXT` is left to CUDA, its libraries and NCCL, and `FRAGMENTS` of the rest to gaps in
the allocator's pool.
"""

from dataclasses import dataclass

from dtrain.config import RunConfig
from dtrain.plan.accounts import STATE
from dtrain.plan.devices import Planned
from dtrain.plan.estimate import Estimate, Rates, estimate
from dtrain.plan.peak import Peak, find_peak
from dtrain.plan.simulate import Simulation, simulate

__all__ = ["CONTEXT", "FRAGMENTS", "Plan", "make_plan", "room"]

CONTEXT = 2**30
FRAGMENTS = 0.04


@dataclass(frozen=True)
class Plan:
    """What a run would be on so many GPUs of a kind."""

    config: RunConfig
    gpus: int
    gpu: Planned
    rates: Rates
    simulation: Simulation
    peak: Peak
    estimate: Estimate

    @property
    def room(self) -> int:
        """Bytes that the peak may have."""
        return room(self.gpu)

    @property
    def fits(self) -> bool:
        """Whether the peak has room."""
        return self.peak.nbytes <= self.room

    @property
    def advice(self) -> list[str]:
        """What to change where it does not fit, by name, the cheapest in time first."""
        if self.fits:
            return []
        config, (replicate, shard) = self.config, self.config.mesh.sizes(self.gpus)
        found = []
        if shard < self.gpus:
            state = sum(self.peak.accounts.get(name, 0) for name in STATE)
            found.append(
                f"mesh.shard = {shard}: each GPU holds 1/{shard} of the state, {state / 2**30:.1f} GiB; "
                f"mesh.replicate = 1 would leave 1/{replicate} of that"
            )
        if config.activations.policy == "none":
            found.append('activations.policy = "none" keeps everything: "selective" or "full"')
        if config.train.micro_batch > 1:
            found.append(f"train.micro_batch = {config.train.micro_batch}: fewer")
        if config.activations.mlp_chunks == 1:
            found.append("activations.mlp_chunks = 1: 4 bounds the MLP's hidden layer")
        if config.optim.moments == "fp32":
            found.append('optim.moments = "fp32": "8bit" takes a quarter')
        return [*found, "--fit looks for the fastest that fits"]


def room(gpu: Planned) -> int:
    """Bytes that tensors may have on a GPU."""
    return int((gpu.memory_bytes - CONTEXT) * (1 - FRAGMENTS))


def make_plan(config: RunConfig, gpus: int, gpu: Planned, rates: Rates | None = None) -> Plan:
    """Simulate a step of rank 0.

    Raises:
        ValueError: the config does not fit the number of GPUs, or its data cannot be read.
    """
    rates = rates or Rates()
    simulation = simulate(config, gpus, gpu.arch)
    repeats = config.train.accumulation(gpus) / simulation.micro_batches
    priced = estimate(simulation, gpu, rates, repeats)
    return Plan(config, gpus, gpu, rates, simulation, find_peak(simulation), priced)
