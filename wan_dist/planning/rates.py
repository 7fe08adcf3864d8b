"""What a device and its links are taken to do a second, where the config does not say."""

from wan_dist.config.schema import PlanConfig
from wan_dist.planning.cost import Rates

# cuda: an H200 (790 TFLOP/s of dense bf16 measured, 648 published for attention), NVLink 4, 400 Gbit/s between nodes,
# PCIe 5 from pinned memory, a good parallel file system or NVMe. cpu: one core with AVX2 in fp32, gloo on one machine.
_DEFAULTS = {
    "cuda": {
        "matmul_tflops": 790.0, "attention_tflops": 648.0, "node_gb_s": 450.0, "network_gb_s": 50.0,
        "host_gb_s": 55.0, "disk_gb_s": 3.0,
    },
    "cpu": {
        "matmul_tflops": 0.06, "attention_tflops": 0.04, "node_gb_s": 1.0, "network_gb_s": 1.0,
        "host_gb_s": 5.0, "disk_gb_s": 1.0,
    },
}  # fmt: skip


def rates_of(plan: PlanConfig, device: str) -> Rates:
    """device: `cpu` or `cuda`. FLOP/s and bytes/s."""

    def rate(name: str) -> float:
        given = getattr(plan, name)
        return _DEFAULTS[device][name] if given is None else given

    return Rates(
        matmul=1e12 * rate("matmul_tflops"),
        attention=1e12 * rate("attention_tflops"),
        node=1e9 * rate("node_gb_s"),
        network=1e9 * rate("network_gb_s"),
        host=1e9 * rate("host_gb_s"),
        disk=1e9 * rate("disk_gb_s"),
    )
